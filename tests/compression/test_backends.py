"""Attention backends: each must give what sdpa gives, with padding, caches and several layers of compression."""

from __future__ import annotations

import pytest
import torch
from families_tiny import FAMILIES
from tiny import IMAGE, ragged_batch, tiny_llava
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from llavolta import compress
from llavolta.compression.masks import look_up_mask
from llavolta.errors import UnsupportedModel

RAGGED = [[3, 4], [2, 0, 5], [6]]
GREEDY = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, suppress_tokens=[IMAGE])
GREEDY |= dict(output_logits=True, return_dict_in_generate=True)


def flat_attention(module, query, key, value, mask, scaling=None, position_ids=None, **kwargs):
    """What flash attention computes, from what it is given: (B, S) padding mask or None, causal from the end.

    Like it, takes positions that do not rise by one for packed sequences if there is no mask.
    """
    assert mask is None or mask.dim() == 2
    if mask is None and position_ids is not None and query.shape[2] > 1:
        assert (position_ids.diff(dim=-1) == 1).all(), "positions with gaps would be taken for packed sequences"
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    queries, keys = query.shape[2], key.shape[2]
    seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if mask is not None:
        assert mask.shape == (query.shape[0], keys)
        seen = seen & mask.bool()[:, None, None]
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~seen, torch.finfo(query.dtype).min)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("flash_on_cpu", flat_attention)
AttentionMaskInterface.register("flash_on_cpu", flash_attention_mask)


@pytest.fixture(params=["eager", "flash_on_cpu", "flex_attention"])
def backend(request):
    """The name, in force in the decoder only; flex attention uncompiled, as compiling takes longer than all tests."""
    flex = request.param == "flex_attention"
    with torch.compiler.set_stance("force_eager" if flex else "default"), torch.set_grad_enabled(not flex):
        yield request.param


def use(model, attention: str):
    model.get_decoder().config._attn_implementation_internal = attention
    return model


def trained(attention: str, plan: str, side: str) -> tuple:
    """Logits without padding, the loss in evaluation and in training, gradients by name."""
    batch, model = ragged_batch(RAGGED, side=side), use(tiny_llava(layers=3), attention)
    with compress(model, plan):
        out = model(**batch)
        loss = model.train()(**batch).loss
    if torch.is_grad_enabled():
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return out.logits[batch["attention_mask"].bool()], out.loss, loss, gradients


@pytest.mark.parametrize(
    ("plan", "side"),
    [
        ("1:avgpool:3", "right"),
        ("0:avgpool:2;2:pyramiddrop:0.5", "left"),
        ("vision:avgpool:2", "left"),
        ("vision:prumerge:0.5", "right"),
    ],
)
def test_logits_loss_and_gradients(backend, plan, side):
    expected, found = trained("sdpa", plan, side), trained(backend, plan, side)
    assert bool(found[-1]) == torch.is_grad_enabled()  # flex attention has no backward on CPU
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("plan", ["1:avgpool:3", "0:avgpool:2;2:avgpool:2"])
def test_generation(backend, plan):
    batch, found = ragged_batch(RAGGED, side="left"), []
    del batch["labels"]
    for attention in ("sdpa", backend):
        with compress(model := use(tiny_llava(), attention), plan):
            found.append(model.generate(**batch, **GREEDY))
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[0].logits, found[1].logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [[[3, 4], [5, 2]], [[3, 4], [23]]])
def test_no_mask_at_all(backend, rows):
    """Rows equally long, so that there is no padding; compressed, they may differ."""
    batch, found = ragged_batch(rows), []
    assert batch.pop("attention_mask").all()
    for attention in ("sdpa", backend):
        with compress(model := use(tiny_llava(), attention), "1:avgpool:3"):
            found.append(model(**batch).logits)
            cache = model(**batch, use_cache=True).past_key_values
            found.append(model(input_ids=torch.full((2, 2), 9), past_key_values=cache).logits)
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"])
def test_families(backend, name):
    if name == "gemma3" and backend == "flash_on_cpu":
        pytest.skip("flash attention has no mask in which the tokens of one image see each other, stock or not")
    found = []
    for attention in ("sdpa", backend):
        family = FAMILIES[name]("left")
        with compress(use(family.model, attention), "1:avgpool:3"):
            found.append(family.model(**family.batch).loss)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_masks_are_looked_up_at_the_tokens_that_stay():
    query, key = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[0, 2, 4], [1, 3, 4]])
    valid = torch.tensor([[True, True, True], [True, False, True]])
    grid = torch.rand(2, 1, 4, 5) > 0.3
    expected = torch.stack([grid[b, 0][query[b]][:, key[b]] & valid[b] for b in range(2)])[:, None]
    assert torch.equal(look_up_mask(grid, query, key, valid, 0, False), expected)
    added = look_up_mask(torch.where(grid, 0.0, torch.finfo().min), query, key, valid, 0, False)
    assert torch.equal(added == 0, expected)
    flat = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert look_up_mask(flat, query, key, valid, 0, True).tolist() == [[0, 1, 1], [1, 0, 1]]
    assert look_up_mask(None, query, key[:, 1:], valid[:, 1:], 0, True) is None
    assert look_up_mask(None, query, key, valid, 0, True).tolist() == valid.long().tolist()
    causal = look_up_mask(None, query, key, valid, 1, False)
    assert causal[0, 0].tolist() == [[True, False, False], [True, True, False]]


def test_packed_samples_under_flash_attention_are_refused():
    model = use(tiny_llava(), "flash_on_cpu")
    batch = {name: value for name, value in ragged_batch([[3, 4]]).items() if name != "attention_mask"}
    length = batch["input_ids"].shape[1]
    packed = torch.cat([torch.arange(length - 3), torch.arange(3)])[None]
    with compress(model, "0:avgpool:2"), torch.no_grad():
        model(**batch, position_ids=torch.arange(length)[None])
        with pytest.raises(UnsupportedModel, match="flash attention tells packed samples apart"):
            model(**batch, position_ids=packed)
