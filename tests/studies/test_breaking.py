"""A second question on one cache, and which questions are of which task."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from PIL import Image

from llavolta.data import LlavaData
from llavolta.errors import ConfigError
from llavolta.studies import breaking, budgets, evaluation
from llavolta.studies.breaking import TASKS, second_questions, tasks_of
from llavolta.train.models import load_model
from llavolta.worlds.digits import entry

# What does not look at the text: at no place, in the decoder, before the projector, restored.
BLIND = [("none", 5), ("2:avgpool:8", 12), ("vision:random:0.25", 5), ("0:restore:divprune:0.25", 5)]


@pytest.fixture(scope="module")
def llava():
    return load_model("embedded")


@pytest.mark.parametrize(("plan", "batch"), BLIND)
def test_what_does_not_look_at_the_text_answers_alike_on_one_cache(llava, scenes, plan, batch):
    data = LlavaData(scenes / "heldout.json")
    torch.manual_seed(0)
    along = second_questions(*llava, data, plan, one_cache=False, batch_size=batch)
    torch.manual_seed(0)
    on_cache = second_questions(*llava, data, plan, one_cache=True, batch_size=batch)
    pd.testing.assert_frame_equal(along, on_cache)
    assert on_cache["index"].tolist() == list(range(12)) and on_cache.correct.mean() > (0.3 if plan == "none" else -1)


def test_without_compression_it_is_the_answer_to_the_whole_conversation(llava, scenes):
    model, processor = llava
    data = LlavaData(scenes / "heldout.json")
    found = second_questions(model, processor, data, limit=3)
    for row in found.itertuples():
        example = data[row.index]
        text = processor.apply_chat_template(example.messages[:3], add_generation_prompt=True)
        batch = processor(text=text, images=example.images, return_tensors="pt")
        said, _ = evaluation.answer(model, processor, batch, 4)
        assert said[0] == row.prediction


def test_what_looks_at_the_text_has_seen_the_first_question_alone(llava, scenes):
    """Its picture is what one question alone leaves, whatever is asked next."""
    data = LlavaData(scenes / "heldout.json")
    seen = []
    real = breaking.compress
    with pytest.MonkeyPatch.context() as patch:
        watch = dict(observe=lambda layer, tokens, out: seen.append(out.anchor.clone()))
        patch.setattr(breaking, "compress", lambda model, plan: real(model, plan, **watch))
        for one_cache in (True, False):
            second_questions(*llava, data, "3:fastv:0.1", limit=4, one_cache=one_cache)
    with real(llava[0], "3:fastv:0.1", **watch):
        first = [(data.questions_of(index)[0]["question"], data[index].images) for index in range(4)]
        llava[0](**evaluation.prompts(*llava, first))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def test_tasks_go_by_type_and_by_the_size_of_the_objects(tmp_path):
    entries = []
    for number, size in enumerate((40, 10)):
        Image.new("RGB", (100, 60)).save(tmp_path / f"{number}.png")
        talk = entry(str(number), f"{number}.png", [("What is up there?", "cat"), ("How many?", "2")])
        objects = [{"name": "cat", "box": [0, 0, size, 10], "vendor": "noto"}]
        entries.append({**talk, "types": ["where", "count"], "objects": objects})
    (tmp_path / "q.json").write_text(json.dumps(entries))
    data = LlavaData(tmp_path / "q.json")
    tasks = tasks_of(data, pd.DataFrame(data.questions()))
    assert tasks["position"].tolist() == [True, False, True, False]
    assert tasks["small detail"].tolist() == [False, False, True, True]


def test_a_table_of_all_tasks(llava, scenes):
    data = LlavaData(scenes / "heldout.json")
    plans = budgets.plans_at([0.25], 8, 144, ["FastV", "downsampling"])
    answers = budgets.training_free(*llava, data, plans, 20, progress=False)
    table = breaking.breaking(*llava, data, answers, plans, talks=6, progress=False)
    assert set(table.method) == {"FastV", "downsampling", budgets.FULL}
    assert set(table.task) == set(TASKS) - {"small detail"}  # digits list no objects
    assert (table.low <= table.accuracy).all() and (table.accuracy <= table.high).all()
    blind = table[table.method == "downsampling"].set_index("task").accuracy
    assert blind[TASKS[2]] == blind[TASKS[3]]


def test_data_without_a_second_question(llava, scenes, tmp_path):
    entries = json.loads((scenes / "heldout.json").read_text())[:2]
    for one in entries:
        one |= {"conversations": one["conversations"][:2], "types": one["types"][:1]}
    (tmp_path / "one.json").write_text(json.dumps(entries))
    with pytest.raises(ConfigError, match="no entry has a second question"):
        second_questions(*llava, LlavaData(tmp_path / "one.json", scenes))
