"""Other families than LLaVA-1.5 trained through the same commands: stages, resumption, adapters, what is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families_tiny import FAMILIES
from huggingface_hub import ModelCard
from processors_tiny import CLIPS, WITH_PROCESSOR, write
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from transformers.utils import is_torchvision_available

from llavolta.compression.families import roles
from llavolta.cost.flops import cost_model
from llavolta.cost.planner import subject
from llavolta.data import Collator, LlavaData, token_statistics
from llavolta.data.collate import IGNORED
from llavolta.errors import ConfigError, DataError
from llavolta.train.config import TrainConfig
from llavolta.train.models import load_model
from llavolta.train.run import train
from llavolta.train.trainer import read_metrics

# What differs most: patches in a flat row that the tower merges, tiles, tiles between texts.
FEW = ("qwen2_5_vl", "internvl", "smolvlm")
EACH = [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in WITH_PROCESSOR]


@pytest.fixture(scope="module", params=EACH)
def family(request, tmp_path_factory):
    return write(request.param, tmp_path_factory.mktemp("family") / request.param)


@pytest.fixture(scope="module")
def settings(family, scenes, mixed):
    files = dict(data=str(mixed), align_data=str(scenes / "align.json"))
    return dict(model=str(family), **files, align_steps=1, max_steps=3, batch_size=4, log_steps=1)


def weights(folder) -> dict[str, torch.Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def test_labels_are_the_answers(family, mixed):
    (_, processor), data = load_model(str(family)), LlavaData(mixed)
    numbers = range(8)
    batch = Collator(processor)([data[number] for number in numbers])
    for row, number in enumerate(numbers):
        answers = [turn["value"] for turn in data.entry(number)["conversations"] if turn["from"] == "gpt"]
        said = batch["labels"][row][batch["labels"][row] != IGNORED]
        text = processor.tokenizer.decode(said, skip_special_tokens=True)
        assert text.split() == " ".join(answers).split()
        assert (said == processor.tokenizer.eos_token_id).sum() == len(answers)


def test_a_row_of_a_batch_has_the_loss_that_it_has_alone(family, mixed):
    """However its pictures are laid out among those of others: flattened patches, grids, tiles, padding."""
    (model, processor), data = load_model(str(family)), LlavaData(mixed)
    collate, examples = Collator(processor), [data[number] for number in range(4)]
    with torch.no_grad():
        together = collate(examples)
        loss = model(**together).loss * (together["labels"][:, 1:] != IGNORED).sum()
        alone = 0
        for example in examples:
            batch = collate([example])
            alone += model(**batch).loss * (batch["labels"][:, 1:] != IGNORED).sum()
    torch.testing.assert_close(loss, alone, rtol=1e-4, atol=1e-4)


def test_text_alone_with_a_black_picture_has_the_loss_of_the_text(family, mixed):
    (model, processor), data = load_model(str(family)), LlavaData(mixed)
    example = data[3]
    assert not example.images
    with torch.no_grad():
        plain = model(**Collator(processor)([example])).loss
        black = model(**Collator(processor, always_picture=True)([example])).loss
    torch.testing.assert_close(black, plain, rtol=1e-4, atol=1e-4)


def test_statistics_are_those_of_the_batches(family, mixed):
    (_, processor), data = load_model(str(family)), LlavaData(mixed)
    collate = Collator(processor)
    found = token_statistics(data, collate)
    batches = [collate([data[index]]) for index in range(len(data))]
    visual = [torch.isin(batch["input_ids"], collate._placeholders).sum().item() for batch in batches]
    pictures = sum(len(data[index].images) for index in range(len(data)))
    assert found.entries == len(data) == 24 and found.images == pictures / 24
    assert found.visual_tokens == pytest.approx(sum(visual) / pictures)
    written = [collate.text_tokens(data[index].messages) for index in range(len(data))]
    assert found.text_tokens == pytest.approx(sum(written) / 24)
    # What a processor writes around a picture comes on top; text alone is exact.
    alone = [index for index in range(len(data)) if not data[index].images]
    assert all(written[index] == batches[index]["input_ids"].shape[1] for index in alone)
    planned = subject(str(family), str(mixed))
    assert planned.statistics == found and planned.size == found.picture_size
    assert cost_model(planned.config).tokens_of(planned.pictures) == collate.picture_tokens(planned.size)


@pytest.fixture(scope="module")
def adapted(settings, tmp_path_factory):
    """A run with adapters: alignment, and three stages of a step."""
    output = tmp_path_factory.mktemp("runs") / "adapted"
    return train(TrainConfig(output=str(output), lora_rank=2, **settings), progress=False)


def moved(before: Path, after: Path) -> set[str]:
    """The roles of the weights that differ."""
    models = [load_model(str(folder))[0] for folder in (before, after)]
    one, other = (dict(model.named_parameters()) for model in models)
    role = roles(models[1])
    return {role.of(name) for name in other if not torch.equal(one[name], other[name])}


def test_adapters_move_the_language_model_and_the_projector_and_the_result_is_plain(adapted, settings):
    assert moved(adapted / "align", adapted) == {"projector", "language"}
    model, info = AutoModelForImageTextToText.from_pretrained(adapted, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = load_model(str(settings["model"]))[1]  # of sizes that are not the family's own
    for folder in (adapted / "align", *adapted.glob("checkpoint-*"), adapted):
        saved = load_model(str(folder))[1]
        assert saved.image_processor.to_dict() == processor.image_processor.to_dict()
        assert saved.chat_template == processor.chat_template
    card = ModelCard.load(adapted / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.base_model is None  # a folder of this machine
    assert "| 1 | `1:avgpool:8` | 1 |" in card.text and "| 3 | `none` | 1 |" in card.text
    rows = read_metrics(adapted / "metrics.jsonl")
    assert [row["stage"] for row in rows] == [1, 2, 3] and all(row["loss"] > 0 for row in rows)
    assert rows[0]["visual_tokens"] > rows[0]["tokens_per_layer"][-1] > 0


@pytest.mark.parametrize("family", FEW, indirect=True)
def test_a_run_that_goes_on_behind_its_first_stage_equals_the_whole(adapted, settings, tmp_path):
    aligned = {**settings, "model": str(adapted / "align"), "align_steps": 0}
    whole = train(TrainConfig(output=str(tmp_path / "whole"), **aligned), progress=False)
    for stage in (1, 3):
        train(TrainConfig(output=str(tmp_path / "run"), stage=stage, **aligned), progress=False)
    one, other = weights(whole), weights(tmp_path / "run")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert moved(adapted / "align", whole) == {"projector", "language"}


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision it reads clips")
@pytest.mark.parametrize("older", [False, True])
def test_settings_for_clips_outlive_a_processor_that_cannot_read_them(tmp_path, older):
    """In processor_config.json, or in a file of their own, as before transformers 5."""
    folder = write("qwen2_5_vl", tmp_path / "model")
    file = folder / "processor_config.json"
    held = json.loads(file.read_text())
    if older:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(held.pop("video_processor")))
        file.write_text(json.dumps(held))
    _, processor = load_model(str(folder))
    processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen2_5_VLProcessor"
    assert {name: saved["video_processor"][name] for name in CLIPS} == CLIPS
    with pytest.raises(DataError, match="pip install torchvision"):
        processor.video_processor([[]])


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision it is read")
def test_a_processor_that_needs_torchvision_is_named(tmp_path):
    FAMILIES["mistral3"]("right").model.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "PixtralProcessor"}))
    with pytest.raises(ConfigError, match="needs torchvision, which is not installed"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("family", FEW, indirect=True)
def test_four_bits(settings, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install 'llavolta[qlora]' to test 4 bits")
    run = train(TrainConfig(output=str(tmp_path / "run"), lora_rank=2, quantize="nf4", **settings), progress=False)
    assert {value.dtype for value in load_model(str(run))[0].parameters()} == {torch.float32}
    assert moved(run / "align", run) == {"projector", "language"}


def test_a_plan_that_the_model_cannot_do_is_told_before_alignment(tmp_path, scenes):
    data = dict(data=str(scenes / "train.json"), align_data=str(scenes / "align.json"))
    model = str(write("qwen2_5_vl", tmp_path / "qwen"))
    steps = dict(align_steps=2, max_steps=6, batch_size=4, scheme=["1:avgpool:2", "vision:avgpool:2"])
    with pytest.raises(ConfigError, match="^stage 2 of scheme 'custom', plan vision.*merges tokens itself"):
        train(TrainConfig(output=str(tmp_path / "run"), model=model, **data, **steps), progress=False)
    assert not read_metrics(tmp_path / "run" / "align" / "metrics.jsonl")
