"""The GPU benchmark, at tiny shapes on the CPU: that it works, and how often compression makes the host wait."""

from __future__ import annotations

import pandas as pd
import pytest
import torch
from benchmarks import gpu
from benchmarks.gpu import tiny_load

from llavolta import compress


@pytest.fixture
def load(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return tiny_load()


@pytest.mark.slow
def test_every_part_is_saved_when_done(load, tmp_path):
    parts = ["peaks", "training", "inference", "host_reads", "long"]
    assert gpu.main(["--tiny", "--folder", str(tmp_path), "--parts", *parts]) == 0
    [file] = tmp_path.glob("gpu-*.csv")
    table = pd.read_csv(file).set_index("part")
    assert set(table.index) == set(parts)
    training = table.loc["training"]
    assert (training.seconds > 0).all() and (training.speedup > 0).all() and (training.implied[1:] >= 1).all()
    assert training.implied[training.plan == "none"].eq(1).all()
    assert table.loc["inference"].groupby("plan").decode_ms.size().eq(len(load.prefill)).all()
    page = file.with_suffix(".md").read_text()
    assert "gpu.py --tiny" in page and torch.__version__ in page and "a CPU" in page
    assert all(f"## {part}\n" in page for part in parts)


@pytest.mark.slow
def test_the_core_is_checked_against_the_cpu(load, monkeypatch):
    monkeypatch.setattr(gpu, "BY_PLACE", gpu.BY_PLACE[:1])
    monkeypatch.setattr(gpu, "BY_RANK", gpu.BY_RANK[:1])
    table = gpu.core(load)
    assert table.ok.all() and set(table.dtype) == {"float32", "bfloat16"} and set(table.attention) >= {"sdpa", "eager"}
    with monkeypatch.context() as patched:  # a compressor that is wrong on the device is found
        wrong = "2:avgpool:2"
        patched.setattr(
            gpu, "compress", lambda m, p: compress(m, wrong if ":" in p and m.dtype == torch.bfloat16 else p)
        )
        assert not gpu.core(load).ok.all()


def test_a_part_that_fails_is_told_and_the_next_one_begins(load, tmp_path, monkeypatch, capsys):
    def broken(load):
        raise RuntimeError("CUDA error: something")

    def whole(load):
        return pd.DataFrame({"plan": ["none"], "seconds": [1.0]})

    monkeypatch.setattr(gpu, "PARTS", {"peaks": broken, "host_reads": whole})
    assert gpu.main(["--tiny", "--folder", str(tmp_path)]) == 1
    [page] = tmp_path.glob("*.md")
    assert "peaks: RuntimeError: CUDA error: something" in page.read_text() and "## host_reads" in page.read_text()
    assert gpu.main(["--tiny", "--folder", str(tmp_path), "--minutes", "-1"]) == 1
    assert "peaks: not begun, -1 minutes were over" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [([], "no CUDA device"), (["--tiny", "--parts", "nonsense"], "no part nonsense; there are peaks")],
)
def test_what_cannot_be_measured_is_said_in_one_line(load, tmp_path, given, said, capsys):
    assert gpu.main(["--folder", str(tmp_path), *given]) == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("plan", "at_most"), [("none", 0), ("2:avgpool:8", 4), ("2:avgpool:8;10:avgpool:2", 7), ("2:fastv:0.5", 6)]
)
def test_a_compressed_step_asks_the_device_seldom(load, plan, at_most):
    """The labelled rows, the check of the compressor, the longest row, the mask; besides these the copy of where the
    pictures are, from which all that families.py computes is computed on the CPU."""
    model, batch = load.model.float().train(), load.inputs(2)
    batch["pixel_values"] = batch["pixel_values"].float()
    with compress(model, plan), gpu.HostReads() as reads:
        model(**batch).loss.backward()
    ours = [place for place in reads.places.elements() if place.startswith("llavolta/")]
    assert len([place for place in ours if not place.startswith("llavolta/compression/families.py")]) <= at_most, ours
    assert reads.count - len(ours) <= 3  # transformers' own
