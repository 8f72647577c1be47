"""Other families than LLaVA-1.5 trained through the same commands: stages, resumption, adapters, what is left."""

from __future__ import annotations

import pytest
import torch
from processors_tiny import WITH_PROCESSOR, write
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from llavolta.data import Collator, LlavaData
from llavolta.data.collate import IGNORED
from llavolta.train.config import TrainConfig
from llavolta.train.run import train
from llavolta.train.trainer import read_metrics


@pytest.fixture(scope="module", params=WITH_PROCESSOR)
def family(request, tmp_path_factory):
    return write(request.param, tmp_path_factory.mktemp("family") / request.param)


@pytest.fixture(scope="module")
def settings(family, scenes):
    files = dict(data=str(scenes / "train.json"), align_data=str(scenes / "align.json"))
    return dict(model=str(family), **files, align_steps=2, max_steps=6, batch_size=4, log_steps=1)


def weights(folder) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def test_labels_are_the_answers(family, scenes):
    processor, data = AutoProcessor.from_pretrained(family), LlavaData(scenes / "train.json")
    batch = Collator(processor)([data[0], data[1]])
    for row, number in enumerate((0, 1)):
        answers = [turn["value"] for turn in data.entry(number)["conversations"] if turn["from"] == "gpt"]
        said = batch["labels"][row][batch["labels"][row] != IGNORED]
        text = processor.tokenizer.decode(said, skip_special_tokens=True)
        assert text.split() == " ".join(answers).split()


def test_stages_one_by_one_equal_the_whole_and_the_result_is_plain(settings, tmp_path):
    whole = train(TrainConfig(output=str(tmp_path / "whole"), **settings), progress=False)
    for stage in (1, 2, 3):
        train(TrainConfig(output=str(tmp_path / "run"), stage=stage, **settings), progress=False)
    one, other = weights(whole), weights(tmp_path / "run")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    model, info = AutoModelForImageTextToText.from_pretrained(whole, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["stage"] for row in rows] == [1, 1, 2, 2, 3, 3] and all(row["loss"] > 0 for row in rows)


def test_adapters(settings, tmp_path):
    run = train(TrainConfig(output=str(tmp_path / "lora"), lora_rank=2, **settings), progress=False)
    before, after = weights(run / "align"), weights(run)
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert any("layers" in key for key in moved) and any("projector" in key or "connector" in key for key in moved)
    assert not any("vision" in key and "encoder" in key for key in moved)
