"""Where methods break: position, small detail, and a second question about a picture compressed for the first one."""

from __future__ import annotations

from itertools import islice

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache

from llavolta.compression.patch import compress
from llavolta.compression.plan import VISION, parse_plan
from llavolta.data import LlavaData, chat
from llavolta.data.entries import media_paths_of
from llavolta.studies.evaluation import answer_limit, check_questions, greedy, is_right
from llavolta.studies.opening import StudyError, answering
from llavolta.studies.statistics import interval

POSITION_TYPES = ("read", "where", "neighbour")
"""Question types of the worlds that ask what is in a place, or where a thing is."""
SMALL = 0.2  # objects this small, as a share of the picture's sides, are those of grids of 5 x 5
TASKS = (
    "position",
    "small detail",
    "second question, asked along",
    "second question, on one cache",
)


def tasks_of(data: LlavaData, answers: pd.DataFrame) -> dict[str, pd.Series]:
    """(n,) bool per task, which rows of ``answers`` (see ``evaluation.evaluate``) belong to it: "position" by the
    question's type; "small detail" where the entry lists its ``objects``, all of them small. Tasks that the data has
    nothing of are left out."""
    shares = {index: _largest(data, index) for index in answers["index"].unique()}
    found = {
        "position": answers.type.isin(POSITION_TYPES),
        "small detail": answers["index"].map(shares).le(SMALL),
    }
    return {task: rows for task, rows in found.items() if rows.any()}


def _largest(data: LlavaData, index: int) -> float:
    """The largest of an entry's objects as a share of its picture's side; NaN where it lists none, or has not one
    picture."""
    entry = data.entry(index)
    boxes, paths = [thing["box"] for thing in entry.get("objects") or ()], media_paths_of(entry)
    if not boxes or len(paths) != 1:
        return float("nan")
    width, height = data.picture_size(index, paths[0], data._name(index, entry))
    return max(max((right - left) / width, (low - top) / height) for left, top, right, low in boxes)


def second_questions(
    model,
    processor,
    data: LlavaData,
    plan: str = "none",
    limit: int | None = None,
    one_cache: bool = True,
    batch_size: int = 32,
    progress: bool = False,
) -> pd.DataFrame:
    """The second question of each entry's conversation, behind the first and its true answer; rows as of ``evaluate``.

    one_cache: the first question is read alone, so that the pictures are compressed with it in sight, and the second is
    asked on its cache, as in a chat; else both are read at once, and a compressor that looks at the text sees the
    second one, too. limit: the first so many entries that have a second question. Raises StudyError if none has.
    """
    with_two = (index for index in range(len(data)) if len(data.questions_of(index)) > 1)
    questions = [data.questions_of(index)[1] for index in islice(with_two, limit)]
    if not questions:
        raise StudyError(f"{data.file}: no entry has a second question")
    check_questions(processor, questions, data)
    length = answer_limit(processor, (question["answer"] for question in questions))
    first_layer = any(
        layer in (VISION, 0) and not c.is_identity for layer, c in parse_plan(plan).items()
    )
    predictions: list[str] = []
    with answering(model), compress(model, plan):
        for start in tqdm(
            range(0, len(questions), batch_size), desc="talking", disable=not progress, leave=False
        ):
            examples = [
                data[question["index"]] for question in questions[start : start + batch_size]
            ]
            heads, tails = zip(
                *(_parts(processor, example.messages) for example in examples), strict=True
            )
            texts = (
                heads
                if one_cache
                else [head + tail for head, tail in zip(heads, tails, strict=True)]
            )
            images = [example.images for example in examples]
            batch = chat.encode(processor, texts, images, [], padding_side="left")
            batch, given = batch.to(model.device, model.dtype), {}
            if one_cache:
                given = dict(past_key_values=DynamicCache(config=model.config.get_text_config()))
                greedy(
                    model, processor, batch, 1, **given
                )  # by generate(), which counts positions without padding
                settings = dict(
                    padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
                )
                asked = processor.tokenizer(list(tails), **settings).to(model.device)
                # generate() leaves out of the ids what the cache holds, unless its first layer holds fewer.
                names = ("attention_mask",) if first_layer else ("input_ids", "attention_mask")
                batch = {
                    **asked,
                    **{name: torch.cat([batch[name], asked[name]], 1) for name in names},
                }
            ids = greedy(model, processor, batch, length, **given)[:, batch["input_ids"].shape[1] :]
            predictions += processor.batch_decode(ids, skip_special_tokens=True)
    frame = pd.DataFrame(questions).drop(columns="turn").assign(prediction=predictions)
    return frame.assign(correct=list(map(is_right, frame.prediction, frame.answer)))


def _parts(processor, messages: list[dict]) -> tuple[str, str]:
    """A conversation as text up to where its first answer begins, and from there to where its second one does."""
    asked = [number for number, message in enumerate(messages) if message["role"] == "user"]
    first, both = (
        chat.write(processor, messages[: number + 1], ask=True)[0] for number in asked[:2]
    )
    if not both.startswith(first):
        raise StudyError(
            "this model's chat template rewrites earlier turns, so a second question needs a cache anew"
        )
    return first, both[len(first) :]


def breaking(
    model,
    processor,
    data: LlavaData,
    answers: pd.DataFrame,
    plans: pd.DataFrame,
    talks: int = 100,
    progress=True,
) -> pd.DataFrame:
    """One row per method and task of TASKS: method, task, questions, accuracy and its 95% interval (low, high).

    answers: of ``budgets.training_free``; plans: rows of ``budgets.plans_at`` at one budget, whose answers are counted;
    talks: how many conversations of two questions, 0 for none. Methods without a plan here, such as no compression,
    take "none".
    """
    rows = []
    budget = plans.budget.iloc[0]
    asked = answers[answers.budget == budget]
    plan_of = dict(zip(plans.method, plans.plan, strict=True))
    for method in tqdm(asked.method.unique(), desc="methods", disable=not progress, leave=False):
        own = asked[asked.method == method]
        found = {task: own.correct[which] for task, which in tasks_of(data, own).items()}
        for task, one_cache in ((TASKS[2], False), (TASKS[3], True)) if talks else ():
            told = second_questions(
                model, processor, data, plan_of.get(method, "none"), talks, one_cache
            )
            found[task] = told.correct
        for task, correct in found.items():
            low, high = interval(correct)
            row = dict(
                method=method,
                task=task,
                questions=len(correct),
                accuracy=correct.mean(),
                low=low,
                high=high,
            )
            rows.append(row)
    return pd.DataFrame(rows)
