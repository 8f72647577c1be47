"""The parts of a step add up, loading is set against its use, and scaling on paper follows from its parts."""

from __future__ import annotations

import pandas as pd
import pytest
import scaling
from benchmarks import training
from scaling import Cluster, simulate

from llavolta.data import Collator, LlavaData
from llavolta.train.models import load_model


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_the_parts_of_a_step_add_up(scenes, small_model):
    model, processor = load_model(str(small_model))
    data, collate = LlavaData(scenes / "train.json"), Collator(processor)
    batch = collate([data[i] for i in range(8)])
    model(**batch)  # transformers leaves hooks of its own at the first call
    before = hooks(model)
    table = training.part_times(model, [batch], ["1:avgpool:8"], rounds=2, progress=False)
    assert table.index.tolist() == ["none", "1:avgpool:8"]
    assert table[training.PARTS].sum(axis=1).tolist() == pytest.approx([1, 1])
    assert (table[training.PARTS] > 0).all(axis=None)
    assert (table.images_per_second * table.seconds).tolist() == pytest.approx([8, 8])
    tokens = int(batch["attention_mask"].sum())
    assert (table.tokens_per_second * table.seconds).tolist() == pytest.approx([tokens, tokens])
    assert hooks(model) == before

    loading = training.loading_times(data, collate, 8, [0, 1], batches=3)
    assert loading.index.tolist() == [0, 1] and (loading.examples_per_second > 0).all()


def test_loading_must_be_twice_as_fast_as_its_use():
    assert training.keeps_up(pd.DataFrame({"times_consumption": [0.5, 2.0]}))
    assert not training.keeps_up(pd.DataFrame({"times_consumption": [0.5, 1.9]}))


@pytest.mark.slow
def test_memory_grows_with_the_batch_and_shrinks_with_compression(small_model):
    table = training.memory_by_batch(str(small_model), [4, 32], ["none", "1:avgpool:8"], rounds=1)
    assert table["none"][32] > 2 * table["none"][4] > 0
    assert table["1:avgpool:8"][32] < table["none"][32]


class TestScaling:
    def test_without_links_and_with_one_gpu_nothing_is_lost_but_padding(self):
        free = Cluster(inside=1e30, across=1e30)
        step = simulate("none", 1, 4, "zero3", free)
        assert step["waiting"] == 0 and step["communication"] == pytest.approx(0)
        assert step["seconds"] == pytest.approx(step["ideal"] + step["padding"]) and step["padding"] > 0

    def test_traffic_that_cannot_hide_is_paid(self):
        slow = Cluster(inside=1e9, across=1e9, overlap=1.0)
        step = simulate("none", 8, 1, "zero3", slow)
        size = 2 * sum(scaling.cost_model(scaling.reference_config()).parameters.values())
        busy = step["seconds"] - step["communication"]
        assert step["communication"] == pytest.approx(3 * size * 7 / 8 / 1e9 - busy, rel=0.2)
        assert simulate("none", 8, 1, "zero2", slow)["communication"] < step["communication"]

    def test_grouping_by_length_spares_waiting(self):
        grouped, loose = (simulate("2:avgpool:8", 32, 4, "zero3", Cluster(), how) for how in (True, False))
        assert grouped["waiting"] + grouped["padding"] < (loose["waiting"] + loose["padding"]) / 3
        assert grouped["ideal"] == pytest.approx(loose["ideal"])

    @pytest.mark.slow
    def test_the_page_is_up_to_date(self):
        assert scaling.main(["--check"]) == 0, "run python papers/scaling.py"
