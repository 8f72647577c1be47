"""A recorded CSV has a stamp beside it, and a measurement of step times is appended, not replaced."""

from __future__ import annotations

import time

import pandas as pd
import times
import torch

from llavolta.cost import bench
from llavolta.studies import records


def test_a_csv_is_written_with_its_stamp(tmp_path):
    data = tmp_path / "data.json"
    data.write_text("[1]")
    records.write(pd.DataFrame({"a": [1 / 3]}), tmp_path / "one.csv", data=[data], command="make one", index=False)
    records.write(pd.DataFrame({"a": [1]}), tmp_path / "two.csv", threads=2, dtype="bfloat16", index=False)
    assert (tmp_path / "one.csv").read_text() == "a\n0.3333\n"
    stamps = records.read_stamps(tmp_path)
    assert list(stamps) == ["one.csv", "two.csv"] and set(stamps["one.csv"]) == set(records.FIELDS)
    assert stamps["one.csv"]["command"] == "make one" and stamps["one.csv"]["data"] != stamps["two.csv"]["data"]
    assert stamps["two.csv"]["threads"] == 2 and stamps["two.csv"]["dtype"] == "bfloat16"
    data.write_text("[2]")
    assert records.digest([data]) != stamps["one.csv"]["data"]


def test_measurements_are_numbered_and_appended(tmp_path):
    table = pd.DataFrame([dict.fromkeys(times.COLUMNS[1:], 1) | dict(scheme="none")])
    for count in (1, 2, 3):
        both = times.append(table, tmp_path / "step-times.csv")
        assert both.measurement.tolist() == list(range(1, count + 1))
    assert list(pd.read_csv(tmp_path / "step-times.csv")) == times.COLUMNS


def test_other_processes_do_not_advance_the_clock_of_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    start, wall = bench.now(torch.device("cpu")), time.perf_counter()
    time.sleep(0.05)
    assert time.perf_counter() - wall >= 0.05 > 10 * (bench.now(torch.device("cpu")) - start)
