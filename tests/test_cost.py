"""The cost model against torch's own count of operations."""

from __future__ import annotations

import pytest
import torch
from tiny import IMAGE, ragged_batch, tiny_llava
from torch.utils.flop_counter import FlopCounterMode

from llavolta import compress
from llavolta.cost import step_cost
from llavolta.train import set_trainable

BATCH = [[3, 9], [3, 9]]


def counted(model, batch, plan: str, backward: bool) -> int:
    with compress(model, plan, labelled_only=True), FlopCounterMode(display=False) as counter:
        loss = model(**batch).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("plan", ["none", "0:avgpool:4", "1:avgpool:3", "1:avgpool:2;2:avgpool:2"])
@pytest.mark.parametrize("phase", ["forward", "instruct", "align"])
def test_agrees_with_the_flop_counter_within_one_percent(plan, phase):
    model, batch = tiny_llava(attention="eager", grid=6).train(), ragged_batch(BATCH, grid=6)
    if phase != "forward":
        set_trainable(model, phase)
        model.model.get_input_embeddings().weight.requires_grad_(False)
    labelled = int((batch["labels"][:, 1:] != -100).sum()) + 1  # compress keeps one row to spare
    cost = step_cost(model.config, plan, text_tokens=12, labelled=labelled / 2, phase=phase)
    got = counted(model, batch, plan, backward=phase != "forward")
    assert 2 * cost.total == pytest.approx(got, rel=0.01)


def test_the_batch_is_what_the_cost_model_is_told():
    batch = ragged_batch(BATCH, grid=6)
    assert (batch["input_ids"] != IMAGE).sum(1).tolist() == [12, 12]
    assert torch.equal((batch["input_ids"] == IMAGE).sum(1), torch.tensor([36, 36]))


def test_7b_in_a_moment():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    clip = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=clip, text_config=LlamaConfig(vocab_size=32000))
    plain = step_cost(config, "none", text_tokens=60)
    # 6 N T for the decoder's 6.5e9 weights and 636 tokens, and some attention: within the usual rule of thumb.
    assert plain.linear == pytest.approx(6 * 6.476e9 * 636, rel=0.01)
    heavy = step_cost(config, "2:avgpool:8", text_tokens=60)
    assert 3.5 < plain.total / heavy.total < 4.5
