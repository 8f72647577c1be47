"""Measure where methods fail: position, small detail, and a second question about the same image.

A compressor that reads the first question may drop what a second question needs.
"""

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
from llavolta.errors import ConfigError
from llavolta.studies.evaluation import answer_limit, check_questions, greedy, is_right
from llavolta.studies.opening import answering
from llavolta.studies.statistics import interval

POSITION_TYPES = ("read", "where", "neighbour")
"""Question types of the generated data that ask what is at a place, or where an object is."""
# Largest side of a small object, as a share of the image's side: one cell of a 5 x 5 grid.
SMALL = 0.2
TASKS = (
    "position",
    "small detail",
    "second question, asked along",
    "second question, on one cache",
)


def tasks_of(data: LlavaData, answers: pd.DataFrame) -> dict[str, pd.Series]:
    """Select the answers that belong to each task.

    "position" goes by the question's type. "small detail" needs an entry that lists its
    ``objects``, all of them small.

    Args:
        data: The questions that were answered.
        answers: (n,) rows of ``evaluation.evaluate``.

    Returns:
        By task, a boolean series (n,). Tasks without any question are left out.
    """
    shares = {index: _largest(data, index) for index in answers["index"].unique()}
    found = {
        "position": answers.type.isin(POSITION_TYPES),
        "small detail": answers["index"].map(shares).le(SMALL),
    }
    return {task: rows for task, rows in found.items() if rows.any()}


def _largest(data: LlavaData, index: int) -> float:
    """The largest side of an entry's objects, as a share of the image's side.

    NaN if the entry lists no objects, or has no image or several.
    """
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
    """Answer the second question of each conversation, after the first and its reference answer.

    Args:
        model: A supported vision-language model.
        processor: The model's processor.
        data: Conversations about images.
        plan: The plan in force while reading and answering.
        limit: Number of entries with a second question to use; None: all.
        one_cache: True: the first question is read alone, and the second is asked on its cache,
            as in a chat. A compressor that reads the text then sees the first question only.
            False: both questions are read at once.
        batch_size: Conversations in a batch.
        progress: Show a progress bar.

    Returns:
        One row per question: index, type, question, answer, prediction, correct. See
        ``evaluation.evaluate``.

    Raises:
        ConfigError: No entry has a second question, or the chat template rewrites earlier turns.
        DataError: The tokenizer does not know the words of the questions or answers.
    """
    # A generator, so that entries beyond ``limit`` are not opened.
    with_two = (index for index in range(len(data)) if len(data.questions_of(index)) > 1)
    questions = [data.questions_of(index)[1] for index in islice(with_two, limit)]
    if not questions:
        raise ConfigError(f"{data.file}: no entry has a second question")
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
                # Fill the cache by generate(), because it does not count padding in positions.
                greedy(model, processor, batch, 1, **given)
                settings = dict(
                    padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
                )
                asked = processor.tokenizer(list(tails), **settings).to(model.device)
                # generate() skips as many input ids as layer 0 has cached. A plan that compresses
                # before layer 0 leaves fewer there, so only the new ids are passed.
                names = ("attention_mask",) if first_layer else ("input_ids", "attention_mask")
                # The mask covers the cached tokens as well: (B, T1) and (B, T2) -> (B, T1 + T2)
                batch = {
                    **asked,
                    **{name: torch.cat([batch[name], asked[name]], 1) for name in names},
                }
            # The prompt that generate() returns too is cut off: (B, T + new) -> (B, new)
            ids = greedy(model, processor, batch, length, **given)[:, batch["input_ids"].shape[1] :]
            predictions += processor.batch_decode(ids, skip_special_tokens=True)
    frame = pd.DataFrame(questions).drop(columns="turn").assign(prediction=predictions)
    return frame.assign(correct=list(map(is_right, frame.prediction, frame.answer)))


def _parts(processor, messages: list[dict]) -> tuple[str, str]:
    """The text up to the start of the first answer, and from there to the start of the second."""
    asked = [number for number, message in enumerate(messages) if message["role"] == "user"]
    first, both = (
        chat.write(processor, messages[: number + 1], ask=True)[0] for number in asked[:2]
    )
    if not both.startswith(first):
        raise ConfigError(
            "this model's chat template rewrites earlier turns, so a second question needs "
            "a cache anew"
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
    """Measure the accuracy of every method on the tasks of TASKS, at one budget.

    Args:
        model: The model that gave ``answers``.
        processor: The model's processor.
        data: The questions that were answered.
        answers: From ``budgets.training_free``.
        plans: Rows of ``budgets.plans_at``. The budget of the first row is used. Methods that
            have no row here, such as no compression, take the plan "none".
        talks: Conversations of two questions to answer; 0 skips these two tasks.
        progress: Show a progress bar.

    Returns:
        One row per method and task: method, task, questions, accuracy, and its 95% interval (low,
        high).
    """
    rows = []
    budget = plans.budget.iloc[0]
    asked = answers[answers.budget == budget]
    plan_of = dict(zip(plans.method, plans.plan, strict=True))
    for method in tqdm(asked.method.unique(), desc="methods", disable=not progress, leave=False):
        own = asked[asked.method == method]
        found = {task: own.correct[which] for task, which in tasks_of(data, own).items()}
        # Both tasks ask a second question, so they need the model again.
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
