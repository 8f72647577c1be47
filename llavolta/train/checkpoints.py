"""Checkpoints that are either complete or absent, and the lock on a run folder.

A checkpoint is written to a staging folder together with the sizes of its files (seal.json),
flushed to disk, and then renamed. A checkpoint whose files have other sizes is damaged. The
finished model is made from the checkpoint at the end of its stage, and scheme.json is written last:
a run folder holds the model that its scheme.json describes.
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

from llavolta.errors import SaveError, UserError

STAGING = ".saving"  # folder of a save that is not complete
REMOVED = ".removed"  # folder of a checkpoint that is being removed
SEAL = "seal.json"  # sizes of a checkpoint's files
RECORD = "scheme.json"  # the step and scheme of a checkpoint or a finished model
LOCK = ".lock"
# torch.save raises RuntimeErrors with these words if a file could not be written.
_REFUSED = r"inline_container|PytorchStreamWriter|write\(\): fd"


def step_of(checkpoint: Path) -> int:
    """Return N, an optimizer step, for a folder checkpoint-N."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def checkpoints(run: Path) -> list[Path]:
    """List the checkpoints of a run folder, newest first, damaged ones among them."""
    prefix = PREFIX_CHECKPOINT_DIR + "-"
    found = [
        path
        for path in run.glob(prefix + "*")
        if path.is_dir() and path.name.removeprefix(prefix).isdigit()
    ]
    return sorted(found, key=step_of, reverse=True)


def newest(run: Path, say: Callable[[str], None]) -> Path | None:
    """Find the newest undamaged checkpoint of a run.

    Damaged checkpoints that are newer are renamed to damaged-checkpoint-N.

    Args:
        run: The run folder.
        say: Called with a message for each damaged checkpoint.

    Returns:
        The checkpoint; None if there is none.
    """
    for folder in checkpoints(run):
        damage = find_damage(folder)
        if damage is None:
            return folder
        aside = run / f"damaged-{folder.name}"
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        say(
            f"{folder} is damaged ({damage}) and is now {aside.name}; going on from the checkpoint "
            "before it"
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Check a checkpoint's files against the sizes that were saved with it.

    Returns:
        What is wrong, as the middle of a message; None if nothing is.
    """
    try:
        saved = json.loads((checkpoint / SEAL).read_text())
    except OSError:
        return f"it has no {SEAL}"
    except ValueError:
        return f"its {SEAL} cannot be read"
    sizes = _sizes(checkpoint)
    for name, size in saved.items():
        size = size if isinstance(size, int) else size[0]  # until 0.1: [size, checksum]
        if sizes.get(name) != size:
            return f"{name} is not as it was saved"
    return None


def publish(staged: Path, target: Path) -> None:
    """Move a complete checkpoint to its place, and replace the one that is there.

    The files are flushed to disk first, and their sizes are written to seal.json.

    Args:
        staged: The folder that the checkpoint was written to.
        target: Its place, on the same file system.
    """
    (staged / SEAL).write_text(json.dumps(_sizes(staged)))
    # A rename may reach the disk before the files' content does, so the files are flushed first.
    for path in (*staged.rglob("*"), staged):
        _flush(path)
    if target.exists():
        _remove(target)
    os.replace(staged, target)
    _flush(target.parent)


def prune(run: Path, keep: int, always: set[int]) -> None:
    """Remove old checkpoints of a run.

    Args:
        run: The run folder.
        keep: How many are kept, newest first, besides those of ``always``.
        always: Steps whose checkpoints are always kept.
    """
    for folder in [folder for folder in checkpoints(run) if step_of(folder) not in always][keep:]:
        _remove(folder)


def clear(run: Path) -> None:
    """Remove from a run folder what an interrupted save or removal left."""
    for name in (STAGING, REMOVED):
        shutil.rmtree(run / name, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint. If that is interrupted, the rest no longer has a checkpoint's name."""
    aside = checkpoint.parent / REMOVED
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(checkpoint, aside)
    shutil.rmtree(aside)


def install(staging: Path, record: Path, target: Path) -> None:
    """Move the files of a finished model into a run folder, the record last.

    Args:
        staging: The folder with the model's files; it is removed.
        record: The scheme.json of the checkpoint that the model was made from.
        target: The run folder.
    """
    # While the model is incomplete, no record says that it is there.
    (target / RECORD).unlink(missing_ok=True)
    for file in staging.iterdir():
        shutil.copymode(record, file)  # safetensors files are readable by their owner alone
        _flush(file)
        os.replace(file, target / file.name)
    shutil.copyfile(record, staging / RECORD)
    _flush(staging / RECORD)
    os.replace(staging / RECORD, target / RECORD)
    staging.rmdir()
    _flush(target)


def finished(run: Path, name: str, stages: list[dict], total: int) -> int:
    """Return the step whose finished model a run folder holds.

    Args:
        run: The run folder.
        name: Name of the scheme.
        stages: The scheme's stages; see ``Scheme.written``.
        total: Optimizer steps of the whole scheme.

    Returns:
        The optimizer step; 0 if there is no model, or that of another scheme.
    """
    try:
        held = json.loads((run / RECORD).read_text())
    except (OSError, ValueError):
        return 0
    same = (held["scheme"], held["stages"], held["total_steps"]) == (name, stages, total)
    return held["step"] if same else 0


@contextmanager
def saving(run: Path, name: str):
    """Turn the errors of a full disk inside of the block into a SaveError. Others pass.

    Args:
        run: The run folder.
        name: What is being saved, for the message.
    """
    try:
        yield
    except Exception as error:
        # Safetensors and torch.save raise errors of their own when a write fails. Other
        # RuntimeErrors have other causes, such as a process that died while the others saved.
        refused = isinstance(error, RuntimeError) and re.search(_REFUSED, str(error))
        if not (refused or isinstance(error, OSError) or type(error).__name__ == "SafetensorError"):
            raise
        shutil.rmtree(run / STAGING, ignore_errors=True)
        raise _save_error(error, name, run) from error


def _save_error(error: Exception, name: str, run: Path) -> SaveError:
    """Return the SaveError, with the free disk space and the newest checkpoint."""
    free = shutil.disk_usage(run).free / 1e9
    safe = next(
        (f"{folder.name} is safe" for folder in checkpoints(run)), "no checkpoint was saved before"
    )
    return SaveError(
        f"{name} could not be written to {run} ({str(error).splitlines()[0]}; {free:.1f} GB free); "
        f"{safe}. Make room and run again: training goes on from there"
    )


@contextmanager
def lock(run: Path):
    """Lock a run folder, which is created if need be, against other trainings.

    Raises:
        UserError: Another training has locked the folder.
    """
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
    """Return the bytes of every file below ``folder``, except seal.json."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)
    return {str(file.relative_to(folder)): file.stat().st_size for file in files}


def _flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
