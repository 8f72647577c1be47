"""Two processes over gloo under each engine train like one: losses, resumption across a stage, the final folder."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from processors_tiny import write
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from two_processes import train_together

from llavolta.data import LlavaData
from llavolta.errors import ConfigError, Stopped
from llavolta.train.__main__ import main
from llavolta.train.config import TrainConfig
from llavolta.train.launch import launch
from llavolta.train.run import train
from llavolta.train.trainer import read_metrics

ENGINES = {  # the configuration, and a file that only this engine's checkpoints hold
    "ddp": ({}, "optimizer.pt"),
    "zero2": ({"deepspeed": "zero2"}, "global_step6/zero_pp_rank_1_mp_rank_00_optim_states.pt"),
    "zero3": ({"deepspeed": "zero3"}, "global_step6/zero_pp_rank_1_mp_rank_00_model_states.pt"),
    "fsdp2": ({"fsdp": "fsdp2"}, "pytorch_model_fsdp.bin"),
}


@pytest.fixture(scope="module")
def settings(scenes, small_model, tmp_path_factory):
    """Three stages of two steps on batches of pictures, of text, and of pictures on the first process only."""
    entries = json.loads((scenes / "train.json").read_text())[:32]
    for entry in entries[20:]:
        entry.pop("image")
        for turn in entry["conversations"]:
            turn["value"] = turn["value"].replace("<image>", "").strip()
    file = tmp_path_factory.mktemp("mixed") / "mixed.json"
    file.write_text(json.dumps(entries))
    values = dict(model=str(small_model), data=str(file), images=str(scenes), align_steps=0, max_steps=6)
    return {**values, "global_batch": 8, "log_steps": 1, "save_steps": 0, "warmup": 0.0, "learning_rate": 5e-4}


@pytest.fixture(scope="module")
def one(settings, tmp_path_factory):
    """The same in one process."""
    output = tmp_path_factory.mktemp("one") / "run"
    return train(TrainConfig(output=str(output), batch_size=8, **settings), progress=False)


def trains_like(one: Path, two: Path, steps: int) -> None:
    """Both runs log every step and equal losses, and end with equal weights, as far as sums in another order allow."""
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (one, two)]
    assert [row["step"] for row in rows[1]] == list(range(1, steps + 1))
    losses = [[row["loss"] for row in found] for found in rows]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    trained, found = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert trained.keys() == found.keys()
    for name, value in trained.items():
        torch.testing.assert_close(found[name], value, atol=1e-3, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=() if name == "ddp" else pytest.mark.slow) for name in ENGINES]
)
def test_two_processes_train_like_one(one, settings, tmp_path, engine):
    parameters, own = ENGINES[engine]
    whole = TrainConfig(**settings, batch_size=4, output=str(tmp_path / "run"), **parameters)
    train_together(whole.changed(stage=1), whole)
    two = tmp_path / "run"
    assert json.loads((two / "scheme.json").read_text())["processes"] == 2

    assert (two / "checkpoint-6" / own).exists()
    trains_like(one, two, steps=6)
    losses = [row["loss"] for row in read_metrics(one / "metrics.jsonl")]
    assert min(losses) < losses[0] - 0.1  # it trains
    model, info = AutoModelForImageTextToText.from_pretrained(two, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.fixture(scope="module")
def of_all_kinds(clip_data, video_model, tmp_path_factory):
    """Stills, clips and text, each too few for a batch of their own: processes see different ones in one step."""
    opened = LlavaData(clip_data / "train.json")
    entries = [opened.entry(int(row)) for kind in (1, 2) for row in np.flatnonzero(opened.medium == kind)[:6]]
    turns = [{"from": "human", "value": "Which way does it move?"}, {"from": "gpt", "value": "up"}]
    entries += [{"id": f"text{i}", "conversations": turns} for i in range(4)]
    file = tmp_path_factory.mktemp("kinds") / "kinds.json"
    file.write_text(json.dumps(entries))
    return dict(model=str(video_model), data=str(file), images=str(clip_data), global_batch=8)


# Pairs of what differs most: each engine with a family or two, each family under one or more.
IN_TWO = {
    "ddp": ("video_llava", "smolvlm"),
    "zero2": ("internvl",),
    "zero3": ("video_llava", "qwen2_5_vl"),
    "fsdp2": ("video_llava", "internvl"),
}


@pytest.fixture(scope="module")
def alone(of_all_kinds, mixed, tmp_path_factory):
    """A function: the configuration of a family and its run in one process, trained once.

    Two stages on square, wide and tall pictures, several, and none; the last batch mixes them.
    """
    stages = [{"plan": "1:avgpool:2", "share": 0.5}, {"plan": "none", "share": 0.5}]
    shared = dict(align_steps=0, max_steps=4, log_steps=1, save_steps=0, warmup=0.0, learning_rate=5e-4, scheme=stages)

    @functools.cache
    def alone(name: str) -> tuple[TrainConfig, Path]:
        folder = tmp_path_factory.mktemp(name)
        own = of_all_kinds
        if name != "video_llava":
            own = dict(model=str(write(name, folder / "model")), data=str(mixed), global_batch=4)
        config = TrainConfig(output=str(folder / "run"), **shared, **own)
        return config, train(config.changed(batch_size=config.global_batch), progress=False)

    return alone


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "family"), [(engine, name) for engine, names in IN_TWO.items() for name in names])
def test_other_families_train_in_two_processes_as_in_one(alone, tmp_path, engine, family):
    """Clips, stills and text meet in one step of Video-LLaVA; its processes see different ones."""
    config, one = alone(family)
    parameters, own = ENGINES[engine]
    train_together(config.changed(output=str(tmp_path / "run"), batch_size=2, **parameters))
    assert json.loads((tmp_path / "run" / "scheme.json").read_text())["processes"] == 2
    assert (tmp_path / "run" / "checkpoint-4" / own.replace("step6", "step4")).exists()
    trains_like(one, tmp_path / "run", steps=4)


PYTHON = """#!{python}
import json, os, shutil, sys

with open("{folder}/child.json", "w") as file:
    json.dump([sys.argv[1:], dict(os.environ)], file)
shutil.copy(sys.argv[-1], "{folder}/child.yaml")
print("{says}")
sys.exit({code})
"""


@pytest.fixture
def torchrun(tmp_path, monkeypatch):
    """A function: what a launch starts in place of Python says so, and ends with a code."""

    def torchrun(says: str = "", code: int = 0) -> None:
        stub = tmp_path / "python"
        stub.write_text(PYTHON.format(python=sys.executable, folder=tmp_path, says=says, code=code))
        stub.chmod(0o755)
        monkeypatch.setattr("llavolta.train.launch.sys", SimpleNamespace(executable=str(stub)))

    return torchrun


def test_a_launch_starts_torchrun_with_the_configuration(torchrun, tmp_path):
    config = TrainConfig(output=str(tmp_path / "run"), stage=1, seed=3)
    torchrun()
    assert launch(config, 2) == tmp_path / "run"
    (*command, file), environment = json.loads((tmp_path / "child.json").read_text())
    group = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    assert command == [*group, "--standalone", "-m", "llavolta.train"] and not Path(file).exists()
    assert environment["LLAVOLTA_PROCESSES"] == "2"
    written = yaml.safe_load((tmp_path / "child.yaml").read_text())
    assert TrainConfig(**written) == config
    launch(config, 2, "--nnodes 3 --node_rank 1")
    (*command, _), environment = json.loads((tmp_path / "child.json").read_text())
    assert command == [*group, "--nnodes", "3", "--node_rank", "1", "-m", "llavolta.train"]
    assert environment["LLAVOLTA_PROCESSES"] == "6"


def test_a_launch_says_why_its_child_ended(torchrun, tmp_path):
    config = TrainConfig(output=str(tmp_path / "run"))
    torchrun("error: no data file x", 1)
    with pytest.raises(ConfigError, match="^training in 2 processes failed: no data file x$"):
        launch(config, 2)
    torchrun("stopped: SIGTERM stopped training after step 5", 1)
    with pytest.raises(Stopped, match="^SIGTERM stopped training after step 5$"):
        launch(config, 2)


LAUNCHERS = {
    "accelerate": ["accelerate", "launch", "--config_file", "{config}", "-m"],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--module"],
}
PROBE = """
import json, os, sys

with open(f"rank{os.environ['RANK']}.json", "w") as file:
    json.dump([sys.argv[1:], dict(os.environ)], file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_launchers_start_processes_as_training_expects_them(settings, tmp_path, launcher, monkeypatch, capsys):
    """The environment is that of the processes above; our command line takes the arguments."""
    (tmp_path / "probe.py").write_text(PROBE)
    config, file = tmp_path / "accelerate.yaml", tmp_path / "run.yaml"
    config.write_text(
        "distributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\nmachine_rank: 0\nnum_machines: 1\n"
    )
    file.write_text(yaml.safe_dump({**settings, "output": str(tmp_path / "run")}))
    scripts = Path(sys.executable).parent
    command = [part.format(config=config) for part in LAUNCHERS[launcher]]
    command = [sys.executable, str(scripts / command[0]), *command[1:], "probe", str(file)]
    path = f"{scripts}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": path, "PYTHONPATH": str(tmp_path)}
    out = subprocess.run(
        [*command, "--num-processes", "2"],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr[-3000:]
    for rank in range(2):
        given, found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert (found["LOCAL_RANK"], found["WORLD_SIZE"]) == (str(rank), "2")
        assert found["MASTER_ADDR"] and found["MASTER_PORT"]
    monkeypatch.setenv("WORLD_SIZE", "1")  # what training takes it for here
    monkeypatch.setenv("LLAVOLTA_PROCESSES", "1")
    assert main(given) == 1
    assert "error: 2 processes were asked for, but 1 came up" in capsys.readouterr().err


def test_a_launcher_that_started_too_few_processes_is_told_of(settings, tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**settings, "output": str(tmp_path / "run")}))
    monkeypatch.setenv("WORLD_SIZE", "1")  # as under a launcher
    monkeypatch.setenv("LLAVOLTA_PROCESSES", "1")  # set by the command line, and put back by this
    assert main([str(file), "--num-processes", "3", "--local_rank=0"]) == 1
    assert "error: 3 processes were asked for, but 1 came up" in capsys.readouterr().err


def test_deepspeed_finds_what_it_compiles_with(settings, tmp_path, monkeypatch):
    """It calls ninja, which pip puts beside this Python."""
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr("llavolta.train.run.prepare", lambda config: sys.exit())
    with pytest.raises(SystemExit):
        train(TrainConfig(**settings, deepspeed="zero2", output=str(tmp_path / "run")), progress=False)
    assert os.environ["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), "/usr/bin"]
