"""Locate the files of the package.

In a checkout they are beside the package. In an installed package, shipped files lie inside it, and
written files go to ``LLAVOLTA_DATA`` or to the user's cache folder.
"""

from __future__ import annotations

import os
from pathlib import Path


def expand(path: str) -> str:
    """Return ``path`` with ~ replaced by the user's home folder.

    Environment variables stay as they are written.
    """
    return os.path.expanduser(path)


def given_path(path: str) -> Path:
    """Return the path that a command-line option gives.

    A shell does not replace the ~ of ``--output=~/runs``.
    """
    return Path(expand(path))


_PACKAGE = Path(__file__).resolve().parent
_SHIPPED = _PACKAGE / "shipped"  # filled by setup.py when a wheel is built
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")

ROOT = None if _SHIPPED.is_dir() else _PACKAGE.parent  # the checkout, None if installed
_WRITTEN = expand(os.environ.get("LLAVOLTA_DATA", ""))
DATA = Path(_WRITTEN or (ROOT / "data" if ROOT else _CACHE / "llavolta"))  # written files
RUNS = DATA / "runs"
PAPERS = (ROOT or Path.cwd()) / "papers"  # pages that commands write
TINY_LLAVA = ROOT / "data" / "tiny-llava" if ROOT else _SHIPPED / "tiny-llava"
PUBLISHED = ROOT / "papers" / "llavolta" / "published.csv" if ROOT else _SHIPPED / "published.csv"
# The projector and adapters of nano-tuned.
NANO_TUNED = ROOT / "data" / "nano-tuned" if ROOT else _SHIPPED / "nano-tuned"
# The drawings of the world "pictures".
PICTURES = ROOT / "data" / "pictures" if ROOT else _SHIPPED / "pictures"
