"""What trains in which phase, in every family: roles are found in a model's structure, not by its names."""

from __future__ import annotations

import pytest
import torch
from families_tiny import FAMILIES
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from llavolta import compress
from llavolta.compression.families import roles, unwrap
from llavolta.train.config import ConfigError, TrainConfig
from llavolta.train.models import parameter_groups, save_plain, set_trainable, with_adapters

families = pytest.mark.parametrize("name", FAMILIES)
PROJECTORS = {
    "qwen2_vl": {"visual.merger"},
    "qwen2_5_vl": {"visual.merger"},
    "qwen3_vl": {"visual.merger", "visual.deepstack_merger_list"},
    "smolvlm": {"connector"},
    "idefics3": {"connector"},
    "llava_next": {"multi_modal_projector", "image_newline"},
    "llava_next_video": {"multi_modal_projector", "image_newline"},
    "llava_onevision": {"multi_modal_projector", "image_newline"},
}


def trained(model) -> dict[str, torch.Tensor]:
    """The gradients of one step, by name."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@families
def test_alignment_trains_the_projector_and_tuning_all_but_the_tower(name):
    """Unless the tower is to train, too."""
    family = FAMILIES[name]()
    model, role = family.model.train(), roles(family.model)
    expected = PROJECTORS.get(name, {"multi_modal_projector"})
    assert set(role.projector) == {f"model.{part}" for part in expected} and role.tower
    set_trainable(model, "align")
    model(**family.batch).loss.backward()
    moved = trained(model)
    assert moved and {role.of(key) for key in moved} == {"projector"}
    assert any(gradient.abs().max() > 0 for gradient in moved.values())
    for tower in (False, True):
        model.zero_grad()
        set_trainable(model, "instruct", tower)
        model(**family.batch).loss.backward()
        moved = {role.of(key) for key, gradient in trained(model).items() if gradient.abs().max() > 0}
        assert moved == {"projector", "language"} | ({"tower"} if tower else set())


def of_adapted(name: str) -> str:
    """The name of a weight before adapters were put around it."""
    return name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")


@families
def test_adapters_train_in_the_decoder_and_the_projector_trains_whole(name):
    family = FAMILIES[name]()
    role = roles(family.model)
    set_trainable(family.model.train(), "instruct")
    model = with_adapters(family.model, TrainConfig(output="none", lora_rank=2), "none")
    model(**family.batch).loss.backward()
    moved = trained(model)
    assert all("lora_" in key or "modules_to_save" in key for key in moved)
    whole = {key for key in moved if "modules_to_save" in key}
    assert whole and {role.of(of_adapted(key)) for key in whole} == {"projector"}
    assert all(role.of(of_adapted(key)) == "language" for key in moved.keys() - whole)
    assert unwrap(model) is family.model


@families
def test_each_part_trains_at_its_rate_and_the_others_at_the_runs(name):
    """Without adapters and with them."""
    model = FAMILIES[name]().model
    role, adapt = roles(model), TrainConfig(output="none", lora_rank=2, train_tower=True)
    set_trainable(model, "instruct", train_tower=True)
    for adapted in (False, True):
        model = with_adapters(model, adapt, "none") if adapted else model
        tuned = {key: p for key, p in model.named_parameters() if p.requires_grad}
        for rates in ({"tower": 1e-6, "projector": None}, {"tower": None, "projector": 1e-5}):
            groups = parameter_groups(model, 0.0, set(), rates)
            given = {id(p): group.get("lr") for group in groups for p in group["params"]}
            assert given == {id(p): rates.get(role.of(of_adapted(key))) for key, p in tuned.items()}
            assert len(set(given.values())) == 2


@pytest.mark.parametrize("plan", ["vision:cls:0.5", "0:visionzip:0.5"])
def test_a_plan_that_reads_a_tower_that_trains_beside_adapters(plan):
    family = FAMILIES["llava"]()
    with compress(family.model, plan):
        expected = family.model(**family.batch).loss
    model = with_adapters(family.model, TrainConfig(output="none", lora_rank=2, train_tower=True), "none")
    with compress(model, plan):
        assert torch.equal(model(**family.batch).loss, expected)  # new adapters change nothing


@families
def test_a_finished_model_has_the_names_and_dtype_that_transformers_writes(name, tmp_path):
    model = FAMILIES[name]().model.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "stock")
    model.save_pretrained(tmp_path / "checkpoint", save_original_format=False)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    save_plain(loaded, tmp_path / "ours")
    stock, ours = (load_file(tmp_path / folder / "model.safetensors") for folder in ("stock", "ours"))
    assert stock.keys() == ours.keys() and all(torch.equal(stock[key], ours[key]) for key in stock)
    assert {value.dtype for value in ours.values()} == {torch.bfloat16}


def test_a_model_whose_projector_cannot_be_found_says_so():
    model = FAMILIES["llava"]().model
    del model.model.multi_modal_projector
    with pytest.raises(ConfigError, match="no projector was found in its structure"):
        set_trainable(model, "align")
