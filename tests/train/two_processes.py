"""Processes that train together: forks of one that has imported the libraries, once for all."""

from __future__ import annotations

import os
import socket
import traceback
from multiprocessing import get_context
from multiprocessing.connection import wait

from llavolta.train.config import TrainConfig

# All that training imports, DeepSpeed by way of accelerate.
LIBRARIES = ["llavolta.train.run", "transformers.models.llava.modeling_llava", "deepspeed"]


def forks():
    """The context whose processes are forks of one that has imported what training needs."""
    context = get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return context


def train_together(*configs: TrainConfig, processes: int = 2, seconds: float = 600) -> None:
    """Train each configuration in turn in one group. Raises RuntimeError with a process's error."""
    context = forks()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values, errors = [config.model_dump() for config in configs], context.SimpleQueue()
    children = [
        context.Process(target=_train, args=(values, rank, processes, port, errors)) for rank in range(processes)
    ]
    try:
        for child in children:
            child.start()
        running = children
        while running and not any(child.exitcode for child in children):
            if not wait([child.sentinel for child in running], seconds):
                raise RuntimeError(f"{processes} processes took longer than {seconds} s")
            running = [child for child in children if child.is_alive()]
        if any(child.exitcode for child in children):
            codes = [child.exitcode for child in children]
            raise RuntimeError(errors.get() if not errors.empty() else f"exit codes {codes}")
    finally:
        for child in children:
            if child.pid:
                child.kill()
                child.join()


def _train(values: list[dict], rank: int, processes: int, port: int, errors) -> None:
    group = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes)
    group |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in group.items()})
    import torch

    from llavolta.train.run import train

    torch.set_num_threads(1)
    try:
        if any(value["deepspeed"] for value in values):
            _leave_out_what_is_compiled()
        for value in values:
            train(TrainConfig(**value), progress=False)
        torch.distributed.destroy_process_group()
    except BaseException:
        errors.put(f"process {rank}: {traceback.format_exc()}")
        raise


def _leave_out_what_is_compiled() -> None:
    """DeepSpeed compiles, for two minutes, what adds up small tensors within a machine."""
    from deepspeed.comm import torch as backend

    backend.build_shm_op = lambda: None
