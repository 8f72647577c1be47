"""The benchmark runs, measures what it says, and counts cache bytes exactly. Speed itself is not a test's business."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks import methods, training

from llavolta.compression.labelled import IGNORED
from llavolta.compression.plan import tokens_per_layer
from llavolta.cost import bench
from llavolta.train.config import TrainConfig
from llavolta.train.models import set_trainable
from llavolta.train.schemes import SCHEMES, Stage
from llavolta.worlds import WORLDS

SMALL = bench.Sizes(width=64, layers=4, visual=16, text=12, batch=16, vocabulary=100)


@pytest.fixture
def small_world(scenes, monkeypatch):
    """The digits world has the scenes of the fixture ``scenes``, in place of thousands."""
    world = replace(WORLDS["digits"], build=lambda *_: scenes)
    monkeypatch.setitem(WORLDS, "digits", world)


@pytest.fixture(scope="module")
def report():
    return bench.step_report(SMALL, rounds=1, progress=False)


@pytest.mark.slow
def test_speed_ups_are_set_against_what_the_flops_promise(report):
    step = report["step"].set_index("plan")
    assert step.index.tolist() == ["none", "2:avgpool:8", "2:avgpool:2"]  # N / 2 is 2 here
    assert step.promised["none"] == 1 < step.promised["2:avgpool:2"] < step.promised["2:avgpool:8"]
    assert (step.kept_promise == step.speedup / step.promised).all() and (step.seconds > 0).all()


@pytest.mark.slow
def test_cache_bytes_follow_the_tokens_per_layer(report):
    prefill = report["prefill"].set_index("plan")
    for plan, ratio in prefill.cache_ratio.items():
        tokens = sum(SMALL.text + count for count in tokens_per_layer(plan, SMALL.layers, SMALL.visual))
        assert ratio == pytest.approx(tokens / (SMALL.layers * (SMALL.text + SMALL.visual)))


@pytest.mark.slow
def test_overhead_and_memory_name_their_variants():
    overhead = training.overhead_times(SMALL, rounds=1, progress=False)
    assert overhead.variant.tolist() == ["stock", "stride 1", "labelled rows only"]
    memory = training.peak_memory(SMALL).set_index("variant")
    assert memory.index.tolist() == ["stock", "stride 1", "labelled rows only", "2:avgpool:8"]
    # 28 tokens an example, 32000 logits of 4 bytes, more than one copy: a seventh of the rows need far less. Sixteen
    # examples, because of two the copies would be no larger than what an allocator happens to keep.
    logits = SMALL.batch * (SMALL.visual + SMALL.text) * 32000 * 4 / 1e6
    assert memory.peak_MB["stock"] > 2 * logits
    assert memory.peak_MB["labelled rows only"] < memory.peak_MB["stock"] - logits


def test_the_batch_is_labelled_at_its_end():
    batch = SMALL.inputs()
    assert (batch["labels"] != IGNORED).sum(1).tolist() == [4] * SMALL.batch
    assert (batch["input_ids"] == 5).sum(1).tolist() == [16] * SMALL.batch
    with pytest.raises(ValueError, match="square number"):
        bench.Sizes(visual=17).model()


def test_compressors_are_set_against_the_tower_and_the_loop():
    table = methods.compressor_times(images=2, tower_images=1, grid=4, width=64, layers=2, rounds=1, progress=False)
    table = table.set_index("compressor")
    assert table.index.tolist() == list(methods.BEFORE_PROJECTOR)
    assert table.tokens_left.drop(["prumerge", "prumerge+"]).tolist() == [4] * 5
    assert (table.seconds > 0).all() and (table.tower > 0).all()
    assert table.loop.dropna().index.tolist() == ["prumerge", "prumerge+"]


@pytest.mark.parametrize("own", [{}, dict(lora_rank=4, bf16=True)])
def test_step_times_leave_the_model_as_it_was(small_model, small_world, own):
    model, batches = bench.embedded_batches(2, 1, str(small_model))
    set_trainable(model, "align")
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    stage = Stage("0:random:0.25", 1, slow_every=2)
    config = TrainConfig(output="unused", **own) if own else None
    modules = [name for name, _ in model.named_modules()]
    times = bench.step_times(model, batches, ["1:avgpool:8", stage], rounds=1, progress=False, config=config)
    assert times.plan.tolist() == ["none", "1:avgpool:8", str(stage)] and (times.seconds > 0).all()
    assert [name for name, _ in model.named_modules()] == modules
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not hasattr(model, "mode_isolator")


def test_precisions_compute_the_same_step(small_model, small_world, capsys):
    given = ["precision", "--model", str(small_model), "--batch", "2", "--rounds", "1"]
    assert training.main(given) == 0
    rows = capsys.readouterr().out.strip().splitlines()[-3:]
    assert [row.split()[0] for row in rows] == ["float32", "autocast", "bfloat16"]
    full, autocast, master = (float(row.split()[-1]) for row in rows)
    assert autocast == pytest.approx(full, rel=0.05) and master == pytest.approx(full, rel=0.05)


def test_recipes_are_timed_with_their_alignment():
    sizes = bench.Sizes(width=64, layers=4, visual=36, text=16, batch=2, vocabulary=100)
    schemes = {name: SCHEMES[name].scaled(4) for name in ("single-stage", "heavy", "dualspeed")}
    table = training.recipe_times(sizes, schemes, 1, False).set_index("scheme")
    assert table.loc["single-stage"].tolist() == [1] * 6
    assert table["align"]["heavy"] == 1 < table.recipe_promised["heavy"] < table.tuning_promised["heavy"]
    dual = table.loc["dualspeed"]  # is aligned on few tokens, too
    assert 1 < min(dual.align_promised, dual.tuning_promised) <= dual.recipe_promised
    assert dual.recipe_promised <= max(dual.align_promised, dual.tuning_promised)
