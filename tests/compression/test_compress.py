"""compress() against the slow oracle of tiny.py and against stock transformers."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import IMAGE, in_turn, oracle, ragged_batch, tiny_llava
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from llavolta import AveragePool, CompressedTokens, Compressor, PlanError, compress
from llavolta.compression.compressors import COMPRESSORS
from llavolta.compression.compressors.base import KeepRatio
from llavolta.errors import UnsupportedModel

RAGGED = [[3, 4], [2, 0, 5], [6], [1, 3, 2]]  # one image, two in a row, none, two apart


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def kept_columns(batch, strides: list[int], grid: int = 4) -> list[torch.Tensor]:
    """For each row of the batch the columns of the original tokens at which remaining tokens stand."""
    rows = []
    for ids, real in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        column, columns = 0, []
        while column < len(ids):
            if ids[column] == IMAGE:
                windows = [[column + i] for i in range(grid * grid)]
                for stride in strides:
                    windows = [sum(windows[i : i + stride], []) for i in range(0, len(windows), stride)]
                columns += [window[-1] for window in windows]
                column += grid * grid
            else:
                columns += [column] * bool(real[column])
                column += 1
        rows.append(torch.tensor(columns))
    return rows


def assert_like_oracle(model, batch, plan: dict[int, int], tolerance: float = 1e-4):
    expected, expected_loss = oracle(model, batch, plan)
    with compress(model, {layer: AveragePool(stride) for layer, stride in plan.items()}):
        out = model(**batch)
    assert out.logits.shape[:2] == batch["input_ids"].shape
    torch.testing.assert_close(out.loss, expected_loss, rtol=tolerance, atol=tolerance)
    for row, (columns, logits) in enumerate(zip(kept_columns(batch, list(plan.values())), expected, strict=True)):
        torch.testing.assert_close(out.logits[row, columns], logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("stride", "layer", "side"),
    in_turn([2, 3, 5, 16, 40], [0, 1, 3], ["left", "right"], cases=10),
)
def test_equals_the_oracle_on_a_ragged_batch(model, layer, stride, side):
    assert_like_oracle(model, ragged_batch(RAGGED, side=side), {layer: stride})


def test_two_layers_of_compression_equal_the_oracle(model):
    assert_like_oracle(model, ragged_batch(RAGGED), {1: 3, 2: 2})


def test_eager_attention_equals_the_oracle():
    assert_like_oracle(tiny_llava(attention="eager"), ragged_batch(RAGGED, side="left"), {1: 3})


def test_bfloat16_follows_the_oracle():
    batch = ragged_batch(RAGGED, dtype=torch.bfloat16)
    assert_like_oracle(tiny_llava(dtype=torch.bfloat16), batch, {1: 3}, tolerance=0.15)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(lambda row: sum(row) >= 2), min_size=1, max_size=4
    ),
    layer=st.integers(0, 3),
    stride=st.integers(1, 20),
    side=st.sampled_from(["left", "right"]),
    seed=st.integers(0, 3),
)
def test_equals_the_oracle_on_random_batches(rows, layer, stride, side, seed):
    rows = [[max(row[0], 1), *row[1:]] for row in rows]  # a beginning token, as every tokenizer writes
    assert_like_oracle(_MODEL, ragged_batch(rows, side=side, seed=seed), {layer: stride})


_MODEL = tiny_llava()


def test_gradients_equal_the_oracle(model):
    batch, plan = ragged_batch(RAGGED), {1: 3}
    model.zero_grad()
    oracle(model, batch, plan)[1].backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for training in (False, True):  # full logits, labelled rows only
        model.train(training)
        with compress(model, {1: AveragePool(3)}):
            got = gradients(model, batch)
        model.eval()
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_stride_one_equals_stock_bit_for_bit(attention, side):
    model, batch = tiny_llava(attention=attention).train(), ragged_batch(RAGGED, side=side)
    stock, stock_gradients = model(**batch), gradients(model, batch)
    with compress(model, {2: AveragePool(1)}):
        same, same_gradients = model(**batch), gradients(model, batch)
    assert torch.equal(stock.loss, same.loss) and torch.equal(stock.logits, same.logits)
    assert all(torch.equal(stock_gradients[name], same_gradients[name]) for name in stock_gradients)


def test_pooling_by_one_on_the_compressed_path_equals_stock_bit_for_bit():
    """The machinery itself, not only the short cut for plans that remove nothing."""

    class PoolAll(AveragePool):
        name = ""
        is_identity = False

    model, batch = tiny_llava().train(), ragged_batch([[3, 4], [5, 2]])
    stock, stock_gradients = model(**batch), gradients(model, batch)
    with compress(model, {2: PoolAll(1)}, labelled_only=False):
        same, same_gradients = model(**batch), gradients(model, batch)
    assert torch.equal(stock.logits, same.logits) and torch.equal(stock.loss, same.loss)
    assert all(torch.equal(stock_gradients[name], same_gradients[name]) for name in stock_gradients)


def test_gradient_checkpointing_gives_equal_gradients():
    model, batch = tiny_llava().train(), ragged_batch(RAGGED)
    with compress(model, "1:avgpool:3"):
        plain = gradients(model, batch)
        model.activation_checkpointing_enable()
        checkpointed = gradients(model, batch)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_logits_are_one_row_per_input_token_in_evaluation_and_labelled_rows_in_training():
    model, batch = tiny_llava(), ragged_batch(RAGGED)
    labelled = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    with compress(model, "1:avgpool:3"):
        full = model(**batch)
        model.train()
        short = model(**batch)
    assert short.logits.shape[:2] == (1, len(labelled[0]) + 1)
    torch.testing.assert_close(short.logits[0, :-1], full.logits[labelled], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(short.loss, full.loss)


def test_labelled_rows_respect_num_items_in_batch():
    model, batch = tiny_llava().train(), ragged_batch(RAGGED)
    stock = model(**batch, num_items_in_batch=7).loss
    with compress(model, "none", labelled_only=True):
        torch.testing.assert_close(model(**batch, num_items_in_batch=7).loss, stock)


def test_positions_are_exact_beyond_the_range_of_half_precision():
    """Text far behind an image keeps its place: fp16 positions, as in the public code, end at 2048."""
    model = tiny_llava(dtype=torch.bfloat16)
    batch = ragged_batch([[2100, 40]], dtype=torch.bfloat16)
    seen = []
    handle = compress(model, "1:avgpool:3")
    hook = model.model.language_model.rotary_emb.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    rows = []
    layer = model.model.language_model.layers[1]
    spy = layer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["position_embeddings"][0]), with_kwargs=True
    )
    model(**batch)
    hook.remove(), spy.remove(), handle.remove()
    windows = [2100 + i + (min(3, 16 - i) - 1) // 2 for i in range(0, 16, 3)]
    expected = [*range(2100), *windows, *range(2116, 2156)]
    cos, _ = model.model.language_model.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([expected]))
    assert torch.equal(rows[0], cos)


@pytest.mark.parametrize("plan", ["0:avgpool:3", "1:avgpool:3", "0:avgpool:2;2:avgpool:3"])
@pytest.mark.parametrize("rows", [[[3, 4], [2, 0, 5], [6]], [[3, 4], [5, 2]]])
def test_generation_with_a_cache_equals_generation_without(model, plan, rows):
    batch = ragged_batch(rows, side="left")
    del batch["labels"]
    settings = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, output_logits=True)
    settings["suppress_tokens"] = [IMAGE]  # a random model writes placeholders, which cannot be read back
    with compress(model, plan):
        slow = model.generate(**batch, **settings, use_cache=False, return_dict_in_generate=True)
        fast = model.generate(**batch, **settings, return_dict_in_generate=True)
    assert torch.equal(slow.sequences, fast.sequences)
    for a, b in zip(slow.logits, fast.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def _snapshot(model) -> dict:
    return {
        name: {
            key: dict(value) if "hooks" in key and isinstance(value, dict) else id(value)
            for key, value in m.__dict__.items()
        }
        for name, m in model.named_modules()
    }


def test_nothing_is_left_on_the_model_afterwards(model):
    batch = ragged_batch(RAGGED)
    stock = model(**batch)
    before = _snapshot(model)
    with pytest.raises(ZeroDivisionError), compress(model, "1:avgpool:3"):
        assert _snapshot(model) != before
        model(**batch)
        raise ZeroDivisionError
    assert _snapshot(model) == before
    assert torch.equal(model(**batch).logits, stock.logits)


def test_a_failed_forward_leaves_no_state_behind(model):
    batch = ragged_batch(RAGGED)
    with compress(model, "1:avgpool:3"):
        good = model(**batch)
        with pytest.raises(Exception):  # noqa: B017 whatever the stock model raises
            model(**{**batch, "pixel_values": batch["pixel_values"][:, :2]})
        assert torch.equal(model(**batch).logits, good.logits)


def test_rows_without_images_only(model):
    batch = ragged_batch([[4], [7]])
    stock = model(**batch)
    with compress(model, "1:avgpool:3"):
        assert torch.equal(model(**batch).logits, stock.logits)


def test_the_model_can_be_deep_copied_and_compressed_again(model):
    with compress(model, "1:avgpool:3"):
        pass
    with compress(copy.deepcopy(model), "1:avgpool:3") as handle:
        assert "1:avgpool:3" in repr(handle)


class TestErrors:
    def test_layer_out_of_range(self, model):
        with pytest.raises(PlanError, match=r"layer 4.*0\.\.3"):
            compress(model, "4:avgpool:2")

    def test_overlap(self, model):
        with compress(model, "1:avgpool:2"), pytest.raises(RuntimeError, match="already"):
            compress(model, "2:avgpool:2")
        compress(model, "2:avgpool:2").remove()

    def test_no_visual_tokens(self, model):
        with pytest.raises(UnsupportedModel, match="no visual tokens"):
            compress(model.model.language_model, "1:avgpool:2")

    @pytest.mark.parametrize("plan", ["0:avgpool:2", "1:random:0.5", "2:fastv:0.5"])
    @pytest.mark.parametrize("listed", [True, False])
    def test_layers_that_hold_a_state(self, plan, listed):
        """Qwen3.5: three of four layers are linear attention; also where no config says so."""
        small = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48)
        text = dict(small, vocab_size=32, num_hidden_layers=4, num_key_value_heads=2, head_dim=8)
        text |= dict(linear_key_head_dim=8, linear_value_head_dim=8, pad_token_id=0)
        text |= dict(linear_num_key_heads=2, linear_num_value_heads=2)
        vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=24)
        vision["out_hidden_size"] = 32
        config = Qwen3_5Config(text_config=text, vision_config=vision)
        hybrid = Qwen3_5ForConditionalGeneration(config)
        with compress(hybrid, "none"):
            assert hybrid(input_ids=torch.tensor([[5, 6]])).logits.isfinite().all()
        if not listed:
            hybrid.get_decoder().config.layer_types = None
        kind = "linear_attention" if listed else "Qwen3_5GatedDeltaNet"
        with pytest.raises(UnsupportedModel, match=f"Qwen3_5Model has .* layers of type {kind}"):
            compress(hybrid, plan)

    def test_embeddings_without_ids(self, model):
        with compress(model, "1:avgpool:2"), pytest.raises(UnsupportedModel, match="input_ids"):
            model(inputs_embeds=torch.zeros(1, 5, 32))

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            (lambda out: CompressedTokens(out.hidden[..., :3], out.mask, out.anchor), ValueError, "returned hidden"),
            (lambda out: CompressedTokens(out.hidden, out.mask & False, out.anchor), ValueError, "no token"),
            (lambda out: CompressedTokens(out.hidden * float("nan"), out.mask, out.anchor), FloatingPointError, "NaN"),
        ],
    )
    def test_a_broken_compressor(self, model, change, error, match):
        class Broken(Compressor):
            def __call__(self, tokens):
                return change(AveragePool(2)(tokens))

            def num_tokens(self, num_tokens):
                return num_tokens

        with compress(model, {1: Broken()}), pytest.raises(error, match=match):
            model(**ragged_batch(RAGGED))


def test_an_interrupted_training_pass_leaves_no_labels_behind(model):
    batch = ragged_batch(RAGGED)
    asked = {name: value for name, value in batch.items() if name != "labels"}

    def interrupt(*_):
        raise KeyboardInterrupt

    with compress(model, "1:avgpool:4"):
        expected = model(**asked).logits
        for module in (model.lm_head, model.model.language_model.layers[2], model.model.multi_modal_projector):
            hook = module.register_forward_pre_hook(interrupt)
            model.train()
            with pytest.raises(KeyboardInterrupt):
                model(**batch)
            model.eval()
            hook.remove()
            torch.testing.assert_close(model(**asked).logits, expected)


def test_a_model_under_compression_refuses_to_be_copied_in_one_line():
    model = tiny_llava()
    with compress(model, "1:avgpool:4"), pytest.raises(UnsupportedModel, match="remove"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_nan_from_the_projector_is_not_taken_for_a_dropped_token():
    model, batch = tiny_llava(), ragged_batch([[3, 4]])
    model.model.multi_modal_projector.linear_2.bias.data[0] = torch.nan
    with compress(model, "vision:avgpool:4"), pytest.raises(FloatingPointError, match="projector"):
        model(**batch)


@pytest.mark.parametrize("plan", ["0:avgpool:3", "2:avgpool:3", "vision:prumerge:0.5;3:avgpool:2"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_the_last_hidden_states_have_a_row_for_every_token(plan, return_dict):
    model, batch = tiny_llava(), ragged_batch([[3, 4], [2, 0, 5], [6]], side="right")
    labels = batch.pop("labels")
    with compress(model, plan):
        out = model(**batch, output_hidden_states=True, return_dict=return_dict)
        logits, states = out[0], 1 + model.config.text_config.num_hidden_layers
        parts = out.to_tuple() if return_dict else out
        (hidden,) = [part for part in parts if isinstance(part, tuple) and len(part) == states]
        assert hidden[-1].shape[:2] == batch["input_ids"].shape
        torch.testing.assert_close(model.lm_head(hidden[-1]), logits)
        model.train()
        trained = model(**batch, labels=labels, output_hidden_states=True)
        assert trained.hidden_states[-1].shape[:2] == trained.logits.shape[:2]


PACKABLE = ["2:avgpool:3", "2:fastv:0.5", "2:pyramiddrop:0.5", "0:avgpool2d:2;2:pyramiddrop:0.5", "vision:prumerge:0.5"]


def packed(parts: list[dict]) -> dict:
    """One row of several samples, positions from 0 in each, as trainers pack them."""
    whole = {name: torch.cat([part[name] for part in parts], dim=1) for name in ("input_ids", "labels")}
    for part, start in zip(parts, np.cumsum([0] + [part["labels"].shape[1] for part in parts]), strict=False):
        whole["labels"][:, start] = -100  # nothing predicts the first token of a sample
        part["labels"][:, 0] = -100
    positions = torch.cat([torch.arange(part["input_ids"].shape[1]) for part in parts])[None]
    pixels = torch.cat([part["pixel_values"] for part in parts])
    return {**whole, "position_ids": positions, "pixel_values": pixels}


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("plan", PACKABLE)
def test_packed_samples_are_as_they_are_alone(model, plan, labels):
    parts = [ragged_batch([row], seed=seed) for seed, row in enumerate([[3, 6], [2, 0, 5], [1, 9]])]
    row, found = packed(parts), []
    for part in parts:
        del part["attention_mask"]
    for one in [row, *parts]:
        if not labels:
            del one["labels"]
        with torch.no_grad(), compress(model, plan):
            found.append(model(**one, use_cache=False).logits[0])
    torch.testing.assert_close(found[0], torch.cat(found[1:]), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_told_of_packed_samples_is_refused(model):
    @dataclass(frozen=True)
    class Asking(KeepRatio):
        name = "asking-of-the-text"

        def scores(self, tokens):
            return tokens.rows()[1].sum() + tokens.hidden[..., 0]

    try:
        row = packed([ragged_batch([[3, 6]]), ragged_batch([[1, 9]], seed=1)])
        with compress(model, {2: Asking(0.5)}):
            with pytest.raises(UnsupportedModel, match="are packed.* question"):
                model(**row, use_cache=False)
            del row["position_ids"]
            model(**row, use_cache=False)
    finally:
        del COMPRESSORS["asking-of-the-text"]


@pytest.mark.parametrize("return_dict", [True, False])
def test_logits_that_do_not_fit_the_labels_name_the_switch(return_dict):
    """As TRL's token accuracy has it: logits of all but the last token against the labels of all but the first."""
    model, batch = tiny_llava().train(), ragged_batch(RAGGED)

    def right(logits):
        found, labels = logits[..., :-1, :].argmax(-1), batch["labels"][..., 1:]
        mask = labels != -100
        return (found == labels) & mask

    def logits_of(**how):
        with compress(model, "1:avgpool:3", **how):
            out = model(**batch, return_dict=return_dict)
        return out.logits if return_dict else out[1]

    with pytest.raises(RuntimeError, match="size of tensor") as caught:
        right(logits_of())
    assert any("labelled_only=False" in note for note in caught.value.__notes__)
    with pytest.raises(IndexError) as caught:
        logits_of()[batch["labels"] != -100]
    assert any("labelled_only=False" in note for note in caught.value.__notes__)
    assert right(logits_of(labelled_only=False)).shape == batch["labels"][:, 1:].shape
    assert type(logits_of(labelled_only=False)) is torch.Tensor
    logits_of().float().log_softmax(-1).sum().backward()  # a tensor like others
