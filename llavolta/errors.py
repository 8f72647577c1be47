"""The errors that are a user's to mend: one clear line, also in a notebook."""

from __future__ import annotations

import signal


class UserError(Exception):
    """A wrong parameter, plan, model or file. The message names the cause and the cure."""

    def __init__(self, message: object = ""):
        # torch raises a data-loading process's error anew, with that process's traceback for its message.
        text, mark = str(message), f"{type(self).__name__}: "
        super().__init__(
            text.rsplit(mark, 1)[1].strip()
            if text.startswith("Caught ") and mark in text
            else message
        )

    def _render_traceback_(self) -> list[str]:  # IPython shows this instead of a traceback
        return [f"{type(self).__name__}: {self}"]


class DataError(UserError, ValueError):
    """A data set, entry, picture or clip that cannot be used; the message names it and says what to do."""


class ConfigError(UserError, ValueError):
    """A training configuration, or a model, that cannot be used; the message names it and what it may be."""


class UnsupportedModel(UserError, TypeError):
    """A model, or a way of calling one, that cannot be compressed; the message says why."""


class Stopped(UserError):
    """A signal (``signum``) ended a training after a step, which was saved."""

    def __init__(self, message: object = "", signum: int = signal.SIGTERM):
        super().__init__(message)
        self.signum = signum
