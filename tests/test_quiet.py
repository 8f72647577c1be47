"""Where nothing is wrong, other packages' bars and notes stay away, and every other warning passes."""

from __future__ import annotations

import logging
import warnings

import pytest
from transformers.utils import logging as of_transformers

from llavolta.quiet import NOTES, quiet
from llavolta.train.config import TrainConfig
from llavolta.train.models import load_model
from llavolta.train.run import train


def test_named_notes_alone_are_left_out_and_all_is_as_it_was():
    handlers = logging.getLogger("transformers").handlers
    before = (
        of_transformers.is_progress_bar_enabled(),
        [[*handler.filters] for handler in handlers],
        warnings.filters[:],
    )
    with pytest.warns(UserWarning) as seen, quiet():
        assert not of_transformers.is_progress_bar_enabled()
        warnings.warn("Unable to fetch remote file due to the following error", stacklevel=1)
        warnings.warn("weights are missing", stacklevel=1)
    assert [str(one.message) for one in seen] == ["weights are missing"]
    with pytest.raises(KeyError), quiet():
        raise KeyError
    handlers = logging.getLogger("transformers").handlers
    after = of_transformers.is_progress_bar_enabled(), [[*handler.filters] for handler in handlers], warnings.filters[:]
    assert before == after or not before[1]


def test_a_run_with_adapters_shows_one_bar_a_phase_and_its_own_lines(scenes, small_model, tmp_path, capfd):
    data = dict(data=str(scenes / "train.json"), align_data=str(scenes / "align.json"))
    steps = dict(align_steps=1, max_steps=3, batch_size=4, log_steps=1)
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run = train(TrainConfig(output=str(tmp_path / "run"), model=str(small_model), lora_rank=2, **data, **steps))
        load_model(str(run))
    printed = "".join(capfd.readouterr())
    assert "100%" in printed and "stage 3 of 3" in printed
    assert not [text for text in ("Loading weights", "Writing model shards", "{'loss'") if text in printed]
    assert not NOTES.search(printed) and not [str(one.message) for one in seen if NOTES.search(str(one.message))]
