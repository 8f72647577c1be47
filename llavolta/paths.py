"""Where files are: beside the package in a checkout; where it is installed, what is shipped lies in it, and what it
writes goes to ``LLAVOLTA_DATA``, or the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def expand(path: str) -> str:
    """``path`` with ~ as the user's home folder; environment variables stay as they are written."""
    return os.path.expanduser(path)


def given_path(path: str) -> Path:
    """A path that a command line gives, where a shell leaves the ~ of ``--output=~/runs``."""
    return Path(expand(path))


_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = _PACKAGE / "shipped"  # filled by setup.py when a wheel is built
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")

ROOT = None if _SHIPPED.is_dir() else _PACKAGE.parent  # of the checkout
_WRITTEN = expand(os.environ.get("LLAVOLTA_DATA", ""))
DATA = Path(_WRITTEN or (ROOT / "data" if ROOT else _CACHE / "llavolta"))  # generated, and runs
RUNS = DATA / "runs"
PAPERS = (ROOT or Path.cwd()) / "papers"  # the pages that commands write
TINY_LLAVA = ROOT / "data" / "tiny-llava" if ROOT else _SHIPPED / "tiny-llava"
PUBLISHED = ROOT / "papers" / "llavolta" / "published.csv" if ROOT else _SHIPPED / "published.csv"
NANO_TUNED = (
    ROOT / "data" / "nano-tuned" if ROOT else _SHIPPED / "nano-tuned"
)  # its projector and adapters
PICTURES = (
    ROOT / "data" / "pictures" if ROOT else _SHIPPED / "pictures"
)  # drawings that scenes are made of
