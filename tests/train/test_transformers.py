"""What is used of transformers without being public: a version that moves it is refused here, by name."""

from __future__ import annotations

import inspect
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers import AutoModelForImageTextToText, GenerationMixin, LlavaConfig, PreTrainedModel, Trainer

import llavolta

PRIVATE = {  # method: the parameters that our own, or our calls, give it
    Trainer._get_output_dir: ["trial"],
    Trainer._save_checkpoint: ["model", "trial"],
    Trainer._get_train_sampler: ["train_dataset"],
    Trainer._prepare_inputs: ["inputs"],
    Trainer._save: ["output_dir", "state_dict"],
    GenerationMixin._prefill: ["input_ids", "generation_config"],
    PreTrainedModel._from_config: ["config"],
}


@pytest.mark.parametrize("method", PRIVATE, ids=lambda method: method.__qualname__)
def test_private_methods_take_what_we_give(method):
    assert set(PRIVATE[method]) <= set(inspect.signature(method).parameters)


def test_private_attributes_are_there():
    assert LlavaConfig in AutoModelForImageTextToText._model_mapping
    assert "_attn_implementation" in dir(LlavaConfig())


def test_the_installed_version_is_within_the_cap():
    wanted = tomllib.loads((Path(llavolta.__file__).parent.parent / "pyproject.toml").read_text())["project"][
        "dependencies"
    ]
    cap = next(r for r in map(Requirement, wanted) if r.name == "transformers")
    assert any(part.operator == "<" for part in cap.specifier) and version("transformers") in cap.specifier
