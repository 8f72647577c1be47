"""Tokens that leave for good, and tokens that weigh as much as several: against the stock layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import IMAGE, ragged_batch, tiny_llava

from llavolta import CompressedTokens, PlanError, UnsupportedModel, compress
from llavolta.compression.compressors import COMPRESSORS, Compressor
from llavolta.compression.plan import tokens_per_layer

ROWS = [[3, 4], [2, 1, 5], [6]]
sides = pytest.mark.parametrize("side", ["right", "left"])


def through(model, hidden, positions, first=0, last=None, bias=0):
    """hidden (T, C) behind layers first..last - 1, causally; bias (T, T) on the logits."""
    decoder = model.model.language_model
    mask = torch.full((len(hidden),) * 2, torch.finfo(torch.float).min).triu(1) + bias
    for layer in decoder.layers[first:last]:
        rotary = decoder.rotary_emb(hidden[None], positions[None])
        hidden = layer(hidden[None], attention_mask=mask[None, None], position_embeddings=rotary)[0]
    return hidden


def logits_of(model, hidden):
    return model.lm_head(model.model.language_model.norm(hidden))


def rows_of(model, batch: dict):
    """Of each row without padding: what layer 0 is given, positions, where the pictures are, and its columns."""
    hidden = model.model.get_input_embeddings()(batch["input_ids"]).detach()
    hidden[batch["input_ids"] == IMAGE] = torch.cat(
        list(model.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output)
    )
    for row, real in enumerate(batch["attention_mask"].bool()):
        yield hidden[row][real], real.nonzero()[:, 0], (batch["input_ids"][row] == IMAGE)[real], real


def logits_under(model, batch: dict, plan) -> torch.Tensor:
    with compress(model, plan):
        return model(**{name: value for name, value in batch.items() if name != "labels"}).logits


@sides
@pytest.mark.parametrize("layer", [0, 2])
@torch.no_grad()
def test_withdrawn_tokens_leave_the_text_alone(layer, side):
    model, batch = tiny_llava(), ragged_batch(ROWS, side=side)
    found = logits_under(model, batch, f"{layer}:withdraw")
    for row, (hidden, positions, visual, real) in enumerate(rows_of(model, batch)):
        hidden = through(model, hidden, positions, 0, layer)
        expected = logits_of(model, through(model, hidden[~visual], positions[~visual], layer))
        torch.testing.assert_close(found[row][real][~visual], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", ["1:withdraw", "0:avgpool:4;2:withdraw"])
@sides
def test_generation_is_the_same_with_and_without_a_cache(plan, side):
    model, batch = tiny_llava(), ragged_batch([[3, 4], [2, 5], [6]], side=side)
    del batch["labels"]
    with compress(model, plan):
        found, expected = (
            model.generate(
                **batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=cache, suppress_tokens=[IMAGE]
            )
            for cache in (True, False)
        )
    assert found.tolist() == expected.tolist()


def test_how_many_tokens_each_layer_has():
    assert tokens_per_layer("2:withdraw", 4, 16) == [16, 16, 0, 0]
    assert tokens_per_layer("0:avgpool:4;2:withdraw", 4, 16) == [4, 4, 0, 0]


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ("2:withdraw;3:avgpool:2", "nothing can follow"),
        ("vision:withdraw", "not at 'vision'"),
    ],
)
def test_plans_without_tokens_to_work_on_are_refused(plan, told):
    with pytest.raises(PlanError, match=told):
        compress(tiny_llava(), plan)


def test_a_row_of_pictures_alone_cannot_be_withdrawn():
    with pytest.raises(UnsupportedModel, match="pictures alone"):
        logits_under(tiny_llava(), ragged_batch([[0, 0], [1, 2]]), "1:withdraw")


@pytest.fixture
def weighty():
    """A compressor of pairs that says how many its tokens stand for, and how their attention is calibrated."""

    @dataclass(frozen=True)
    class Weighty(Compressor):
        calibration: float = 0.0
        name: ClassVar[str] = "weighty"

        def num_tokens(self, num_tokens):
            return -(-num_tokens // 2)

        def __call__(self, tokens):
            out = COMPRESSORS["avgpool"](2)(tokens)
            size = tokens.size[:, ::2] + tokens.size[:, 1::2]
            marks = torch.full_like(size, self.calibration)
            return CompressedTokens(out.hidden, out.mask, out.anchor, group=out.group, size=size, calibration=marks)

    yield Weighty
    del COMPRESSORS["weighty"]


@sides
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("calibration", [0.0, 2.0])
@torch.no_grad()
def test_tokens_that_stand_for_several_weigh_as_much(weighty, side, attention, calibration):
    model, batch = tiny_llava(attention=attention), ragged_batch(ROWS, side=side)
    found = logits_under(model, batch, {1: weighty(calibration), 3: weighty(calibration)})
    frequency = model.model.language_model.rotary_emb.inv_freq
    for row, (hidden, positions, visual, real) in enumerate(rows_of(model, batch)):
        hidden, size = through(model, hidden, positions, 0, 1), torch.ones(len(hidden))
        kept = torch.arange(len(hidden))
        for first, last in ((1, 3), (3, 4)):
            pairs = visual.nonzero()[:, 0].view(-1, 2)
            left = torch.ones_like(visual)
            left[pairs[:, 1]] = False
            hidden = hidden.index_copy(0, pairs[:, 0], hidden[pairs].mean(1))
            size = size.index_copy(0, pairs[:, 0], size[pairs].sum(1))
            hidden, size, positions, visual, kept = (x[left] for x in (hidden, size, positions, visual, kept))
            bias = size.log().expand(len(size), -1)
            if calibration:
                away = (positions[:, None] - positions).abs()[..., None] * frequency
                bias = bias + torch.where(visual, (calibration - away.cos().mean(-1)).log(), 0)
            hidden = through(model, hidden, positions, first, last, bias)
        torch.testing.assert_close(found[row][real][kept], logits_of(model, hidden), rtol=1e-4, atol=1e-5)


@sides
@pytest.mark.parametrize("calibration", [0.0, 2.0])
def test_weights_stay_in_a_cache(weighty, side, calibration):
    model, batch = tiny_llava(), ragged_batch([[3, 4], [2, 1, 5], [6]], side=side)
    del batch["labels"]
    with compress(model, {1: weighty(calibration), 3: weighty(calibration)}):
        found, expected = (
            model.generate(
                **batch,
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
                use_cache=cache,
                suppress_tokens=[IMAGE],
                return_dict_in_generate=True,
                output_logits=True,
            )
            for cache in (True, False)
        )
    assert found.sequences.tolist() == expected.sequences.tolist()
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_flex_attention_takes_no_weights(weighty):
    model, batch = tiny_llava(attention="flex_attention"), ragged_batch(ROWS)
    eager = torch.compiler.set_stance("force_eager")  # compiling takes seconds
    with eager, pytest.raises(UnsupportedModel, match="flex attention takes no bias.*sdpa"):
        logits_under(model, batch, {1: weighty()})
