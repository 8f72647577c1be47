"""Two processes over gloo under each engine train like one: losses, resumption across a stage, the final folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from processors_tiny import write
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from llavolta.data import LlavaData
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

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed needs a C++ compiler: install g++")


def each(names) -> list:
    """The names of engines or launchers as parameters; DeepSpeed compiles what its processes talk through."""
    return [pytest.param(n, marks=needs_compiler if n.startswith(("zero", "deep")) else ()) for n in names]


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
    return {**values, "global_batch": 8, "log_steps": 1, "save_steps": 1, "warmup": 0.0, "learning_rate": 5e-4}


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


@pytest.mark.parametrize("engine", each(ENGINES))
def test_two_processes_train_like_one(one, settings, tmp_path, engine):
    parameters, own = ENGINES[engine]
    values = {**settings, "batch_size": 4, "output": str(tmp_path / "run"), **parameters}
    launch(TrainConfig(**values, stage=1), num_processes=2)
    two = launch(TrainConfig(**values), num_processes=2)
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
    values = dict(model=str(video_model), data=str(file), images=str(clip_data), align_steps=0, max_steps=4)
    stages = [{"plan": "1:avgpool:8", "share": 0.5}, {"plan": "none", "share": 0.5}]
    return {**values, "scheme": stages, "global_batch": 8, "log_steps": 1, "save_steps": 0, "learning_rate": 5e-4}


OTHER_FAMILIES = ("qwen2_5_vl", "internvl", "smolvlm")
TOGETHER = Path(__file__).with_name("two_processes.py")


def _of_family(name: str, folder: Path, mixed: Path, **parameters) -> TrainConfig:
    """Two stages on square, wide and tall pictures, several, and none; the last batch mixes them."""
    stages = [{"plan": "1:avgpool:2", "share": 0.5}, {"plan": "none", "share": 0.5}]
    values = dict(model=str(folder), data=str(mixed), align_steps=0, max_steps=6, scheme=stages, global_batch=4)
    steps = dict(log_steps=1, save_steps=0, warmup=0.0, learning_rate=5e-4)
    return TrainConfig(**values, **steps, **parameters)


@pytest.fixture(scope="module")
def together(of_all_kinds, mixed, tmp_path_factory):
    """By name: what differs from the defaults, examples of a step, and the run of one process."""
    configs = {"video_llava": TrainConfig(output="x", **of_all_kinds)}
    for name in OTHER_FAMILIES:
        model = write(name, tmp_path_factory.mktemp(name) / "model")
        configs[name] = _of_family(name, model, mixed, output="x")
    runs = {}
    for name, config in configs.items():
        output, whole = str(tmp_path_factory.mktemp(name) / "run"), config.global_batch
        runs[name] = config, train(config.changed(output=output, batch_size=whole), progress=False)
    return runs


@pytest.mark.parametrize("engine", each(ENGINES))
def test_other_families_train_in_two_processes_as_in_one(together, tmp_path, engine):
    """Clips, stills and text meet in one step of Video-LLaVA; its processes see different ones."""
    files, own = [], ENGINES[engine][0]
    for name, (config, _) in together.items():
        two = config.changed(output=str(tmp_path / name), batch_size=2, **own)
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(two.model_dump()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(TOGETHER)]
    out = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr[-3000:]
    for name, (config, one) in together.items():
        steps = config.max_steps
        assert json.loads((tmp_path / name / "scheme.json").read_text())["processes"] == 2
        assert any((tmp_path / name / f"checkpoint-{steps}").glob(ENGINES[engine][1].replace("step6", f"step{steps}")))
        trains_like(one, tmp_path / name, steps)


LAUNCHERS = {
    "torchrun": ["torchrun", "--nproc_per_node", "2", "-m"],
    "accelerate": ["accelerate", "launch", "--config_file", "{config}", "-m"],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--module"],
}


@pytest.mark.parametrize("launcher", each(LAUNCHERS))
def test_the_usual_launchers_start_as_many_processes_as_they_are_told(settings, tmp_path, launcher):
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        "distributed_type: MULTI_GPU\nuse_cpu: true\nnum_processes: 2\nmachine_rank: 0\nnum_machines: 1\n"
    )
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**settings, "batch_size": 4, "output": str(tmp_path / "run"), "save_steps": 0}))
    scripts = Path(sys.executable).parent
    command = [part.format(config=config) for part in LAUNCHERS[launcher]]
    command = [sys.executable, str(scripts / command[0]), *command[1:], "llavolta.train", str(file)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}

    def start(processes: int):
        last = ["--num-processes", str(processes)]
        return subprocess.run([*command, *last], env=environment, capture_output=True, text=True, timeout=300)

    out = start(2)
    assert out.returncode == 0, out.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "scheme.json").read_text())["processes"] == 2
    if launcher == "torchrun":
        out = start(3)
        assert out.returncode and "error: 3 processes were asked for, but 2 came up" in out.stderr
