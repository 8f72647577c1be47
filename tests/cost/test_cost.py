"""The cost model against torch's own count of operations, and against what autograd keeps."""

from __future__ import annotations

import pytest
import torch
from families_tiny import FAMILIES
from tiny import IMAGE, example, in_turn, places, ragged_batch, tiny_llava
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, BertConfig, CLIPVisionConfig, LlamaConfig, LlamaModel, LlavaConfig

from llavolta import UnsupportedModel, cache_bytes, compress
from llavolta.compression.compressors import COMPRESSORS
from llavolta.compression.families import find_parts
from llavolta.cost.flops import PARTS, cost_model, step_cost
from llavolta.cost.references import reference_config
from llavolta.paths import TINY_LLAVA
from llavolta.train.config import TrainConfig
from llavolta.train.models import set_trainable, with_adapters

BATCH = [[3, 9], [3, 9]]


def counted(model, batch, plan: str, backward: bool) -> int:
    with compress(model, plan, labelled_only=True), FlopCounterMode(display=False) as counter:
        loss = model(**batch).loss
        if backward:
            loss.backward()
    return counter.get_total_flops()


def rows(batch) -> float:
    """Rows of logits per example; compress keeps one to spare."""
    return (int((batch["labels"][:, 1:] != -100).sum()) + 1) / len(batch["labels"])


@pytest.mark.parametrize(
    ("plan", "phase"),
    in_turn(
        ["none", "0:avgpool:4", "1:avgpool:3", "1:avgpool:2;2:avgpool:2"],
        ["align", "forward", "instruct"],
        cases=6,
    ),
)
def test_agrees_with_the_flop_counter_within_one_percent(plan, phase):
    model, batch = tiny_llava(attention="eager", grid=6).train(), ragged_batch(BATCH, grid=6)
    if phase != "forward":
        set_trainable(model, phase)
        model.model.get_input_embeddings().weight.requires_grad_(False)
    cost = step_cost(model.config, plan, text_tokens=12, labelled=rows(batch), phase=phase)
    assert 2 * cost.total == pytest.approx(counted(model, batch, plan, backward=phase != "forward"), rel=0.01)


@pytest.fixture(scope="module")
def counting():
    """A model that trains all its parts, and a batch with questions of several words."""
    model = tiny_llava(attention="eager", grid=6, layers=2).train()
    batch = ragged_batch([[3, 19]] * 2, grid=6)
    set_trainable(model, "instruct", train_tower=True)
    model.model.get_input_embeddings().weight.requires_grad_(False)
    return model, batch


EXACT = {"prumerge": ":0.25", "prumerge+": ":0.25", "pact": ":0.55:0"}  # not by the picture
UNEVEN = {"sparsevlm": 0.04}  # whose raters the picture chooses


@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_the_products_of_every_compressor_are_counted(counting, name):
    model, batch = counting
    text = f"{name}{EXACT[name]}" if name in EXACT else str(example(name))
    for place, backward in in_turn(places(name), [True, False]):  # all passes at one, forward at the other
        how = dict(train_tower=True) if backward else dict(phase="forward")
        cost = step_cost(model.config, f"{place}:{text}", 22, labelled=rows(batch), **how)
        got = counted(model, batch, f"{place}:{text}", backward)
        assert 2 * cost.total == pytest.approx(got, rel=UNEVEN.get(name, 1e-4)), place
        assert (cost.compressor.total > 0) == (name not in WITHOUT_PRODUCTS)


WITHOUT_PRODUCTS = ["avgpool", "avgpool2d", "avgpool3d", "loudest", "random", "withdraw"]


@pytest.mark.parametrize("plan", ["0:cls:0.5", "0:divprune:3;2:fastv:0.5", "0:visionzip:3"])
def test_products_of_a_model_with_a_tower_of_packed_patches(plan):
    family = FAMILIES["qwen2_5_vl"](attention="eager")
    batch = {k: v[:1] for k, v in family.batch.items() if "video" not in k}
    real = batch["attention_mask"][0].bool()
    batch = {k: v[:, real] if v.shape[-1] == len(real) else v for k, v in batch.items()}
    batch["pixel_values"] = family.batch["pixel_values"][:32]  # of the first image, 8 x 4 patches
    del batch["labels"]
    with compress(family.model, plan), FlopCounterMode(display=False) as counter:
        family.model(**batch)
    pictures = {k: batch[k] for k in ("pixel_values", "image_grid_thw")}
    cost = step_cost(family.model.config, plan, 7, labelled=15, phase="forward", pictures=pictures)
    assert cost.total == pytest.approx(counter.get_total_flops(), rel=2e-3)


@pytest.mark.parametrize("change", ["checkpointing", "train_tower", "lora_rank"])
def test_other_ways_to_train_agree_with_the_flop_counter(change):
    model, batch = tiny_llava(attention="eager", grid=6).train(), ragged_batch(BATCH, grid=6)
    set_trainable(model, "instruct", train_tower=change == "train_tower")
    model.model.get_input_embeddings().weight.requires_grad_(False)
    options = {change: 8 if change == "lora_rank" else True}
    if change == "checkpointing":
        model.gradient_checkpointing_enable()
    if change == "lora_rank":
        model = with_adapters(model, TrainConfig(output="x", lora_rank=8), "base")
    config = model.config if change != "lora_rank" else model.get_base_model().config
    cost = step_cost(config, "1:avgpool:3", text_tokens=12, labelled=rows(batch), **options)
    got = counted(model, batch, "1:avgpool:3", backward=True)
    if change == "checkpointing":
        assert cost.linear.recomputed == cost.linear.forward and cost.attention.recomputed == cost.attention.forward
    assert 2 * cost.total == pytest.approx(got, rel=0.01)


def longest(family, plan: dict[int, int], depth: int) -> list[int]:
    """By hand: tokens of the longest row at each layer, which is what the batch is padded to; see Family."""
    real = family.batch["attention_mask"].sum(1).tolist()
    text = [total - sum(n for _, n in units) for total, units in zip(real, family.clips, strict=True)]
    units, lengths = [[n for _, n in row] for row in family.clips], []
    for layer in range(depth):
        if layer in plan:
            units = [[-(-n // plan[layer]) for n in row] for row in units]
        lengths.append(max(t + sum(row) for t, row in zip(text, units, strict=True)))
    return lengths


PLANS = [{}, {1: 4}, {0: 2, 2: 2}]
QUICK = in_turn(list(FAMILIES), PLANS, [[False], [True]])  # one plan a family, half of them backward
MORE = in_turn(list(FAMILIES), [*PLANS[1:], PLANS[0]], [[False, True]])


@pytest.mark.parametrize(
    ("name", "plan", "passes"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)],
)
def test_every_family_agrees_with_the_flop_counter(name, plan, passes):
    family = FAMILIES[name](attention="eager")
    family.model.train()
    find_parts(family.model).decoder.get_input_embeddings().weight.requires_grad_(False)
    text = ";".join(f"{layer}:avgpool:{stride}" for layer, stride in plan.items()) or "none"
    model = cost_model(family.model.config)
    pictures = {key: value for key, value in family.batch.items() if key not in ("labels", "attention_mask")}
    for backward in passes:
        phase = "instruct" if backward else "forward"
        lengths = longest(family, plan, len(model.layers))
        if not plan:
            lengths = [family.batch["input_ids"].shape[1]] * len(lengths)
        parts = model.step(phase=phase, pictures=pictures, train_tower=backward, labelled=2 * rows(family.batch))
        decoder = sum(part.total for part in model.decoder(lengths, phase))
        cost = parts.tower.total + parts.projector.total + parts.head.total + 2 * decoder
        assert cost == pytest.approx(counted(family.model, family.batch, text, backward), rel=0.01)


def test_the_batch_is_what_the_cost_model_is_told():
    batch = ragged_batch(BATCH, grid=6)
    assert (batch["input_ids"] != IMAGE).sum(1).tolist() == [12, 12]
    assert torch.equal((batch["input_ids"] == IMAGE).sum(1), torch.tensor([36, 36]))


def test_parameters_and_visual_tokens_are_those_of_the_model():
    config = AutoConfig.from_pretrained(TINY_LLAVA)
    model = cost_model(config)
    assert model.visual == 144 and cost_model(config) is model
    assert model.parameters["projector"] == 2 * (128 * 128 + 128)
    assert 4.9e6 < sum(model.parameters.values()) * 2 < 5.1e6  # the shipped half-precision file


def test_7b_without_weights():
    model = cost_model(reference_config("llava-1.5-7b"))
    assert model.visual == 576 and model.parameters["projector"] == 20_979_712
    plain = model.step("none", text_tokens=60)
    # 6 N T for the decoder's 6.476e9 weights and 636 tokens: the usual rule of thumb.
    assert plain.linear.total == pytest.approx(6 * 6.476e9 * 636, rel=0.001)
    assert plain.tower.forward == pytest.approx(2 * 0.303e9 * 577, rel=0.15) and plain.tower.backward == 0
    assert 3.5 < plain.total / model.step("2:avgpool:8", text_tokens=60).total < 4.5
    assert model.cache_bytes([636] * 32) == 32 * 636 * 2 * 4096 * 2
    memory = model.state_bytes("instruct", element=2)
    assert memory["weights"] == 2 * 7_063_427_072 and memory["optimizer"] == 12 * (7_063_427_072 - 303_507_456)


def saved_bytes(layers, *args, **kwargs) -> int:
    """Bytes of the distinct tensors that autograd keeps of a pass, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in layers.parameters()}
    held: dict[int, torch.Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.setdefault(id(t), t), lambda t: t):
        output = layers(*args, **kwargs)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held.values()}
    assert output is not None
    return sum(size for pointer, size in storages.items() if pointer not in weights)


@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activation_memory_is_what_autograd_keeps(dtype, element):
    text = LlamaConfig(
        hidden_size=64, intermediate_size=172, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    clip = CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    model = LlamaModel(text).to(dtype).train()
    embeds = torch.randn(1, 200, 64, dtype=dtype, requires_grad=True)
    got = saved_bytes(model, inputs_embeds=embeds, use_cache=False)
    told = cost_model(LlavaConfig(vision_config=clip, text_config=text)).activation_bytes([200] * 4, element)
    assert told == pytest.approx(got, rel=0.1)


def test_cache_bytes_are_those_of_a_real_cache():
    model, batch = tiny_llava(), ragged_batch([[3, 9]])
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with compress(model, "1:avgpool:4"), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    told = cost_model(model.config)
    assert told.cache_bytes(told.lengths("1:avgpool:4", 12), element=4) == cache_bytes(cache)


def test_what_the_model_does_not_know():
    with pytest.raises(UnsupportedModel, match="BertConfig"):
        cost_model(BertConfig())
    with pytest.raises(UnsupportedModel, match="LlavaNextConfig cuts its images into parts itself; give pictures"):
        step_cost(FAMILIES["llava_next"]().model.config)
    with pytest.raises(ValueError, match="phase must be one of instruct, align, forward"):
        step_cost(tiny_llava().config, phase="tune")
    with pytest.raises(UnsupportedModel, match="there are llava-1.5-7b, qwen2.5-vl-7b"):
        reference_config("llava-2")
    assert set(PARTS) == {"tower", "projector", "linear", "attention", "compressor", "head"}
