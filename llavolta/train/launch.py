"""Training in several processes: torchrun as a child, its output shown, its error raised here."""

from __future__ import annotations

import io
import os
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

from llavolta.errors import Stopped
from llavolta.train.config import ConfigError, TrainConfig
from llavolta.train.run import WANTED_PROCESSES, on_signals, train


def launch(config: TrainConfig, num_processes: int = 1, torchrun: str = "") -> Path:
    """Train in this process, or in several processes under torchrun.

    Each process has a GPU, or shares the CPU. On several machines, run the same call on each of
    them, with a run folder and data that all of them can reach.

    Args:
        config: The configuration of the run.
        num_processes: Processes on this machine.
        torchrun: torchrun's options for several machines, such as "--nnodes 2 --node_rank 0
            --rdzv_backend c10d --rdzv_endpoint HOST:29500".

    Returns:
        The run folder.

    Raises:
        ConfigError: The training failed, with the child's error; not all processes started; or an
            option is wrong.
        Stopped: SIGTERM, SIGHUP or Ctrl-C stopped the training after a step that was saved.
    """
    if isinstance(num_processes, bool) or not isinstance(num_processes, int) or num_processes < 1:
        raise ConfigError(
            f"num_processes must be a whole number of at least 1, not {num_processes!r}"
        )
    if num_processes == 1 and not (config.deepspeed or config.fsdp or torchrun):
        return train(config)
    options = shlex.split(torchrun) or ["--standalone"]
    # The processes read the configuration from a file that no other launch shares.
    handle, name = tempfile.mkstemp(suffix=".yaml", prefix="llavolta-")
    file = Path(name)
    with os.fdopen(handle, "w") as stream:
        yaml.safe_dump(config.model_dump(), stream)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={num_processes}",
        *options,
    ]
    environment = {
        **os.environ,
        WANTED_PROCESSES: str(num_processes * _machines(options)),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        # Seconds that torchrun leaves its processes to save a last checkpoint.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"),
    }
    child = subprocess.Popen(
        [*command, "-m", "llavolta.train", str(file)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        # A terminal sends Ctrl-C to its whole session; here only this process gets it, and passes
        # it on once.
        start_new_session=True,
    )
    lines: list[str] = []
    received: list[int] = []
    try:
        # newline="" passes the carriage returns of progress bars on.
        output = io.TextIOWrapper(child.stdout, errors="replace", newline="")
        with (
            on_signals(lambda signum: received.append(signum) or child.send_signal(signum)),
            output,
        ):
            for line in output:
                with suppress(OSError):  # the terminal is gone
                    print(line, end="", flush=True)
                lines = [*lines[-400:], line]
            failed = child.wait()
    finally:
        if child.poll() is None:  # a second Ctrl-C: end the processes at once
            for process in (*psutil.Process(child.pid).children(recursive=True), child):
                process.kill()
            child.wait()
        file.unlink(missing_ok=True)
    if stopped := re.search(r"(?:^|\s|\])stopped: (.*)", "".join(lines)):
        raise Stopped(stopped[1].strip(), *received[:1])
    if failed:
        raise ConfigError(f"training in {num_processes} processes failed: {_cause(lines)}")
    return Path(config.output)


def _machines(options: list[str]) -> int:
    """Return the number of machines in torchrun's options."""
    text = re.search(r"--nnodes[ =](\S+)", " ".join(options))
    if text and not text[1].isdigit():
        raise ConfigError(
            f"--nnodes must be one number, not {text[1]}: a stage's batches are the same on every "
            "run"
        )
    return int(text[1]) if text else 1


def _cause(lines: list[str]) -> str:
    """Return the child's own error, the signal that ended a process, or the last lines."""
    text = "".join(lines)
    # An error may stand after a progress bar on its line. torchrun ends the other processes with
    # signal 15 after one has failed, so that signal is the cause only if nothing else is found.
    raised = r"(?m)^(?:\[rank\d+\]: *)?([\w.]+Error: \S.*)"  # a traceback's end
    for pattern in (
        r"(?:^|\s|\])error: (.*)",
        r"traceback : (Signal (?!15\b).*)",
        raised,
        r"traceback : (Signal .*)",
    ):
        if found := re.search(pattern, text):
            return found[1].strip()
    return "".join(lines[-15:]).strip()
