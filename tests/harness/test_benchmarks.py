"""Benchmarks: each kind of score through lmms-eval against values counted by hand, the plugin, failures that fail.

What needs lmms-eval is skipped without it; ``make test-eval`` runs everything in the extra environment.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken

from llavolta import harness as benchmarks
from llavolta.data import Collator, LlavaData
from llavolta.errors import ConfigError, DataError, PlanError
from llavolta.harness import __main__ as command
from llavolta.harness import local, run, video
from llavolta.studies.evaluation import answer, evaluate, prompts
from llavolta.train.models import load_model
from llavolta.worlds import WORLDS

ROOT = Path(__file__).parents[2]
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="needs the extra environment: make test-eval"
)
WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
OFFLINE = command.OFFLINE
UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + WORD

# What is asked, what the model says, and the truth.
GQA = [
    ("Which digit is top left?", "3", "3"),
    ("Which digit is top center?", "5", "5"),
    ("Which digit is top right?", "7", "1"),
    ("How often does 2 occur?", "2", "2"),
    ("Is there a 8?", "yes", "Yes."),  # case and full stop do not count
    ("Is there a 9?", "no", "yes"),
]
# ... and how many of the ten annotators agree.
VQA = [
    ("How often does 0 occur?", "1", 10),
    ("How often does 3 occur?", "2", 3),
    ("How often does 4 occur?", "3", 2),
    ("How often does 5 occur?", "4", 1),
    ("How often does 6 occur?", "5", 0),
]
TEXTVQA = VQA[:3:2]
POPE = [(f"Is there a {digit}?", "yes" if digit < 4 else "no", digit in (0, 1, 2, 4, 5)) for digit in range(8)]
# Per picture a category and two questions: said, true.
MME = [
    ("existence", ("top left", "center", "yes", "Yes"), ("center", "top left", "no", "No")),
    ("existence", ("top left", "top right", "yes", "Yes"), ("top right", "top left", "yes", "No")),
    ("count", ("bottom left", "center", "no", "Yes"), ("center", "bottom left", "no", "No")),
    ("numerical_calculation", ("middle left", "center", "no", "No"), ("center", "middle left", "yes", "Yes")),
]
SCIENCEQA = [("middle left", "A", 0), ("middle right", "B", 1), ("bottom left", "C", 2), ("bottom right", "A", 1)]
SEED = [
    ("top left", "A", "A", "image"),
    ("top center", "B", "B", "image"),
    ("top right", "D", "C", "image"),
    ("center", "C", "C", "video"),
]
# Asked again with the options the other way round, under another index: both must be right.
MMBENCH = [(1, "center", "35", "A", "A"), (1_000_001, "center", "53", "B", "B")]
MMBENCH += [(2, "bottom center", "78", "A", "A"), (1_000_002, "bottom center", "87", "A", "B")]

MSVD = ["Is there a 3?", "Is there a 5?"]


def options(text: str, labels: str = "ABCD") -> str:
    return "\n".join(f"{label}. {option}" for label, option in zip(labels, text, strict=False))


def larger(asked: tuple) -> str:
    return f"Is {asked[0]} larger than {asked[1]}?"


def ten(said: str, agree: int) -> list[str]:
    return [said] * agree + ["none"] * (10 - agree)


def mmbench_rows(images) -> list[dict]:
    shared = {"hint": "nan", "C": "nan", "D": "nan", "category": "count", "L2-category": "perception"}
    return [
        shared
        | {"index": index, "question": f"Which digit is {place}?", "A": digits[0], "B": digits[1], "answer": truth}
        | {"source": "digits", "split": "dev", "image": next(images)}
        for index, place, digits, _, truth in MMBENCH
    ]


def write_tasks(folder: Path, images) -> dict[str, list[tuple[str, str]]]:
    """Write the benchmarks in their own formats; per task the prompts that must be shown, and what is to be said."""
    shown: dict[str, list[tuple[str, str]]] = {}

    def write(name, task_file, split, rows, script, **changes):
        local.write_task(folder, f"{name}_local", task_file, split, rows, **changes)
        shown[f"{name}_local"] = script

    write(
        "gqa",
        "gqa/gqa.yaml",
        "testdev",
        [{"id": str(i), "question": q, "answer": truth, "image": next(images)} for i, (q, _, truth) in enumerate(GQA)],
        [(q + WORD, said) for q, said, _ in GQA],
        process_docs=None,
    )
    vqa = [
        {"question_id": i, "question": q, "image": next(images)}
        | {"answers": [{"answer": text, "answer_id": place} for place, text in enumerate(ten(said, agree))]}
        for i, (q, said, agree) in enumerate(VQA)
    ]
    script = [(q + WORD, said) for q, said, _ in VQA]
    write("vqav2", "vqav2/vqav2_val.yaml", "validation", vqa, script)
    unanswered = [row | {"answers": None} for row in vqa]
    write("vqav2_server", "vqav2/vqav2_test.yaml", "test", unanswered, script)
    unanswered = [row | {"question_id": f"VizWiz_test_{row['question_id']:08d}"} for row in unanswered]
    write(
        "vizwiz_server",
        "vizwiz_vqa/vizwiz_vqa_test.yaml",
        "test",
        unanswered,
        [(q + UNSURE, said) for q, said, _ in VQA],
    )
    write(
        "textvqa",
        "textvqa/textvqa_val.yaml",
        "validation",
        [
            {"question_id": i, "question": q.lower(), "answers": ten(said, agree), "image": next(images)}
            for i, (q, said, agree) in enumerate(TEXTVQA)
        ],
        [(q + WORD, said) for q, said, _ in TEXTVQA],
    )
    write(
        "pope",
        "pope/pope.yaml",
        "test",
        [
            {"question_id": str(i), "question": q, "answer": "yes" if there else "no", "image": next(images)}
            for i, (q, _, there) in enumerate(POPE)
        ],
        [(q + WORD, said) for q, said, _ in POPE],
    )
    write(
        "mme",
        "mme/mme.yaml",
        "test",
        [
            {"question_id": f"{i}.png", "category": kind, "question": f"{larger(asked)} Please answer yes or no."}
            | {"answer": asked[3], "image": image}
            for i, (kind, *pair) in enumerate(MME)
            for image in [next(images)]
            for asked in pair
        ],
        [(larger(asked) + WORD, asked[2]) for _, *pair in MME for asked in pair],
    )
    write(
        "scienceqa",
        "scienceqa/scienceqa_img.yaml",
        "test",
        [
            {"question": f"Which digit is {place}?", "choices": list("357"), "answer": truth, "hint": ""}
            | {"image": next(images)}
            for place, _, truth in SCIENCEQA
        ],
        [(f"Which digit is {place}?\n{options('357')}{LETTER}", said) for place, said, _ in SCIENCEQA],
    )
    write(
        "seed",
        "seedbench/seedbench.yaml",
        "test",
        [
            {f"choice_{letter}": digit for letter, digit in zip("abcd", "1379", strict=True)}
            | {"question": f"Which digit is {place}?", "answer": truth, "data_type": kind, "question_id": str(i)}
            | {"image": [next(images)]}
            for i, (place, _, truth, kind) in enumerate(SEED)
        ],
        [(f"Which digit is {place}?\n{options('1379')}{LETTER}", said) for place, said, _, _ in SEED],
    )
    script = [
        (f"Which digit is {place}? There are several options:\n{options(digits)}\n{LETTER}", said)
        for _, place, digits, said, _ in MMBENCH
    ]
    write("mmbench", "mmbench/mmbench_en_dev_static.yaml", "dev", mmbench_rows(images), script)
    write("mmbench_server", "mmbench/mmbench_en_test.yaml", "test", mmbench_rows(images), script)
    return shown


def write_clip(file: Path, greys: list[int]) -> Path:
    av = pytest.importorskip("av", reason="needs the extra environment: make test-eval")
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        for grey in greys:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), grey, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file


@pytest.fixture(scope="module")
def tasks(scenes, tmp_path_factory):
    """(folder, scripts) of the local benchmarks, with pictures of held-out scenes."""
    files = sorted((scenes / "images").glob("heldout_*.png"))
    images = (Image.open(file).convert("RGB") for _ in range(100) for file in files)
    folder, clips = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("clips")
    for number in (1, 2):
        write_clip(clips / f"vid{number}.avi", list(range(0, 160, 10)))
    entries = [
        {"video_id": i, "id": i, "question": question.lower()[:-1], "answer": "yes"}
        for i, question in enumerate(MSVD, start=1)
    ]
    (clips / "test_qa.json").write_text(json.dumps(entries))
    video.prepare("msvd_qa", clips / "test_qa.json", clips, folder)
    return folder, write_tasks(folder, images)


@pytest.fixture(scope="module")
def parrot(small_model, tasks, scenes, tmp_path_factory):
    """A small LLaVA that has learnt by heart to say what the scripts want, whatever the picture."""
    torch.manual_seed(0)
    model, processor = load_model(str(small_model))
    letters = [AddedToken(letter, single_word=True, normalized=False) for letter in "ABCD"]
    processor.tokenizer.add_tokens(letters)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    script = sorted({pair for pairs in tasks[1].values() for pair in pairs})
    assert len(dict(script)) == len(script), "one prompt, two answers"
    data = tmp_path_factory.mktemp("script") / "script.json"
    images = sorted((scenes / "images").glob("heldout_*.png"))
    entries = [
        {
            "id": str(i),
            "image": images[i % len(images)].name,
            "conversations": [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": said}],
        }
        for i, (asked, said) in enumerate(script)
    ]
    data.write_text(json.dumps(entries))
    lessons = LlavaData(data, scenes / "images")
    batch = Collator(processor)([lessons[i] for i in range(len(lessons))])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pictures, learnt = batch.pop("pixel_values"), 0
    for _ in range(600):
        loss = model(**batch, pixel_values=pictures[torch.randperm(len(pictures))]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        learnt = learnt + 1 if loss < 0.03 else 0
        if learnt == 5:
            break
    assert learnt == 5
    folder = tmp_path_factory.mktemp("model") / "parrot"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(parrot, tasks, tmp_path_factory):
    """(folder, table) of one run of the harness over all the local benchmarks."""
    folder = tmp_path_factory.mktemp("run") / "all"
    names = [*tasks[1], "msvd_qa"]
    return folder, run.run(str(parrot), names, folder, batch_size=8, include=tasks[0], environment=OFFLINE)


@needs_harness
def test_every_benchmark_shows_its_prompt_and_logs_the_answer(evaluated, tasks):
    for task, script in tasks[1].items():
        samples = run.read_samples(evaluated[0], task)
        assert [(sample["input"], command._text(sample["filtered_resps"])) for sample in samples] == script, task


@needs_harness
@pytest.mark.parametrize(
    ("task", "metric", "value"),
    [
        ("gqa", "exact_match", 4 / 6),
        # The mean over annotators of min(1, how many of the other nine agree / 3): 1, .9, .6, .3, 0.
        ("vqav2", "exact_match", (1 + 0.9 + 0.6 + 0.3 + 0) / 5),
        ("textvqa", "exact_match", (1 + 0.6) / 2),
        # 3 true and 1 false yes, 2 true and 2 false no.
        ("pope", "pope_accuracy", 5 / 8),
        ("pope", "pope_precision", 3 / 4),
        ("pope", "pope_recall", 3 / 5),
        ("pope", "pope_f1_score", 2 / 3),
        ("pope", "pope_yes_ratio", 5 / 8),
        # Percent of questions plus percent of pairs, a category's mean, summed: (200 + 50) / 2 + 50, and 200.
        ("mme", "mme_perception_score", 125 + 50),
        ("mme", "mme_cognition_score", 200),
        ("scienceqa", "exact_match", 3 / 4),
        ("seed", "seed_image", 2 / 3),
        ("seed", "seed_video", 1),
        ("seed", "seed_all", 3 / 4),
        ("mmbench", "gpt_eval_score", 50),
    ],
)
def test_scores_are_those_counted_by_hand(evaluated, task, metric, value):
    table = evaluated[1].set_index(["task", "metric"])
    assert table.value[f"{task}_local", metric] == pytest.approx(value, abs=1e-9)


@needs_harness
def test_the_harness_knows_the_papers_benchmarks():
    from lmms_eval.tasks import TaskManager

    known = TaskManager().all_tasks
    assert not {*benchmarks.TASKS} - {*known}
    assert not {task for task in benchmarks.JUDGED_TASKS if not task.startswith("ms")} - {*known}


@needs_harness
def test_results_carry_model_plan_questions_and_time(evaluated, parrot):
    table = evaluated[1]
    assert set(table.model) == {str(parrot)} and set(table.plan) == {"none"}
    assert table.set_index("task").questions["pope_local"].unique() == [8] and (table.seconds > 0).all()


@needs_harness
def test_submission_files_are_what_the_servers_take(evaluated):
    folder = evaluated[0] / "submissions"
    (file,) = folder.glob("vqav2-test-submission-*.json")
    assert json.loads(file.read_text()) == [{"question_id": i, "answer": said} for i, (_, said, _) in enumerate(VQA)]
    (file,) = folder.glob("vizwiz_vqa-test-submission-*.json")
    wanted = [{"image": f"VizWiz_test_{i:08d}.jpg", "answer": said} for i, (_, said, _) in enumerate(VQA)]
    assert json.loads(file.read_text()) == wanted
    sheet = pd.read_excel(folder / "mmbench_en_test_results.xlsx")
    assert {"index", "question", "A", "B", "C", "D", "prediction", "category", "split"} <= set(sheet.columns)
    assert list(zip(sheet["index"], sheet.prediction, strict=True)) == [(row[0], row[3]) for row in MMBENCH]


@needs_harness
def test_two_processes_answer_as_one(evaluated, parrot, tasks, tmp_path):
    again = run.run(
        str(parrot), ["pope_local", "gqa_local"], tmp_path / "two", "0:avgpool:1", 4, 2, tasks[0], environment=OFFLINE
    )
    once = evaluated[1].set_index(["task", "metric"]).value
    twice = again.set_index(["task", "metric"]).value
    assert len(twice) == 6 and twice.to_dict() == once[twice.index].to_dict() and set(again.plan) == {"0:avgpool:1"}
    assert "world_size" not in again and len(run.read_samples(tmp_path / "two", "pope_local")) == 8
    assert "rank 1" in (tmp_path / "two" / run.LOG).read_text()


@needs_harness
def test_the_harness_and_the_package_agree_under_a_plan(parrot, scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(WORLDS, "digits", replace(WORLDS["digits"], build=lambda *_: scenes))
    plan = "0:avgpool:72;2:random:0.5"
    arguments = ["embedded", "--model", str(parrot), "--output", str(tmp_path / "eval"), "--limit", "24"]
    assert command.main([*arguments, "--plans", plan]) == 0
    assert f"plan {plan}: 24 answers agree" in capsys.readouterr().out
    samples = [sample for task in local.DIGITS for sample in run.read_samples(tmp_path / "eval" / "plan-0", task)]
    own = evaluate(*load_model(str(parrot)), LlavaData(scenes / "heldout.json"), "none", 24, progress=False)
    said = sorted(command._text(sample["filtered_resps"]) for sample in samples)
    assert said != sorted(own.prediction.str.strip()), "the plan changed nothing"


@needs_harness
def test_a_failure_fails_and_says_why(small_model, tasks, tmp_path, capsys):
    arguments = ["run", "--model", str(small_model), "--tasks", "pope_local", "--include", str(tasks[0])]
    assert command.main([*arguments, "--plan", "9:avgpool:2", "--output", str(tmp_path / "plan")]) == 1
    assert "plan '9:avgpool:2' names layer 9" in capsys.readouterr().err


# The plugin itself, in this process.


@pytest.fixture(scope="module")
def plugin(parrot):
    from llavolta.harness.plugin import Llavolta

    return Llavolta(str(parrot), device="cpu", batch_size="4")


def requests(plugin, data: LlavaData, count: int, *more, options=None) -> list:
    """Requests of a task "t" with split "s" about the first ``count`` questions of ``data``."""
    asked = list(data.questions())[:count]
    plugin.task_dict = {"t": {"s": [{"images": data[question["index"]].images} for question in asked]}}
    options = {"max_new_tokens": 4} if options is None else options
    return [
        SimpleNamespace(args=(question["question"], options, lambda doc: doc["images"], *more, number, "t", "s"))
        for number, question in enumerate(asked)
    ]


@needs_harness
def test_answers_come_in_order_and_end_where_the_task_says(plugin, scenes, parrot):
    data = LlavaData(scenes / "heldout.json")
    own = evaluate(*load_model(str(parrot)), data, limit=24, progress=False).prediction.tolist()
    assert len(set(own)) > 3
    longer = {"max_new_tokens": 3, "min_new_tokens": 3, "temperature": 0, "image_aspect_ratio": "pad"}
    said = plugin.generate_until(requests(plugin, data, 24)[:13] + requests(plugin, data, 24, options=longer)[13:])
    assert said[:13] == own[:13] and {len(text.split()) for text in said[13:]} == {3}
    assert all(long.startswith(text.split()[0]) for long, text in zip(said[13:], own[13:], strict=True) if text)
    stop = next(filter(None, own))
    cut = plugin.generate_until(requests(plugin, data, 24, options={"max_new_tokens": 4, "until": [stop]}))
    assert cut == [text.split(stop)[0] for text in own] != own
    with pytest.raises(Exception, match="decodes greedily"):
        plugin.generate_until(requests(plugin, data, 1, options={"do_sample": True}))


@needs_harness
def test_likelihoods_are_those_of_a_plain_loop(plugin, scenes):
    data = LlavaData(scenes / "heldout.json")
    (request,) = requests(plugin, data, 1)
    text, _, see, *doc = request.args
    greedy = plugin.generate_until(requests(plugin, data, 1, options={"max_new_tokens": 4}))[0]
    for continuation, is_greedy in ((" 7", False), (" yes no", False), (lambda _: greedy, True)):
        loss, same = plugin.loglikelihood([SimpleNamespace(args=(text, continuation, see, *doc))])[0]
        spoken = (continuation if isinstance(continuation, str) else greedy).strip()
        tokenizer, model = plugin.processor.tokenizer, plugin.model
        batch = dict(prompts(model, plugin.processor, [(text, see(plugin._doc(*doc)))]))
        total, ids = 0.0, tokenizer(spoken, add_special_tokens=False)["input_ids"]
        ids = [*ids, tokenizer.eos_token_id]
        for token in ids:
            with torch.no_grad():
                total -= model(**batch).logits[0, -1].log_softmax(-1)[token].item()
            batch["input_ids"] = torch.cat([batch["input_ids"], torch.tensor([[token]])], dim=1)
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        assert loss == pytest.approx(total / len(ids), rel=1e-4)
        assert same is is_greedy


@needs_harness
def test_rounds_ask_until_the_task_ends_them(plugin, scenes):
    data, heard = LlavaData(scenes / "heldout.json"), []

    def ask(doc, previous_output, round_idx, previous_round_info):
        heard.append((list(previous_output), round_idx, previous_round_info))
        return doc["images"], f"Is there a {round_idx}?", round_idx == 3, previous_output, {"round": round_idx}

    asked = requests(plugin, data, 1, ask)
    said = plugin.generate_until_multi_round(asked)[0]
    pictures = plugin.task_dict["t"]["s"][0]["images"]
    texts = [asked[0].args[0], "Is there a 1?", "Is there a 2?"]
    model, processor = plugin.model, plugin.processor
    own = [answer(model, processor, prompts(model, processor, [(text, pictures)]), 4)[0][0] for text in texts]
    assert said == own
    assert heard == [(own[:1], 1, None), (own[:2], 2, {"round": 1}), (own, 3, {"round": 2})]


@needs_harness
def test_the_plugin_refuses_what_it_cannot_do(small_model):
    from llavolta.harness.plugin import Llavolta

    with pytest.raises(PlanError, match="names layer 9"):
        Llavolta.create_from_arg_string(f"pretrained={small_model},plan=9:avgpool:2", {"device": "cpu"})
    with pytest.raises(Exception, match="batch_size must be a whole number"):
        Llavolta(str(small_model), batch_size="auto")
    with pytest.raises(Exception, match="unknown dtype 'float7'"):
        Llavolta(str(small_model), dtype="float7", device="cpu")
    made = Llavolta.create_from_arg_string(
        f"pretrained={small_model},plan=0:avgpool:stride=2;2:random:0.5,pad_to_square=true", {"device": "cpu"}
    )
    assert made.plan == "0:avgpool:2;2:random:0.5:0" and made.pad == (123, 117, 104)


# Clips.


@needs_harness
def test_msvd_qa_is_scored_by_exact_match(evaluated):
    samples = run.read_samples(evaluated[0], "msvd_qa")
    assert [sample["input"] for sample in samples] == [q + WORD.replace("\n", " ") for q in MSVD]
    right = [command._text(sample["filtered_resps"]) == "yes" for sample in samples]
    assert evaluated[1].set_index("task").value["msvd_qa"] == sum(right) / 2


def test_a_judged_score_without_a_judge_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert command.main(["run", "--model", "m", "--tasks", "gqa,mmvet", "--output", str(tmp_path / "out")]) == 1
    assert "mmvet: scored by a language model as judge" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="set OPENAI_API_KEY"):
        video.score_judged({"question": "?", "answer": "a"}, ["b"])


def test_published_video_questions_become_tasks(tmp_path):
    for name in ("video7010.mp4", "video7011.mp4"):
        (tmp_path / name).touch()
    questions, answers = tmp_path / "test_q.json", tmp_path / "test_a.json"
    questions.write_text(json.dumps([{"video_name": "video7010", "question_id": 5, "question": "what is this"}]))
    answers.write_text(json.dumps([{"question_id": 5, "answer": "a couch", "type": 0}]))
    folder = video.prepare("msrvtt_qa", questions, tmp_path, tmp_path / "tasks", answers)
    (row,) = json.loads((folder / "msrvtt_qa.json").read_text())
    assert row["video"].endswith("video7010.mp4") and (row["answer"], row["question_id"]) == ("a couch", "5")
    assert sorted(file.name for file in folder.glob("*.yaml")) == ["msrvtt_qa.yaml", "msrvtt_qa_judged.yaml"]
    for wrong, message in (
        ([{"video_id": 7012, "id": 1, "question": "who", "answer": "man"}], "lacks the clips of 1 of 1 questions"),
        ([{"video_id": 7011, "id": 1, "question": "who"}], "an entry has no 'answer'"),
        ([], "must hold a JSON list"),
    ):
        questions.write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=message):
            video.prepare("msrvtt_qa", questions, tmp_path, tmp_path / "tasks")


def test_questions_in_the_tasks_words():
    words = {"pre_prompt": "", "post_prompt": " Answer briefly."}
    assert video.doc_to_text({"question": "what is this"}, words) == "What is this? Answer briefly."
    assert video.doc_to_text({"question": "Who is it?"}, words) == "Who is it? Answer briefly."


# Reading and checking results.


def result_folder(folder: Path, scores: dict, answers: int, plan: str = "none") -> Path:
    (folder / "model").mkdir(parents=True)
    results = {"results": {"t": {"alias": "t", **scores}}, "group_subtasks": {"t": []}}
    results |= {"configs": {"t": {"metric_list": [{"metric": "acc"}, {"metric": "submission"}]}}}
    results |= {"n-samples": {"t": {"original": 2, "effective": 2}}, "throughput": {"total_elapsed_time": 1.5}}
    results |= {"config": {"model_args": f"pretrained=m,plan={plan}"}}
    (folder / "model" / "1_results.json").write_text(json.dumps(results))
    lines = [json.dumps({"doc_id": i, "filtered_resps": "yes"}) for i in reversed(range(answers))]
    (folder / "model" / "1_samples_t.jsonl").write_text("\n".join(lines))
    return folder


def test_results_are_read_with_their_plan(tmp_path):
    folder = result_folder(tmp_path, {"acc,none": 0.5, "acc_stderr,none": "N/A"}, 2, "8:fastv:ratio=0.5;16:fastv:0.5")
    run.check_results(folder, ["t"])
    row = run.read_results(folder).iloc[0].to_dict()
    assert row == {"model": "m", "plan": "8:fastv:ratio=0.5;16:fastv:0.5", "task": "t", "metric": "acc"} | {
        "value": 0.5,
        "questions": 2,
        "seconds": 1.5,
    }
    assert [sample["doc_id"] for sample in run.read_samples(folder, "t")] == [0, 1]


@pytest.mark.parametrize(
    ("scores", "answers", "message"),
    [
        ({"acc,none": 0.5}, 1, "1 answers to 2 questions"),
        ({"acc,none": float("nan")}, 2, "no score acc"),
        ({"acc,none": "N/A"}, 2, "no score acc"),
        ({}, 2, "no score"),
        ({"submission,none": None}, 2, "no score"),  # and no submission file
    ],
)
def test_results_that_are_not_whole_are_refused(tmp_path, scores, answers, message):
    with pytest.raises(ConfigError, match=message):
        run.check_results(result_folder(tmp_path, scores, answers), ["t"])


def test_nothing_is_overwritten_and_a_bad_plan_is_seen_first(tmp_path):
    (tmp_path / "old").touch()
    with pytest.raises(ConfigError, match="holds something already"):
        run.run("m", ["gqa"], tmp_path)
    with pytest.raises(PlanError, match="unknown compressor"):
        run.run("m", ["gqa"], tmp_path / "new", "2:nothing:1")
    with pytest.raises(ConfigError, match="holds 0 result files"):
        run.read_results(tmp_path)


def test_different_answers_or_verdicts_are_found():
    own = pd.DataFrame({"prediction": ["yes", "3"], "correct": [True, False]}, index=[4, 7])
    samples = pd.DataFrame({"filtered_resps": ["yes", ["3"]], "exact_match": [1.0, 0.0]})
    command.compare(samples, own)
    with pytest.raises(ConfigError, match="1 of 2 answers differ.*question 7: '4' by lmms-eval, '3' by us"):
        command.compare(samples.assign(filtered_resps=["yes", "4"]), own)
    with pytest.raises(ConfigError, match="1 answers are scored differently"):
        command.compare(samples.assign(exact_match=[1.0, 1.0]), own)


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is here")
def test_without_the_harness_one_line_says_how_to_get_it():
    with pytest.raises(ConfigError, match="make eval"):
        local.shipped("gqa/gqa.yaml")


def test_the_extra_environment_adds_to_the_pins_and_changes_none():
    def pins(file):
        lines = [line for line in (ROOT / file).read_text().splitlines() if line and not line.startswith("#")]
        return {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower(): line.split("==")[1] for line in lines}

    extra, ours = pins("requirements-eval.txt"), pins("constraints.txt")
    assert extra["lmms-eval"] == "0.7.3" and "torchvision" not in extra
    assert {name: extra[name] for name in extra.keys() & ours.keys()}.items() <= ours.items()
