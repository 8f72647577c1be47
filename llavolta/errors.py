"""Define the errors that a user can mend.

Each has a message of one clear line, which a notebook shows without a traceback.
"""

from __future__ import annotations

import signal


class UserError(Exception):
    """A wrong parameter, plan, model or file. The message names the cause and the cure."""

    def __init__(self, message: object = ""):
        # torch raises an error of a data-loading process again, with the traceback as its message.
        # The message proper is the end of it.
        text, mark = str(message), f"{type(self).__name__}: "
        super().__init__(
            text.rsplit(mark, 1)[1].strip()
            if text.startswith("Caught ") and mark in text
            else message
        )

    def _render_traceback_(self) -> list[str]:  # IPython shows this in place of a traceback
        return [f"{type(self).__name__}: {self}"]


class DataError(UserError, ValueError):
    """A data set, entry, image or clip that cannot be used.

    The message names it and says what to do.
    """


class ConfigError(UserError, ValueError):
    """A training configuration or model that cannot be used.

    The message names the value and what it may be.
    """


class PlanError(UserError, ValueError):
    """A plan that cannot be read or does not fit the model; the message names what it may be."""


class SaveError(UserError, OSError):
    """A checkpoint or model that could not be written; what was saved before it is untouched."""


class UnsupportedModel(UserError, TypeError):
    """A model, or a way of calling it, that cannot be compressed. The message says why."""


class Stopped(UserError):
    """A signal ended a training after a step, which was saved.

    Attributes:
        signum: Number of the signal.
    """

    def __init__(self, message: object = "", signum: int = signal.SIGTERM):
        super().__init__(message)
        self.signum = signum
