"""Rotary positions under ``compress``: those of text against the stock model's."""

from __future__ import annotations

import pytest
import torch
from families_tiny import FAMILIES, IMAGE, VIDEO
from test_compress import packed
from tiny import example, in_turn, ragged_batch, tiny_llava

from llavolta import PlanError, UnsupportedModel, compress, parse_plan
from llavolta.compression.compressors import COMPRESSORS
from llavolta.compression.families import find_parts, has_3d_positions

QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
GREEDY = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
GREEDY["suppress_tokens"] = [IMAGE, VIDEO]
MERGING = ["avgpool", "avgpool2d", "avgpool3d", "restore"]  # a mean or median of positions


def rotated_by(model) -> list[torch.Tensor]:
    """Filled with the position_ids of each pass, as stock code calls its rotary embeddings."""
    found: list[torch.Tensor] = []

    def note(module, args, kwargs, output):
        found.append(kwargs.get("position_ids", args[-1]).clone())

    find_parts(model).rotary.register_forward_hook(note, with_kwargs=True)
    return found


def last_rows(handle) -> list:
    """Filled with what the rows of the last layer stand for, in each pass with images."""
    found: list = []

    def note(module, args):
        if handle._now.state is not None:
            found.append(handle._now.state.rows)

    handle.parts.layers[-1].register_forward_pre_hook(note)
    return found


def layers_of(name: str) -> list[int]:
    needs = COMPRESSORS[name].needs
    if {"class_token", "tower"} & needs:
        return [] if "class_token" in needs else [0]
    return [2] if "previous_layer" in needs else [0, 2]


@pytest.mark.parametrize(("family", "side"), in_turn(QWEN, ["left", "right"]))
@torch.no_grad()
def test_text_keeps_its_3d_positions(family, side):
    """Also behind images; what is left of these keeps its own, or takes a mean of them."""
    family = FAMILIES[family](side)
    model = family.model
    stock = rotated_by(model)
    model(**family.batch)
    [expected] = stock
    assert has_3d_positions(find_parts(model)) and len(expected) == 3
    ids = family.batch["input_ids"]
    visual, real = (ids == IMAGE) | (ids == VIDEO), family.batch["attention_mask"].bool()
    tried = 0
    for name in COMPRESSORS:
        for layer in layers_of(name):
            plan = "restore:calibration=0:divprune:0.5" if name == "restore" else example(name)
            plan = f"{layer}:{plan}"
            with compress(model, plan) as handle:
                rows = last_rows(handle)
                model(**family.batch)
            [rows] = rows
            for row in range(len(ids)):
                valid = rows.valid[row]
                column, found = rows.index[row][valid], rows.positions[row][valid]
                of_text = ~visual[row][column]
                assert (column[of_text] == (real[row] & ~visual[row]).nonzero()[:, 0]).all(), plan
                assert (found[of_text] == expected[:, row].T[column[of_text]]).all(), plan
                own = expected[:, row].T
                assert name in MERGING or (found == own[column]).all(), plan
                inside = own[visual[row]]  # a mean of positions is no further out than they are
                assert (found[~of_text] >= inside.amin(0)).all(), plan
                assert (found[~of_text] <= inside.amax(0)).all(), plan
            tried += 1
    assert tried > 25


@pytest.mark.parametrize(
    ("family", "plan"),
    in_turn(QWEN, ["0:divprune:0.5", "0:visionzip:4", "0:cls:0.5;2:random:0.5"]),
)
def test_generated_tokens_have_the_positions_of_stock(family, plan):
    family = FAMILIES[family]("left")
    model, prompt = family.model, {k: v for k, v in family.batch.items() if k != "labels"}
    found = rotated_by(model)
    stock = model.generate(**prompt, **GREEDY)
    expected, found[:] = list(found), []
    with compress(model, plan):
        fast = model.generate(**prompt, **GREEDY)
        cached, found[:] = list(found), []
        slow = model.generate(**prompt, **GREEDY, use_cache=False)
    assert stock.shape == fast.shape and (plan == "0:visionzip:4" or torch.equal(fast, slow))
    assert len(expected) == len(cached) == 3
    for one, other in zip(expected, cached, strict=True):
        assert torch.equal(one[..., -1], other[..., -1])


def test_what_3d_positions_leave_no_room_for_is_refused_at_once():
    model = FAMILIES["qwen2_5_vl"]().model
    for plan in ("0:divprune:0.5:contiguous", "0:cls:0.5:positions=contiguous"):
        with pytest.raises(UnsupportedModel, match="3-D positions.*positions=original"):
            compress(model, plan)
    with pytest.raises(UnsupportedModel, match="3-D positions.*prefix"):
        compress(model, "0:divprune:0.1", prefix=torch.nn.Identity())
    with compress(model, "0:divprune:0.5:original"):
        pass


@pytest.mark.parametrize("method", ["restore:divprune", "sparsevlm"])
def test_methods_that_leave_positions_do_not_take_contiguous(method):
    with pytest.raises(PlanError, match="leave positions=contiguous out"):
        parse_plan(f"0:{method}:0.5:contiguous")


def test_gaps_close_within_each_sample_of_a_packed_row():
    """Otherwise the second sample begins below zero."""
    parts = [ragged_batch([row], seed=seed) for seed, row in enumerate([[3, 6], [2, 0, 5], [1, 9]])]
    row = packed([{k: v for k, v in part.items() if k != "attention_mask"} for part in parts])
    with compress(tiny_llava(), "0:divprune:4") as handle:
        rows = last_rows(handle)
        handle.parts.top(**row, use_cache=False)
    lengths = [3 + 4 + 6, 2 + 4 + 4 + 5, 1 + 4 + 9]
    assert rows[0].positions[0, :, 0].tolist() == [p for length in lengths for p in range(length)]


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(QWEN)))
def test_elsewhere_auto_closes_up(name):
    """With 1-D positions the text has those of a text in which the shorter images stand."""
    family = FAMILIES[name]()
    with compress(family.model, "0:divprune:0.5") as handle:
        rows = last_rows(handle)
        family.model(**family.batch)
    for positions, valid in zip(rows[0].positions[..., 0], rows[0].valid, strict=True):
        found = positions[valid].tolist()
        assert found == list(range(found[0], found[0] + len(found)))
