"""Checkpoints that are whole or not there, and the lock that keeps two trainings out of one run folder.

A checkpoint is written aside, with the sizes of its files (seal.json), flushed to disk, and only then moved to its
name. One whose files have other sizes later is damaged. The finished model is made of the checkpoint at the end of
its stage, scheme.json last: a run folder whose scheme.json says so holds that model.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from llavolta.errors import UserError

STAGING = ".saving"
REMOVED = ".removed"
SEAL = "seal.json"
RECORD = "scheme.json"
LOCK = ".lock"
_REFUSED = r"inline_container|PytorchStreamWriter|write\(\): fd"  # how torch.save says that a file could not be written


class SaveError(UserError, OSError):
    """A checkpoint or model that could not be written; what was saved before it is untouched."""


def step_of(checkpoint: Path) -> int:
    """The optimizer step that ``checkpoint`` was saved after."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of the folder ``run``, newest first."""
    prefix = PREFIX_CHECKPOINT_DIR + "-"
    found = [
        path
        for path in run.glob(prefix + "*")
        if path.is_dir() and path.name.removeprefix(prefix).isdigit()
    ]
    return sorted(found, key=step_of, reverse=True)


def newest(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest sound checkpoint of ``run``; damaged ones are renamed to damaged-checkpoint-N and told of."""
    for folder in checkpoints(run):
        damage = find_damage(folder)
        if damage is None:
            return folder
        aside = run / f"damaged-{folder.name}"
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        say(
            f"{folder} is damaged ({damage}) and is now {aside.name}; going on from the checkpoint before it"
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Which file does not have the size that was saved, or None."""
    try:
        saved = json.loads((checkpoint / SEAL).read_text())
    except OSError:
        return f"it has no {SEAL}"
    except ValueError:
        return f"its {SEAL} cannot be read"
    sizes = _sizes(checkpoint)
    for name, size in saved.items():
        size = size if isinstance(size, int) else size[0]  # until 0.1 a checksum stood beside it
        if sizes.get(name) != size:
            return f"{name} is not as it was saved"
    return None


def publish(staged: Path, target: Path) -> None:
    """Write the sizes of the files in ``staged``, flush them, and move the folder to ``target``, in place of any."""
    (staged / SEAL).write_text(json.dumps(_sizes(staged)))
    for path in (*staged.rglob("*"), staged):
        _flush(path)
    if target.exists():
        _remove(target)
    os.replace(staged, target)
    _flush(target.parent)


def prune(run: Path, keep: int, always: set[int]) -> None:
    """Remove the checkpoints of ``run`` but the newest ``keep`` and those at the steps ``always``."""
    for folder in [folder for folder in checkpoints(run) if step_of(folder) not in always][keep:]:
        _remove(folder)


def clear(run: Path) -> None:
    """Remove from ``run`` what an interrupted save or removal left."""
    for name in (STAGING, REMOVED):
        shutil.rmtree(run / name, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint: it is whole or away from its name, whenever this is interrupted."""
    aside = checkpoint.parent / REMOVED
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    shutil.rmtree(aside)


def install(staging: Path, record: Path, target: Path) -> None:
    """Move the model files in ``staging`` into ``target``, then copy ``record``, which says that they are there."""
    (target / RECORD).unlink(missing_ok=True)
    for file in staging.iterdir():
        shutil.copymode(record, file)  # safetensors are written for their owner alone
        _flush(file)
        os.replace(file, target / file.name)
    shutil.copyfile(record, staging / RECORD)
    _flush(staging / RECORD)
    os.replace(staging / RECORD, target / RECORD)
    staging.rmdir()
    _flush(target)


def finished(run: Path, name: str, stages: list[dict], total: int) -> int:
    """The optimizer step whose model ``run`` holds, of the scheme ``name`` with ``stages``; 0 for none or another's."""
    try:
        held = json.loads((run / RECORD).read_text())
    except (OSError, ValueError):
        return 0
    same = (held["scheme"], held["stages"], held["total_steps"]) == (name, stages, total)
    return held["step"] if same else 0


@contextmanager
def saving(run: Path, name: str):
    """The errors of a full disk and its like as a SaveError that says what is safe."""
    try:
        yield
    except Exception as error:
        # Safetensors and torch.save have errors of their own for what the file system refused; another RuntimeError is
        # none of it, such as a process that died while the others were saving.
        refused = isinstance(error, RuntimeError) and re.search(_REFUSED, str(error))
        if not (refused or isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
            raise
        shutil.rmtree(run / STAGING, ignore_errors=True)
        raise _save_error(error, name, run) from error


def _save_error(error: Exception, name: str, run: Path) -> SaveError:
    free = shutil.disk_usage(run).free / 1e9
    safe = next(
        (f"{folder.name} is safe" for folder in checkpoints(run)), "no checkpoint was saved before"
    )
    return SaveError(
        f"{name} could not be written to {run} ({str(error).splitlines()[0]}; {free:.1f} GB free); {safe}. "
        "Make room and run again: training goes on from there"
    )


@contextmanager
def lock(run: Path):
    """Hold ``run`` against another training. Raises UserError if one is at work in it."""
    run.mkdir(parents=True, exist_ok=True)
    held = FileLock(run / LOCK)
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"another training is at work in {run}; wait for it, stop it, or name another output"
        ) from None
    try:
        yield
    finally:
        held.release()


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below ``folder`` but seal.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
