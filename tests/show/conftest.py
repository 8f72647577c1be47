from __future__ import annotations

from functools import partial

import pytest

from llavolta.studies import inspect


@pytest.fixture
def short_answers(monkeypatch):
    """Four tokens an answer: an untrained model does not end its own, and 56 would show no more."""
    monkeypatch.setattr(inspect, "view", partial(inspect.view, max_new_tokens=4))
