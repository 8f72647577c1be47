"""What other packages print where nothing is wrong: bars of a second, notes on what is not installed or not used."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as of_transformers

NOTES = re.compile(
    "requires torchvision"  # its processors fall back to Pillow's
    "|is_gradient_checkpointing. is deprecated"  # peft's call
    "|Unable to fetch remote file"  # peft looks for the hub's copy of a local base
    "|Could not find a config file in"  # the same
)


@contextmanager
def quiet() -> Iterator[None]:
    """Without bars of transformers and without ``NOTES``; every other warning passes. Afterwards all is as it was."""
    of_transformers.get_verbosity()  # sets its handlers up
    handlers, bars = (
        [*logging.getLogger("transformers").handlers],
        of_transformers.is_progress_bar_enabled(),
    )

    def passes(record: logging.LogRecord) -> bool:
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
