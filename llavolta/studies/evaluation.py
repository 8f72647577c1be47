"""Ask a model questions about images and clips, and score its answers by exact match.

``evaluate`` does both for a data set. ``chat_of``, ``prompts``, ``greedy`` and ``answer`` are its
steps, for one question or batch. See ``statistics`` for accuracies and their intervals.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from itertools import islice

import pandas as pd
import torch
from tqdm.auto import tqdm

from llavolta.compression.patch import compress
from llavolta.data import Example, LlavaData, chat, check_words
from llavolta.data.entries import MEDIA, chat_messages
from llavolta.data.images import find_file
from llavolta.studies.opening import answering

LEAST_NEW_TOKENS = 4  # room for wrong answers that are longer than every reference answer


def _normal(text: str) -> str:
    """``text`` in lower case, with single blanks and without a full stop at the end."""
    return " ".join(text.strip().rstrip(".").lower().split())


def chat_of(question: str | list[dict], looks: list) -> list[dict]:
    """Build the messages that ask ``question`` about images and clips.

    Args:
        question: A text, or messages, which are returned as they are. If the text has one <image>
            for each of ``looks``, the images stand there. Otherwise all images stand first, then
            all clips, then the text.
        looks: Opened images, and clips as lists of frames.

    Returns:
        Messages in transformers' chat format.
    """
    if not isinstance(question, str):
        return question
    if looks and question.count(MEDIA["image"]) == sum(
        not isinstance(look, list) for look in looks
    ) == len(looks):
        turn = {"from": "human", "value": question}
        return chat_messages({"image": ["an image"] * len(looks), "conversations": [turn]})
    # Sorting puts "image" before "video".
    media = sorted(
        ({"type": "video" if isinstance(look, list) else "image"} for look in looks),
        key=lambda m: m["type"],
    )
    return [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]


def prompts(
    model, processor, asked: list[tuple[str | list[dict], list]], padding_side: str = "left"
):
    """Build a batch of questions, rendered as for training up to where the answer begins.

    Args:
        model: The model, whose device and dtype the batch gets.
        processor: The model's processor.
        asked: B pairs of a question, see ``chat_of``, and its images and clips. A clip is a list
            of frames.
        padding_side: "left" for generation, or "right".

    Returns:
        The processor's batch, with ``input_ids`` and ``attention_mask`` (B, T) and the pixels.

    Raises:
        DataError: The chat template does not accept the messages, or the processor reads no video.
    """
    # The processor takes images per text, but clips of the whole batch in one list.
    images = [[look for look in looks if not isinstance(look, list)] for _, looks in asked]
    videos = [look for _, looks in asked for look in looks if isinstance(look, list)]
    texts = [chat.write(processor, chat_of(*one), ask=True)[0] for one in asked]
    return chat.encode(processor, texts, images, videos, padding_side).to(model.device, model.dtype)


def asked_digest(data: LlavaData, questions: list[dict]) -> bytes:
    """Compute a digest of everything that is asked, to name saved answers by.

    Args:
        data: The data set, with its padding and number of frames.
        questions: Some of ``data.questions()``.

    Returns:
        12 bytes, from the questions, the conversations and the bytes of their images and clips.
    """
    # Padding and number of frames change what the model sees of the same files.
    digest = hashlib.blake2b(
        json.dumps([questions, data.pad, data.frames]).encode(), digest_size=12
    )
    for index in dict.fromkeys(question["index"] for question in questions):
        digest.update(json.dumps(chat_messages(data.entry(index))).encode())
        # A medium is either a file below the data's folder, or its bytes stand in the data.
        for path, content in data.sources(index):
            if content is None:
                content = find_file(data.folder, path, data.file.name).read_bytes()
            digest.update(f"{len(content)} ".encode() + content)
    return digest.digest()


def check_questions(processor, questions: list[dict], data: LlavaData) -> None:
    """Check that the tokenizer knows the words of the questions and reference answers.

    Args:
        processor: The model's processor.
        questions: Rows of ``data.questions()``.
        data: The data set, which the error names.

    Raises:
        DataError: Less than 99% of the words are known.
    """
    texts = (question[part] for question in questions for part in ("question", "answer"))
    check_words(texts, processor.tokenizer, data.file.name)


def answer_limit(processor, answers: Iterable[str], max_new_tokens: int | None = None) -> int:
    """Choose how many tokens to generate.

    If ``max_new_tokens`` is shorter than some reference answers, a line on stderr gives their
    number, because a truncated answer is always wrong.

    Args:
        processor: The model's processor.
        answers: The reference answers.
        max_new_tokens: The limit; None: the longest reference answer and its end token, at least
            LEAST_NEW_TOKENS.

    Returns:
        The number of new tokens.

    Raises:
        ValueError: ``max_new_tokens`` is below 1.
    """
    if max_new_tokens is not None and (isinstance(max_new_tokens, bool) or max_new_tokens < 1):
        raise ValueError(
            f"max_new_tokens must be a whole number of at least 1, not {max_new_tokens!r}"
        )
    answers = list(answers)
    different = list(dict.fromkeys(answers))
    # Most templates write a blank before an answer. Some tokenizers make it a token of its own.
    ids = processor.tokenizer([f" {text}" for text in different], add_special_tokens=False)[
        "input_ids"
    ]
    # Most data sets repeat few answers, so only the different ones are tokenized.
    lengths = {text: len(tokens) for text, tokens in zip(different, ids, strict=True)}
    longest = max(lengths.values(), default=0)
    if max_new_tokens is None:
        return max(longest + 1, LEAST_NEW_TOKENS)
    if cut := sum(lengths[text] > max_new_tokens for text in answers):
        print(
            f"max_new_tokens {max_new_tokens} cuts off {cut} of {len(answers)} true answers, "
            f"which are then wrong; the longest has {longest} tokens",
            file=sys.stderr,
        )
    return max_new_tokens


def end_tokens(model, processor) -> list[int]:
    """List the ids that end an answer: the generation config's and the tokenizer's."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return list(dict.fromkeys([*own, processor.tokenizer.eos_token_id]))


@torch.no_grad()
def greedy(model, processor, batch, max_new_tokens: int, **options):
    """Decode greedily with ``model.generate``.

    Args:
        model: The model.
        processor: The model's processor.
        batch: A batch of ``prompts``, padded on the left.
        max_new_tokens: New tokens at most.
        options: Further options of ``generate``.

    Returns:
        What ``generate`` returns: ids (B, T + new), or its dictionary if ``options`` ask for it.
    """
    tokenizer = processor.tokenizer
    return model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(model, processor),
        **options,
    )


def answer(model, processor, batch, max_new_tokens: int) -> tuple[list[str], list[bool]]:
    """Answer a batch of ``prompts`` greedily.

    Args:
        model: The model.
        processor: The model's processor.
        batch: A batch of ``prompts``, padded on the left.
        max_new_tokens: New tokens at most.

    Returns:
        The B answers, and for each whether it was truncated: no end token was generated.
    """
    # (B, T + new) -> (B, new)
    ids = greedy(model, processor, batch, max_new_tokens)[:, batch["input_ids"].shape[1] :]
    ended = torch.isin(ids, torch.tensor(end_tokens(model, processor), device=ids.device)).any(1)
    return processor.batch_decode(ids, skip_special_tokens=True), (~ended).tolist()


def pictured(data: LlavaData, questions: list[dict]) -> list[tuple[list[dict], list]]:
    """Return the messages and images of each of ``questions``; see ``alone``."""
    return [alone(data[question["index"]], question["turn"]) for question in questions]


def alone(example: Example, turn: int) -> tuple[list[dict], list]:
    """Take one question out of a conversation, without the questions and answers before it.

    Args:
        example: The conversation.
        turn: The question's number among the user's messages, from 0.

    Returns:
        The messages: system turns, and the question with its images and clips in their places.
        Those of earlier questions stand first. And the opened images and clips.
    """
    # The index of the question's message among all messages.
    number = [place for place, message in enumerate(example.messages) if message["role"] == "user"][
        turn
    ]
    before, question = example.messages[:number], example.messages[number]
    shown = [part for message in before for part in message["content"] if part["type"] != "text"]
    content = [*shown, *question["content"]]
    count = {
        medium: sum(part["type"] == medium for part in content) for medium in ("image", "video")
    }
    system = [message for message in before if message["role"] == "system"]
    # Images are listed in their order in the conversation, so the first ``count`` belong here.
    looks = [*example.images[: count["image"]], *example.videos[: count["video"]]]
    return [*system, {**question, "content": content}], looks


def is_right(prediction: str, truth: str) -> bool:
    """Return whether the answers match exactly, up to case, blanks and a full stop at the end."""
    return _normal(prediction) == _normal(truth)


def evaluate(
    model,
    processor,
    data: LlavaData,
    plan: str = "none",
    limit: int | None = None,
    batch_size: int = 64,
    progress: bool = True,
    max_new_tokens: int | None = None,
) -> pd.DataFrame:
    """Ask a model the questions of a data set, and score the answers.

    Every question is asked alone; see ``alone``.

    Args:
        model: A supported vision-language model.
        processor: The model's processor.
        data: The questions.
        plan: The plan in force while answering.
        limit: Number of questions to ask, from the first; None: all.
        batch_size: Questions in a batch.
        progress: Show a progress bar.
        max_new_tokens: Tokens of an answer at most; None: the length of the longest reference
            answer and its end token.

    Returns:
        One row per question: index (of the entry), type, question, answer (the reference answer),
        prediction, truncated, correct. An answer is truncated if no end token was generated. With
        ``max_new_tokens`` their number is printed on stderr. Without it, a truncated answer is
        longer than every reference answer and thus wrong in any case.

    Raises:
        DataError: The tokenizer does not know the words, or an image cannot be read.
        PlanError: The plan cannot be read or does not fit the model.
        UnsupportedModel: The model cannot be compressed under this plan.
        ValueError: ``max_new_tokens`` is below 1.
    """
    questions = list(islice(data.questions(), limit))
    check_questions(processor, questions, data)
    length = answer_limit(processor, (question["answer"] for question in questions), max_new_tokens)
    predictions, truncated = [], []
    with answering(model), compress(model, plan):
        for start in tqdm(
            range(0, len(questions), batch_size),
            desc="answering",
            disable=not progress,
            leave=False,
        ):
            asked = pictured(data, questions[start : start + batch_size])
            # One limit for all batches: what is truncated does not depend on the batch size.
            said, cut = answer(model, processor, prompts(model, processor, asked), length)
            predictions += said
            truncated += cut
    if max_new_tokens is not None and any(truncated):
        print(
            f"{sum(truncated)} of {len(truncated)} answers did not end in {length} tokens",
            file=sys.stderr,
        )
    frame = (
        pd.DataFrame(questions)
        .drop(columns="turn")
        .assign(prediction=predictions, truncated=truncated)
    )
    return frame.assign(correct=list(map(is_right, frame.prediction, frame.answer)))
