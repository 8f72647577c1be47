"""Silence output of other packages that tells a user nothing.

These are progress bars of a second, and notes on what is not installed or not used.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as of_transformers

NOTES = re.compile(
    "requires torchvision"  # transformers' processors fall back to Pillow
    "|is_gradient_checkpointing. is deprecated"  # a call inside peft
    "|Unable to fetch remote file"  # peft looks on the hub for a base model that is a local folder
    "|Could not find a config file in"  # the same
)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars of transformers, and messages that match ``NOTES``.

    Every other warning passes. All settings are restored at the end.
    """
    of_transformers.get_verbosity()  # makes transformers set up its handlers
    handlers, bars = (
        [*logging.getLogger("transformers").handlers],
        of_transformers.is_progress_bar_enabled(),
    )

    def passes(record: logging.LogRecord) -> bool:
        """Return whether a log record may be shown."""
        return not NOTES.search(record.getMessage())

    try:
        for handler in handlers:
            handler.addFilter(passes)
        if bars:
            of_transformers.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", f"(?s).*({NOTES.pattern})")
            yield
    finally:
        if bars:
            of_transformers.enable_progress_bar()
        for handler in handlers:
            handler.removeFilter(passes)
