"""Presets and what they ask for: true 7B shapes, learning rates by part, adapters, a model made of two parts."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import hypothesis
import pytest
import torch
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaForConditionalGeneration,
)

from llavolta.compression.families import find_parts, roles
from llavolta.cost.flops import cost_model
from llavolta.cost.references import REFERENCES, reference_config
from llavolta.data import Collator, LlavaData
from llavolta.errors import UserError
from llavolta.train import models
from llavolta.train.__main__ import main
from llavolta.train.build import prepare
from llavolta.train.config import PRESETS, ConfigError, TrainConfig, parse_yaml, preset
from llavolta.train.models import load_model, load_to_adapt, parameter_groups, set_trainable, with_adapters
from llavolta.train.run import train
from llavolta.train.trainer import StageTrainer, read_metrics
from llavolta.worlds import MODELS, backbones
from llavolta.worlds.joining import join


@pytest.fixture(scope="module")
def settings(scenes, small_model):
    """Parameters of a run of six steps, two a stage, after two of alignment."""
    return dict(
        model=str(small_model),
        data=str(scenes / "train.json"),
        align_data=str(scenes / "align.json"),
        align_steps=2,
        max_steps=6,
        batch_size=4,
        log_steps=1,
    )


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").state_dict()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def close(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all((a[key] - b[key]).abs().max() < 1e-6 for key in a)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_configuration(name):
    config = TrainConfig.from_preset(name, output="x")
    held = yaml.safe_load(PRESETS[name].read_text())
    assert {key: value for key, value in held.items() if getattr(config, key) != value} == {
        key: value for key, value in held.items() if isinstance(value, str) and key.endswith("rate")
    }  # 1e-3, which YAML reads as text


def test_the_7b_presets_have_the_published_hyperparameters():
    full, lora, tuned = (preset(f"llava-1.5-7b{suffix}") for suffix in ("", "-lora", "-hf"))
    config = TrainConfig(**full, output="x")
    assert (config.align_learning_rate, config.learning_rate) == (1e-3, 2e-5)
    assert (config.warmup, config.weight_decay, config.max_length, config.bf16) == (0.03, 0, 2048, True)
    assert config.batches("align", 8) == (32, 1) and config.batches("instruct", 8) == (16, 1)
    assert config.batches("instruct", 2) == (16, 4)  # fewer GPUs, the same global batch
    assert config.steps("align", 558_128, 8) == 2181 and config.steps("instruct", 665_298, 8) == 5198
    assert config.pad_to_square and config.gradient_checkpointing
    assert lora["lora_rank"] == 128 and float(lora["projector_learning_rate"]) == 2e-5
    changed = {"learning_rate", "lora_rank", "lora_alpha", "projector_learning_rate"}
    assert {key: value for key, value in lora.items() if key not in changed} == {
        key: value for key, value in full.items() if key not in changed
    }
    assert tuned["model"] == "llava-hf/llava-1.5-7b-hf" and not TrainConfig(**{**tuned, "output": "x"}).aligns


def test_the_published_scheme_of_the_7b_preset():
    config = TrainConfig.from_preset("llava-1.5-7b", output="x")
    scheme = config.resolve_scheme(32, 5198)
    assert [stage.plan for stage in scheme.stages] == ["2:avgpool:8", "2:avgpool:2", "16:avgpool:2", "none"]
    assert scheme.boundaries(5198) == (1300, 2599, 3898, 5198)


@pytest.fixture(scope="module")
def seven_billion():
    """LLaVA-1.5-7B without weights."""
    with torch.device("meta"):
        return LlavaForConditionalGeneration(reference_config("llava-1.5-7b"))


def test_the_shapes_of_7b(seven_billion):
    base = seven_billion.model
    assert base.config.image_seq_length == 576 and len(base.language_model.layers) == 32
    assert base.multi_modal_projector.linear_1.weight.shape == (4096, 1024)
    assert base.multi_modal_projector.linear_2.weight.shape == (4096, 4096)
    assert base.config.vision_feature_layer == -2


def trainable(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_what_of_7b_trains_in_each_phase(seven_billion):
    projector = (1024 + 1) * 4096 + (4096 + 1) * 4096
    set_trainable(seven_billion, "align")
    assert trainable(seven_billion) == projector == 20_979_712
    set_trainable(seven_billion, "instruct")
    tower = sum(parameter.numel() for parameter in seven_billion.model.vision_tower.parameters())
    everything = sum(parameter.numel() for parameter in seven_billion.parameters())
    assert trainable(seven_billion) == everything - tower and 3.0e8 < tower < 3.1e8
    set_trainable(seven_billion, "instruct", train_tower=True)
    assert trainable(seven_billion) == everything


def test_lora_of_7b_has_the_size_that_its_rank_says(seven_billion):
    config = TrainConfig.from_preset("llava-1.5-7b-lora", output="x")
    set_trainable(seven_billion, "instruct")
    adapted = with_adapters(seven_billion, config, "base")
    per_layer = 4 * (4096 + 4096) + 3 * (4096 + 11008)  # q, k, v, o; gate, up, down
    assert trainable(adapted) == 20_979_712 + 32 * 128 * per_layer
    assert not [name for name, p in adapted.named_parameters() if p.requires_grad and "vision_tower" in name]


def test_pivots_and_plans_as_a_list(settings, tmp_path):
    config = TrainConfig(output=str(tmp_path), scheme=["1:avgpool:8", "none"], pivots=[5], **settings)
    assert prepare(config).scheme.boundaries(6) == (5, 6)
    for pivots in ([0], [6], [2, 4]):
        with pytest.raises(ValueError, match="need 1 pivots rising from 0 to 6"):
            prepare(TrainConfig(output=str(tmp_path), scheme=["1:avgpool:8", "none"], pivots=pivots, **settings))


def test_compression_in_phase_1(lora, settings, tmp_path):
    run = train(TrainConfig(output=str(tmp_path / "a"), stage=0, align_plan="1:avgpool:8", **settings), progress=False)
    rows = read_metrics(run / "align" / "metrics.jsonl")
    assert {row["plan"] for row in rows} == {"1:avgpool:8"} and rows[0]["tokens_per_layer"] == [144, 18, 18, 18]
    plain = weights(lora / "align")  # adapters come behind it
    changed = {key for key, value in weights(run).items() if not torch.equal(value, plain[key])}
    assert changed and all("multi_modal_projector" in key for key in changed)


def test_learning_rates_by_part(settings, tmp_path, monkeypatch):
    seen = []
    create = StageTrainer.create_optimizer
    monkeypatch.setattr(StageTrainer, "create_optimizer", lambda *a: seen.append(create(*a)) or seen[-1])
    options = dict(projector_learning_rate=1e-5, train_tower=True, tower_learning_rate=1e-6, learning_rate=1e-3)
    own = {**settings, **options, "scheme": ["none"], "max_steps": 3}
    run = train(TrainConfig(output=str(tmp_path / "run"), **own), progress=False)
    assert {group["initial_lr"] for group in seen[-1].param_groups} == {1e-3, 1e-5, 1e-6}
    before, after = weights(run / "align"), weights(run)
    moved = {key: (after[key] - before[key]).abs().max().item() for key in after}
    parts = {part: max(m for key, m in moved.items() if part in key) for part in ("tower", "projector", "layers.0.mlp")}
    assert 0 < parts["tower"] < parts["projector"] / 3 < parts["layers.0.mlp"] / 9


def test_parameter_groups_hold_every_trained_weight_once(small_model):
    model, _ = load_model(str(small_model))
    set_trainable(model, "instruct")
    decayed = {name for name, p in model.named_parameters() if p.dim() > 1}
    groups = parameter_groups(model, 0.1, decayed, {"projector": 1e-5, "tower": None})
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {(group.get("lr"), group["weight_decay"]) for group in groups} == {
        (None, 0.0),
        (None, 0.1),
        (1e-5, 0.0),
        (1e-5, 0.1),
    }


@pytest.fixture(scope="module")
def lora(settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "lora"
    return train(TrainConfig(output=str(output), lora_rank=4, **settings), progress=False)


def test_lora_ends_in_a_plain_model(lora):
    """Language model and projector moved, the tower did not, and nothing of peft is left in the folder."""
    model, info = AutoModelForImageTextToText.from_pretrained(lora, output_loading_info=True)
    assert type(model) is LlavaForConditionalGeneration
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not (lora / "adapter_config.json").exists()
    before, after = weights(lora / "align"), weights(lora)
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert {key.split(".layers.")[0].split(".linear")[0] for key in moved} == {
        "model.language_model",
        "model.multi_modal_projector",
    }
    assert not [key for key in moved if "norm" in key or "embed" in key]


def test_a_lora_run_that_was_moved_goes_on_bit_for_bit(lora, settings, tmp_path):
    config = dict(lora_rank=4, **settings)
    train(TrainConfig(output=str(tmp_path / "run"), stage=1, **config), progress=False)
    held, _ = load_model(str(tmp_path / "run" / "checkpoint-2"))
    assert not isinstance(held, PeftModel)
    assert same(dict(held.state_dict()), load_model(str(tmp_path / "run"))[0].state_dict())
    shutil.move(tmp_path / "run", tmp_path / "moved")
    train(TrainConfig(output=str(tmp_path / "moved"), **config), progress=False)
    assert same(weights(lora), weights(tmp_path / "moved"))
    shutil.move(tmp_path / "moved", tmp_path / "again")  # also to show an earlier stage
    load_model(str(tmp_path / "again" / "checkpoint-2"))
    shutil.rmtree(tmp_path / "again" / "align")
    with pytest.raises(ConfigError, match=r"checkpoint-2 holds adapters of .*run/align, which is gone; put it"):
        load_model(str(tmp_path / "again" / "checkpoint-2"))


def test_adapters_are_trained_on(lora, settings, tmp_path):
    """A run from a folder of adapters goes on with them: one set of adapters of the same base."""
    held = lora / "checkpoint-2"
    settings = {**settings, "align_steps": 0, "max_steps": 2, "model": str(held), "scheme": ["none"]}
    run = train(
        TrainConfig(output=str(tmp_path / "run"), lora_rank=4, **{**settings, "learning_rate": 1e-12}), progress=False
    )
    last = run / f"checkpoint-{settings['max_steps']}"
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (held, last))
    assert close(before, after) and any("lora_B" in key and value.abs().max() > 0 for key, value in after.items())
    bases = [
        json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] for folder in (held, last)
    ]
    assert bases[0] == bases[1] == str(lora / "align")
    assert close(weights(run), load_model(str(held))[0].state_dict())
    run = train(TrainConfig(output=str(tmp_path / "on"), lora_rank=4, **settings), progress=False)
    after = load_file(run / last.name / "adapter_model.safetensors")
    assert before.keys() == after.keys() and not any(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("form", [dict(lora_rank=3), dict(lora_rank=4, lora_alpha=5)])
def test_adapters_of_another_form_are_merged_first(lora, settings, tmp_path, form):
    held = lora / "checkpoint-2"
    settings = {**settings, "align_steps": 0, "max_steps": 1, "model": str(held), "scheme": ["none"]}
    settings["learning_rate"] = 1e-12
    run = train(TrainConfig(output=str(tmp_path / "run"), **form, **settings), progress=False)
    assert close(weights(run), load_model(str(held))[0].state_dict())
    last = run / f"checkpoint-{settings['max_steps']}"
    settings = json.loads((last / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(held) and settings["r"] == form["lora_rank"]
    with pytest.raises(ConfigError, match=r"checkpoint-2 holds adapters, which cannot be merged into 4 bits"):
        load_to_adapt(str(last), TrainConfig(output="-", lora_rank=4, quantize="nf4"))


def test_a_name_is_not_taken_for_a_folder_that_is_called_so(small_model, tmp_path, monkeypatch):
    (tmp_path / "nano").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MODELS, "nano", lambda: small_model)
    model, _ = load_to_adapt("nano", TrainConfig(output="-", lora_rank=2))
    assert model.peft_config["default"].base_model_name_or_path == "nano"


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_damaged_adapters_are_named(lora, tmp_path, file):
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(lora / "checkpoint-2", folder)
    damaged = (folder / file).read_bytes()
    (folder / file).write_bytes(damaged[: len(damaged) // 2])
    with pytest.raises(ConfigError, match=r"adapters in .*checkpoint-2 cannot be read"):
        load_model(str(folder))
    with pytest.raises(ConfigError, match=r"adapters in .*checkpoint-2 cannot be read"):
        load_to_adapt(str(folder), TrainConfig(output="-", lora_rank=4))


def test_qlora_ends_in_a_plain_model_of_full_precision(settings, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install 'llavolta[qlora]' to test 4 bits")
    config = TrainConfig(output=str(tmp_path / "run"), lora_rank=4, quantize="nf4", **{**settings, "max_steps": 3})
    run = train(config, progress=False)
    before, after = weights(run / "align"), weights(run)
    assert all(value.dtype == torch.float32 for value in after.values()) and before.keys() == after.keys()
    moved = {key for key in after if not torch.equal(before[key], after[key])}
    assert any("language_model.layers" in key for key in moved) and not any("vision_tower" in key for key in moved)
    adapters = load_file(run / "checkpoint-3" / "adapter_model.safetensors")
    assert any("lora_B" in key and value.abs().max() > 0 for key, value in adapters.items())


@pytest.fixture(scope="module")
def parts(small_model, tmp_path_factory):
    """Folders of a CLIP tower with its image processor, and of a language model with a tokenizer without <image>."""
    folder = tmp_path_factory.mktemp("parts")
    model, processor = load_model(str(small_model))
    model.model.vision_tower.save_pretrained(folder / "tower")
    CLIPImageProcessor(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}).save_pretrained(
        folder / "tower"
    )
    backbones.language_model_of(model).save_pretrained(folder / "language")
    words = backbones.tokenizer()
    words.chat_template = None
    words.save_pretrained(folder / "language")
    settings = folder / "language" / "tokenizer_config.json"
    held = json.loads(settings.read_text())
    settings.write_text(json.dumps({key: value for key, value in held.items() if "special_tokens" not in key}))
    return folder


def test_a_model_of_two_parts_has_their_weights(parts, small_model):
    model, processor = join(str(parts / "tower"), str(parts / "language"))
    source, _ = load_model(str(small_model))
    for part in ("vision_tower", "language_model.layers"):
        assert same(dict(_part(model, part).state_dict()), dict(_part(source, part).state_dict()))
    text = processor.apply_chat_template(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "This."}]},
        ]
    )
    assert text.startswith("A chat between a curious user")
    assert text.endswith(" USER: <image>\nWhat? ASSISTANT: This.</s>")
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id


# As instruct models have them, which take a message's content for text: ChatML (SmolLM2, Qwen2) and Llama 3's.
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.mark.parametrize(("template", "end"), [(_CHATML, "<|im_end|>"), (_LLAMA3, "<|eot_id|>")])
@pytest.mark.parametrize("tied", [False, True])
def test_a_language_model_with_a_template_for_text_reads_pictures(parts, scenes, tmp_path, template, end, tied):
    """Its turns stay its own, its answers end as it ends them, and embeddings that are tied stay so."""
    language = AutoModelForCausalLM.from_pretrained(parts / "language")
    language.config.tie_word_embeddings = tied
    language.save_pretrained(tmp_path / "language")
    words = AutoTokenizer.from_pretrained(parts / "language")
    words.chat_template = template
    words.add_special_tokens({"eos_token": end})
    words.save_pretrained(tmp_path / "language")
    model, processor = join(str(parts / "tower"), str(tmp_path / "language"))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    example = LlavaData(scenes / "train.json")[0]
    batch = Collator(processor)([example])
    answers = [message["content"][0]["text"] for message in example.messages if message["role"] == "assistant"]
    told = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100])
    assert told.replace(" ", "").replace("\n", "") == "".join(f"{text}{end}" for text in answers).replace(" ", "")
    assert (batch["input_ids"] == processor.image_token_id).sum() == 144
    model(**batch).loss.backward()
    text = processor.apply_chat_template(example.messages)
    assert text == words.apply_chat_template(
        [
            {"role": m["role"], "content": "".join(p.get("text", "<image>\n") for p in m["content"])}
            for m in example.messages
        ],
        tokenize=False,
    )
    model.save_pretrained(tmp_path / "joined")
    processor.save_pretrained(tmp_path / "joined")
    again, _ = load_model(str(tmp_path / "joined"))
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    assert same(dict(model.state_dict()), again.state_dict())


def test_a_template_that_writes_no_picture_is_refused(parts, tmp_path):
    shutil.copytree(parts / "language", tmp_path / "language")
    words = AutoTokenizer.from_pretrained(parts / "language")
    words.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    words.save_pretrained(tmp_path / "language")
    with pytest.raises(ConfigError, match="writes no pictures"):
        join(str(parts / "tower"), str(tmp_path / "language"))


def _part(model, name: str):
    return model.model.get_submodule(name)


def test_a_model_of_two_parts_trains(parts, settings, tmp_path):
    own = {key: value for key, value in settings.items() if key != "model"} | {"max_steps": 3}
    whole = dict(vision_tower=str(parts / "tower"), language_model=str(parts / "language"))
    run = train(TrainConfig(output=str(tmp_path / "run"), **own, **whole), progress=False)
    assert AutoModelForImageTextToText.from_pretrained(run).config.image_seq_length == 144
    with pytest.raises(ConfigError, match="give both or neither"):
        TrainConfig(output="x", vision_tower="somewhere")
    with pytest.raises(ConfigError, match="not aligned"):
        TrainConfig(output="x", align_steps=0, **whole)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quantize": "int3", "lora_rank": 4}, "quantize must be 'nf4'"),
        ({"quantize": "nf4"}, "give a lora_rank above 0"),
        ({"tower_learning_rate": 1e-5}, "set train_tower"),
        ({"global_batch": 10}, "a global batch of 10 is no multiple of 4 examples in 1 processes"),
        ({"align_plan": "9:avgpool:2"}, "layer 9"),
        ({"scheme": []}, "scheme"),
        ({"bad_entries": "drop"}, "bad_entries must be 'fail' or 'skip'"),
        ({"bf16": "no"}, "bf16 must be a valid boolean or 'auto', not 'no'"),
        ({"pivots": ["a", 2]}, "pivots must be optimizer steps"),
    ],
)
def test_what_cannot_be(settings, tmp_path, change, match):
    with pytest.raises(ValueError, match=match):
        train(TrainConfig(output=str(tmp_path / "run"), **{**settings, **change}), progress=False)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(["none", "stf:2"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["plan", "share", 1]), inner),
    max_leaves=6,
)


@hypothesis.settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(list(TrainConfig.model_fields)), _VALUES, max_size=3))
def test_arbitrary_configurations_pass_or_raise_the_documented_error(values):
    try:
        config = TrainConfig(**{"output": "run", **values})
        config.resolve_scheme(8, 20)
        assert config.steps("instruct", 100, 1) >= 1
    except UserError as error:
        assert str(error)


@hypothesis.settings(max_examples=100, deadline=None)
@given(st.binary(max_size=30) | st.text("ab01-:. \n[]{}&*!#|>'\"?%@`=~<,\0é", max_size=30))
@example("!!timestamp x")
@example("!!int")
@example("2001-99-99")
@example("[" * 1000)
@example("a: &a [1]\nb: [*a, *a]")
def test_arbitrary_files_are_yaml_or_raise_the_documented_error(text):
    try:
        parse_yaml(text, "file.yaml")
    except ConfigError as error:
        assert str(error).startswith("file.yaml cannot be read as YAML")


PUBLISHED = {  # parameters of the checkpoints on the hub, in billions; decoder layers
    "llava-1.5-7b": (7.06, 32),
    "qwen2.5-vl-7b": (8.29, 28),
    "qwen3-vl-8b": (8.77, 36),
    "internvl3-8b": (7.94, 28),
    "smolvlm-500m": (0.507, 32),
    "llava-onevision-7b": (8.03, 28),
}


@pytest.fixture(scope="module", params=[name for name in REFERENCES if name != "llava-1.5-7b"])
def published(request):
    with torch.device("meta"):
        return request.param, AutoModelForImageTextToText.from_config(reference_config(request.param))


def test_presets_of_other_families_fit_the_published_shapes(published):
    """Found by structure in the true sizes: what trains, where adapters go, and where the scheme's layers come."""
    name, model = published
    size, depth = PUBLISHED[name]
    everything = sum(parameter.numel() for parameter in model.parameters())
    assert everything / 1e9 == pytest.approx(size, rel=0.002) and len(find_parts(model).layers) == depth
    found = next(p for p in PRESETS if p.startswith(name))
    config = TrainConfig.from_preset(found, output="x")
    assert config.model == REFERENCES[name].hub and not config.aligns
    stages = config.resolve_scheme(depth, 1000).stages
    layers = [int(stage.plan.split(":")[0]) for stage in stages if stage.plan != "none"]
    assert (
        len(stages) == 4 and stages[-1].plan == "none" and layers[0] == layers[1] < depth // 8 < layers[2] <= depth / 2
    )
    set_trainable(model, "instruct", config.train_tower)
    role = roles(model)
    parts = {of: 0 for of in ("projector", "tower", "language")}
    for parameter, value in model.named_parameters():
        parts[role.of(parameter)] += value.numel()
    assert trainable(model) == everything - (0 if config.train_tower else parts["tower"])
    assert parts["projector"] < parts["tower"] < parts["language"]
    if config.lora_rank:
        tuned = with_adapters(model, config, "x")
        layer_sides = sum(sizes.sides for sizes in cost_model(reference_config(name)).layers)
        assert trainable(tuned) == config.lora_rank * layer_sides + parts["projector"]


def test_every_model_of_a_preset_has_a_reference():
    hubs = {reference.hub for reference in REFERENCES.values()}
    models = {yaml.safe_load(file.read_text()).get("model") for file in PRESETS.values()}
    assert {name for name in models if name and "/" in name} <= hubs | {"LanguageBind/Video-LLaVA-7B-hf"}


def test_a_preset_from_the_command_line(settings, tmp_path, capsys):
    changes = [f"{name}={value}" for name, value in settings.items()]
    assert main(["embedded", "--output", str(tmp_path / "run"), "--stage", "1", "--set", *changes]) == 0
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 2
    assert main(["embeded", "--output", "x"]) == 1 and "embeded" in capsys.readouterr().err
    assert main(["embedded", "--output", "x", "--set", "seed"]) == 1 and "NAME=VALUE" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="unknown preset 'tiny'; choose from embedded"):
        preset("tiny")


def test_the_commands_of_the_reproduction_page_name_what_exists(monkeypatch):
    """Each ``python -m llavolta.train`` of papers/REPRODUCE.md comes to a configuration, and trains what it says."""
    page = (Path(__file__).parents[2] / "papers" / "REPRODUCE.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^\s*python -m llavolta\.train (.*)$", page, re.MULTILINE)
    seen = []
    monkeypatch.setattr("llavolta.train.__main__.launch", lambda config, *options: seen.append((config, *options)))
    for command in commands:
        assert main(command.replace("$scheme", "four-stage-wider").split()) == 0
    (align, processes, _), (tuned, *_), (video, *_) = seen
    assert align.stage == 0 and align.aligns and align.deepspeed == "zero2" and processes == 8
    assert tuned.scheme == "four-stage-wider" and not tuned.aligns and tuned.vision_tower is None
    assert tuned.batches("instruct", 8) == (16, 1) and align.batches("align", 8) == (32, 1)
    assert Path(tuned.model) == Path(align.output)
    assert video.model.endswith("Video-LLaVA-7B-hf") and not video.aligns and video.batches("instruct", 8) == (16, 1)


def test_what_is_no_vision_language_model_is_named_in_one_line(parts, small_model, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_llama", "mm_vision_tower": "clip"}))
    cut = tmp_path / "cut"
    shutil.copytree(small_model, cut)
    os.truncate(cut / "model.safetensors", 5000)
    wrong = {tmp_path: "LLaVA's original format.*llava-hf/", parts / "language": "without pictures", cut: "is damaged"}
    for folder, match in wrong.items():
        with pytest.raises(ConfigError, match=match) as caught:
            load_model(str(folder))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        if folder != cut:
            with pytest.raises(ConfigError, match=match):
                prepare(TrainConfig(output="x", model=str(folder)))


def test_engines_need_a_launcher(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    for engine in ({"deepspeed": "zero3"}, {"fsdp": "fsdp2"}):
        with pytest.raises(ConfigError, match="needs a launcher"):
            train(TrainConfig(output=str(tmp_path / "run"), **engine), progress=False)


def test_whatever_a_parameter_is_given_is_taken_or_refused_in_one_line(scenes, tmp_path):
    wrong = [1.5, 1, True, "x", "", [], ["none"], [1], [[1]], [None], {}, {"a": 1}, None, -1, 0, "1e-3", 10**30]
    plain = dict(output=str(tmp_path), data=str(scenes / "train.json"))
    for name in TrainConfig.model_fields:
        for value in [*wrong, float("nan"), float("inf")]:
            try:
                prepare(TrainConfig(**plain | {name: value}))
            except UserError as error:
                assert len(str(error)) < 400, name
            except Exception as error:
                pytest.fail(f"{name}: {value!r}: {error!r}")


def test_a_processor_without_patch_size_is_told_what_to_add(small_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(small_model, folder)
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "patch_size": None}))
    with pytest.raises(ConfigError, match=r'model/processor_config.json has no patch_size; add "patch_size": 8'):
        load_model(str(folder))


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_where_it_is_fast(settings, tmp_path, monkeypatch, fast):
    """Without instructions for it, bfloat16 takes several times as long as float32 on a CPU."""
    monkeypatch.setattr(models, "has_bfloat16", lambda: fast)
    begun = []
    monkeypatch.setattr(StageTrainer, "train", lambda self, **_: begun.append(self.args.bf16) or sys.exit())
    for chosen, expected in (("auto", fast), (True, True), (False, False)):
        with pytest.raises(SystemExit):
            train(TrainConfig(output=str(tmp_path / str(chosen)), bf16=chosen, **settings | {"align_steps": 0}), False)
        assert begun.pop() is expected
