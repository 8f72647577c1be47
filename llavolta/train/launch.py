"""Training in several processes: torchrun as a child process, its progress shown, its error raised here."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from llavolta.errors import Stopped
from llavolta.train.config import ConfigError, TrainConfig
from llavolta.train.run import WANTED_PROCESSES, on_sigterm, train


def launch(config: TrainConfig, num_processes: int = 1, torchrun: str = "") -> Path:
    """``train`` in this process, or in ``num_processes`` of this machine under torchrun (each a GPU, or the CPU).

    torchrun: options for several machines, such as "--nnodes 2 --node_rank 0 --rdzv_backend c10d --rdzv_endpoint
    HOST:29500"; run the same on each of them, with a run folder and data that all see. Raises ConfigError with the
    child's error if it fails, or if not all processes come up, and Stopped at SIGTERM.
    """
    if isinstance(num_processes, bool) or not isinstance(num_processes, int) or num_processes < 1:
        raise ConfigError(f"num_processes must be a whole number of at least 1, not {num_processes!r}")
    if num_processes == 1 and not (config.deepspeed or config.fsdp or torchrun):
        return train(config)
    options = shlex.split(torchrun) or ["--standalone"]
    # A file of this start alone: another one, on another machine too, has its own.
    handle, name = tempfile.mkstemp(suffix=".yaml", prefix="llavolta-")
    file = Path(name)
    with os.fdopen(handle, "w") as stream:
        yaml.safe_dump(config.model_dump(), stream)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", *options]
    environment = {
        **os.environ,
        WANTED_PROCESSES: str(num_processes * _machines(options)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"),  # a last checkpoint
    }
    child = subprocess.Popen(
        [*command, "-m", "llavolta.train", str(file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines: list[str] = []
    try:
        output = io.TextIOWrapper(child.stdout, errors="replace", newline="")  # with a progress bar's returns
        with on_sigterm(child.terminate), output:
            for line in output:
                print(line, end="", flush=True)
                lines = [*lines[-400:], line]
            failed = child.wait()
    finally:
        if child.poll() is None:  # this process is interrupted
            child.terminate()
            child.wait()
        file.unlink(missing_ok=True)
    if stopped := re.search(r"(?:^|\s|\])stopped: (.*)", "".join(lines)):
        raise Stopped(stopped[1].strip())
    if failed:
        raise ConfigError(f"training in {num_processes} processes failed: {_cause(lines)}")
    return Path(config.output)


def _machines(options: list[str]) -> int:
    text = re.search(r"--nnodes[ =](\S+)", " ".join(options))
    if text and not text[1].isdigit():
        raise ConfigError(f"--nnodes must be one number, not {text[1]}: a stage's batches are the same on every run")
    return int(text[1]) if text else 1


def _cause(lines: list[str]) -> str:
    """What ended the child: its own error, the signal that killed a process, or its last lines."""
    text = "".join(lines)
    # An error may follow a progress bar on its line. Signal 15 is torchrun's, to the processes that a failure leaves.
    raised = r"(?m)^(?:\[rank\d+\]: *)?([\w.]+Error: \S.*)"  # a traceback's end
    for pattern in (r"(?:^|\s|\])error: (.*)", r"traceback : (Signal (?!15\b).*)", raised, r"traceback : (Signal .*)"):
        if found := re.search(pattern, text):
            return found[1].strip()
    return "".join(lines[-15:]).strip()
