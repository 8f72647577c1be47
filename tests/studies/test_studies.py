"""The studies agree with evaluate() and with the model's own attention, resume, and say what the figures say."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from families_tiny import FAMILIES, IMAGE, VIDEO
from PIL import Image
from tiny import ragged_batch, tiny_llava
from transformers import DynamicCache

from llavolta import AveragePool, compress
from llavolta.compression import families, patch
from llavolta.data import LlavaData
from llavolta.errors import ConfigError, PlanError
from llavolta.studies import evaluation, inspect, redundancy
from llavolta.train.models import load_model

LAYERS, STRIDES = [0, 1, 3], [1, 5, 72]


@pytest.fixture(scope="module")
def loaded(scenes, small_model):
    return *load_model(str(small_model)), LlavaData(scenes / "heldout.json")


@pytest.fixture(scope="module")
def sweep(loaded):
    return redundancy.redundancy_sweep(*loaded, LAYERS, STRIDES, limit=12, batch_size=4, progress=False)


@pytest.fixture
def computed(loaded):
    """How often each decoder layer computed prompts (single new tokens do not count)."""
    counts = dict.fromkeys(range(4), 0)

    def note(number, module, args, kwargs):
        counts[number] += kwargs["hidden_states"].shape[1] > 1

    layers = enumerate(families.find_parts(loaded[0]).layers)
    hooks = [
        layer.self_attn.register_forward_pre_hook(partial(note, number), with_kwargs=True) for number, layer in layers
    ]
    yield counts
    for hook in hooks:
        hook.remove()


def test_the_sweep_is_what_evaluate_says_point_by_point(loaded, sweep):
    assert len(sweep) == 3 * 3 * 12
    for (layer, stride), part in sweep.groupby(["layer", "stride"]):
        plan = f"{layer}:avgpool:{stride}"
        alone = evaluation.evaluate(*loaded, plan=plan, limit=12, batch_size=4, progress=False)
        assert part.prediction.tolist() == alone.prediction.tolist(), plan
        assert part.correct.tolist() == alone.correct.tolist() and part.type.tolist() == alone.type.tolist()
        assert part.kept.unique() == pytest.approx([-(-144 // stride) / 144])
    assert sweep.groupby("stride").prediction.nunique().max() > 1  # the model does not say one thing to everything


def test_layers_below_are_computed_once_and_an_interrupted_sweep_continues(
    loaded, sweep, computed, tmp_path, monkeypatch
):
    settings = dict(limit=12, batch_size=4, cache=tmp_path, progress=False)
    real, calls = evaluation.answer, []

    def breaks(*args, **kwargs):
        calls.append(1)
        if len(calls) == 10:  # in the second of three batches of seven plans
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluation, "answer", breaks)
    with pytest.raises(KeyboardInterrupt):
        redundancy.redundancy_sweep(*loaded, LAYERS, STRIDES, **settings)
    assert not any("forward" in vars(layer) for layer in families.find_parts(loaded[0]).layers)
    computed.update(dict.fromkeys(computed, 0))
    again = redundancy.redundancy_sweep(*loaded, LAYERS, STRIDES, **settings)
    pd.testing.assert_frame_equal(again, sweep)
    assert len(calls) == 10 + 3 * 7 - 9  # nine points of a batch were done
    # Five plans of the second batch, from layer 1 on, and seven of the third. In each batch, every layer once for all
    # the plans that start behind it, and once for each of the others.
    assert computed == {0: 1 + 3, 1: 3 + 5, 2: 3 + 5, 3: 5 + 7}
    redundancy.redundancy_sweep(*loaded, LAYERS, STRIDES, **settings)
    assert len(calls) == 10 + 3 * 7 - 9  # nothing was left to do


def test_damaged_results_of_a_sweep_are_made_again(loaded, tmp_path):
    settings = dict(limit=4, batch_size=8, cache=tmp_path, progress=False)
    right = redundancy.redundancy_sweep(*loaded, [1], [1, 8], **settings)
    for damaged in ("", "{", "[1]", '{"x": "3"}', "\0\0"):
        for file in tmp_path.rglob("*.json"):
            file.write_text(damaged)
        again = redundancy.redundancy_sweep(*loaded, [1], [1, 8], **settings)
        pd.testing.assert_frame_equal(again, right)


def test_results_of_another_model_are_not_taken(loaded, tmp_path):
    model, processor, data = loaded
    settings = dict(limit=4, cache=tmp_path, progress=False)
    redundancy.redundancy_sweep(model, processor, data, [1], [1], **settings)
    weight = model.lm_head.weight
    with torch.no_grad():
        kept = weight[0, 0].item()
        weight[0, 0] += 1
        redundancy.redundancy_sweep(model, processor, data, [1], [1], **settings)
        weight[0, 0] = kept
    assert len(list(tmp_path.iterdir())) == 2
    held = json.loads(next(tmp_path.rglob("none.json")).read_text())
    assert list(held) == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("layers", "strides", "limit", "error", "message"),
    [
        ([9], [2], 4, PlanError, "names layer 9"),
        ([9], [1], 4, PlanError, "names layer 9"),
        ([1], [0], 4, PlanError, "stride must be"),
        ([], [2], 4, ConfigError, "at least one layer"),
        ([1], [2], 0, ConfigError, "one question"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_at_once(loaded, layers, strides, limit, error, message):
    with pytest.raises(error, match=message):
        redundancy.redundancy_sweep(*loaded, layers, strides, limit)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "qwen2_5_vl", "llava_onevision"])
def test_shared_layers_change_nothing_in_other_families(name):
    family = FAMILIES[name]("left")
    model = family.model
    inputs = {key: value for key, value in family.batch.items() if key != "labels"}
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, suppress_tokens=[IMAGE, VIDEO])
    plans = {"0:avgpool:3": 0, "2:avgpool:3": 2, "2:avgpool:16": 2, "3:avgpool:3": 3, "none": 4}
    options |= dict(output_logits=True, return_dict_in_generate=True)
    encoded = families.encode_pictures(families.find_parts(model).base, (), dict(inputs))
    with redundancy.shared_layers(model) as shared:
        for plan, shared.below in plans.items():
            with compress(model, plan):
                found = model.generate(**encoded, **options, past_key_values=DynamicCache())
            with compress(FAMILIES[name]("left").model, plan) as alone:
                other = alone.parts.top.generate(**inputs, **options, past_key_values=DynamicCache())
            assert torch.equal(found.sequences, other.sequences), plan
            assert all(torch.equal(a, b) for a, b in zip(found.logits, other.logits, strict=True)), plan


def made_up(accuracy: dict[float, list[int]]) -> pd.DataFrame:
    rows = [
        dict(layer=layer, stride=round(1 / kept), kept=kept, question=n, type="all", correct=bool(c))
        for layer in (0, 2)
        for kept, correct in accuracy.items()
        for n, c in enumerate(correct if layer == 0 else accuracy[1.0])
    ]
    return pd.DataFrame(rows)


def test_the_headline_follows_from_the_figures():
    sweep = made_up({1.0: [1] * 10, 0.5: [1] * 9 + [0], 0.25: [1] * 5 + [0] * 5})
    lost = redundancy.accuracy_lost(sweep, removed=0.7)
    assert lost.full[0] == 1 and lost.compressed[0] == pytest.approx(0.5 + 0.2 * 0.4)  # 0.3 lies a fifth of the way up
    assert lost.low[0] < lost.lost[0] < lost.high[0] and lost.lost[2] == lost.low[2] == lost.high[2] == 0
    assert redundancy.removable(sweep, 0.03).tolist() == pytest.approx([0.5 * 0.03 / 0.1, 0.75])
    text = redundancy.headline(sweep)
    assert "at layer 0: from 100.0% to 58.0%, **-42.0 points**" in text and "Published" in text and "-3%" in text
    assert "at layer 2: from 100.0% to 100.0%, **+0.0 points** (95% interval +0.0 to +0.0)" in text
    with pytest.raises(ConfigError, match="do not reach"):
        redundancy.accuracy_lost(sweep, removed=0.8)


def test_the_sweep_table_holds_every_type_and_its_interval(sweep):
    table = redundancy.sweep_table(sweep)
    assert set(table.type) == {"overall", "read", "count", "presence", "compare"}
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()
    overall = table.query("type == 'overall'")
    assert len(overall) == 9 and set(overall.questions) == {12}
    assert overall.accuracy.to_numpy() == pytest.approx(sweep.groupby(["layer", "stride"]).correct.mean().to_numpy())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava_next", "mistral3"])
def test_attention_shares_are_those_of_the_models_own_maps(name):
    family = FAMILIES[name]("right", attention="eager")
    model, batch = family.model, {key: value for key, value in family.batch.items() if key != "labels"}
    ids = torch.tensor(sorted(families.find_parts(model).visual_ids.values()))
    kinds = torch.isin(batch["input_ids"], ids).long() + 1
    last = batch["attention_mask"].sum(1) - 1
    shares = redundancy.attention_shares(model, batch, last, kinds)
    maps = model(**batch, output_attentions=True).attentions
    assert len(maps) == len(shares)
    for layer, (found, full) in enumerate(zip(shares, maps, strict=True)):
        row = full.mean(1)[torch.arange(len(last)), last]  # (B, T)
        expected = torch.stack([(row * (kinds == kind)).sum(1) for kind in range(3)], dim=1)
        torch.testing.assert_close(found, expected, msg=f"{name} layer {layer}", atol=1e-5, rtol=1e-4)
    assert 0.01 < shares[..., 2].mean() < 0.99


def test_answer_attention_tells_question_from_prompt(loaded):
    model, processor, data = loaded
    frame = redundancy.answer_attention(model, processor, data, limit=6, batch_size=4, progress=False)
    assert set(frame.kind) == set(redundancy.KINDS) and frame.layer.nunique() == 4 and frame.question.nunique() == 6
    assert frame.groupby(["question", "layer"]).share.sum().to_numpy() == pytest.approx(np.ones(24), abs=1e-5)
    questions = list(data.questions())
    for number, held in frame.query("layer == 0").set_index("kind").groupby("question").tokens:
        question = questions[number]
        asked = processor.tokenizer(question["question"], add_special_tokens=False)["input_ids"]
        assert held["visual"] == 144 and held["question"] == len(asked)
        assert held["system and prompt"] == 3  # <s> USER: ... ASSISTANT:
    table = redundancy.attention_table(frame)
    assert len(table) == 12 and (table.low <= table.share).all() and (table.share <= table.high).all()
    assert table.query("kind == 'visual'").tokens_share.between(0.9, 0.97).all()
    assert "in layer 0 and" in redundancy.attention_headline(frame)


def test_token_maps_are_those_of_the_pass():
    model, batch = tiny_llava(), ragged_batch([[3, 4], [2, 0, 5]])
    del batch["labels"]
    maps = inspect.token_map(model, batch, "1:avgpool:4;3:avgpool:2")
    assert maps[1].tolist() == [[n // 4 for n in range(16)]] * 3
    assert maps[3].tolist() == [[n // 8 for n in range(16)]] * 3
    assert inspect.token_map(model, batch, "none") == inspect.token_map(model, batch, "1:avgpool:1") == {}
    both = inspect.token_map(model, batch, "vision:avgpool:2;2:random:0.5")
    assert both["vision"].tolist() == [[n // 2 for n in range(16)]] * 3
    assert all(sorted(set(row)) == [-1, 0, 1, 2, 3] for row in both[2].tolist())


@pytest.mark.parametrize("plan", ["2:fastv:0.25", "2:pyramiddrop:0.5", "2:random:0.3", "2:avgpool2d:2", "2:avgpool:5"])
def test_token_maps_say_what_layer_2_really_gets(plan):
    model, batch = tiny_llava(), ragged_batch([[3, 4], [2, 0, 5]])
    del batch["labels"]
    layer, seen = model.get_decoder().layers[2], []
    watch = lambda module, args, kwargs: seen.append(args[0][0])  # noqa: E731  the first row: 3 text tokens, a picture
    before = layer.register_forward_pre_hook(watch, with_kwargs=True)
    with compress(model, plan):
        after = layer.register_forward_pre_hook(watch, with_kwargs=True)  # behind the hook of compress
        model(**batch)
    before.remove()
    after.remove()
    where = inspect.token_map(model, batch, plan)[2][0]
    stock, short = seen
    count = where.max() + 1
    assert sorted(set(where[where >= 0])) == list(range(count)) and count < 16
    for number in range(count):
        whole = stock[3:19][torch.tensor(where == number)].mean(0)
        torch.testing.assert_close(short[3 + number], whole)


@pytest.mark.parametrize("plan", ["2:sparsevlm:0.5", "2:pact:0.4", "vision:kmeans:0.25", "vision:tome:0.5"])
def test_as_many_tokens_are_drawn_as_are_left(plan):
    """What a method drops is drawn dark, not as one more merged token."""
    model, batch = tiny_llava(), ragged_batch([[3, 4], [2, 0, 5]])
    del batch["labels"]
    with inspect.recording(model, plan) as record, torch.no_grad():
        model(**batch)
    ((place, where),), ((_, (left, _)),) = record.maps.items(), record.counts.items()
    assert sum(len(set(row[row >= 0])) for row in where) == left, place


def test_a_view_is_what_the_model_answers_under_the_plan(loaded):
    model, processor, data = loaded
    question, images = inspect.choose(data, 3)
    view = inspect.view(model, processor, question["question"], images, "1:avgpool:5")
    alone = evaluation.evaluate(model, processor, data, "1:avgpool:5", limit=4, progress=False)
    assert view.answer == alone.prediction[3].strip()
    assert view.tokens == [144, 29, 29, 29] and view.ratio == pytest.approx(4 * 144 / (144 + 3 * 29))
    assert view.grid().tolist() == (np.arange(144) // 5).reshape(12, 12).tolist()
    assert 0 < view.flops < 1 and list(view.guesses.values()) == sorted(view.guesses.values(), reverse=True)
    stock = inspect.view(model, processor, question["question"], images, "none")
    assert stock.maps == {} and stock.ratio == stock.flops == 1 and stock.grid().max() == 143
    assert not patch._active
    with pytest.raises(ConfigError, match="questions 0..47, not 48"):
        inspect.choose(data, 48)


def test_views_of_pictures_of_ones_own(loaded):
    model, processor, _ = loaded
    picture = Image.new("RGB", (50, 70), (200, 10, 10))
    two = inspect.view(model, processor, "Is there a 7?", [picture, picture], "2:avgpool:144")
    assert two.maps[2].shape == (2, 144) and two.tokens[-1] == AveragePool(144).num_tokens(288)


def test_design_table_is_the_published_ratio_and_cheaper_with_stride(loaded):
    table = inspect.design_table(loaded[0].config, range(4), [1, 4, 16])
    assert table.query("stride == 1")[["ratio", "flops"]].eq(1).all(axis=None)
    assert (table.pivot(index="layer", columns="stride", values="flops").diff(axis=1).iloc[:, 1:] < 0).all(axis=None)
    assert (table.pivot(index="layer", columns="stride", values="ratio").diff().iloc[1:, 1:] < 0).all(axis=None)
