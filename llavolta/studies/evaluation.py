"""Accuracy of a model on questions about pictures, per question type, beside the best constant answer."""

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

LEAST_NEW_TOKENS = 4  # so that a model's own wrong answers can be read


def _normal(text: str) -> str:
    return " ".join(text.strip().rstrip(".").lower().split())


def chat_of(question: str | list[dict], looks: list) -> list[dict]:
    """The messages that ask ``question`` about opened pictures, which go first, and clips (lists of frames) behind
    them. A text with an <image> for each picture, or a list of messages, says itself where they stand."""
    if not isinstance(question, str):
        return question
    if looks and question.count(MEDIA["image"]) == sum(
        not isinstance(look, list) for look in looks
    ) == len(looks):
        turn = {"from": "human", "value": question}
        return chat_messages({"image": ["an image"] * len(looks), "conversations": [turn]})
    media = sorted(
        ({"type": "video" if isinstance(look, list) else "image"} for look in looks),
        key=lambda m: m["type"],
    )
    return [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]


def prompts(
    model, processor, asked: list[tuple[str | list[dict], list]], padding_side: str = "left"
):
    """A batch for ``model`` from pairs of a question and its opened pictures; a list of frames is a clip.

    A question is a text, or messages as of ``pictured``: written as for training, up to where the answer begins.
    """
    images = [[look for look in looks if not isinstance(look, list)] for _, looks in asked]
    videos = [look for _, looks in asked for look in looks if isinstance(look, list)]
    texts = [chat.write(processor, chat_of(*one), ask=True)[0] for one in asked]
    return chat.encode(processor, texts, images, videos, padding_side).to(model.device, model.dtype)


def asked_digest(data: LlavaData, questions: list[dict]) -> bytes:
    """Of what is asked: the questions of ``data``, their answers, and their pictures and clips, byte by byte."""
    digest = hashlib.blake2b(
        json.dumps([questions, data.pad, data.frames]).encode(), digest_size=12
    )
    for index in dict.fromkeys(question["index"] for question in questions):
        digest.update(json.dumps(chat_messages(data.entry(index))).encode())
        for path, content in data.sources(index):
            if content is None:
                content = find_file(data.folder, path, data.file.name).read_bytes()
            digest.update(f"{len(content)} ".encode() + content)
    return digest.digest()


def check_questions(processor, questions: list[dict], data: LlavaData) -> None:
    """Refuse ``questions`` whose words, or whose answers', the tokenizer does not know. Raises DataError."""
    texts = (question[part] for question in questions for part in ("question", "answer"))
    check_words(texts, processor.tokenizer, data.file.name)


def answer_limit(processor, answers: Iterable[str], max_new_tokens: int | None = None) -> int:
    """How many tokens to generate: the longest of the true ``answers`` and its end token, or ``max_new_tokens``.

    Says on stderr how many of the answers a ``max_new_tokens`` cuts off, as they can then never be right. Raises
    ValueError for one below 1.
    """
    if max_new_tokens is not None and (isinstance(max_new_tokens, bool) or max_new_tokens < 1):
        raise ValueError(
            f"max_new_tokens must be a whole number of at least 1, not {max_new_tokens!r}"
        )
    answers = list(answers)
    different = list(dict.fromkeys(answers))
    # A blank stands before an answer in most templates, and is a token of its own in some tokenizers.
    ids = processor.tokenizer([f" {text}" for text in different], add_special_tokens=False)[
        "input_ids"
    ]
    lengths = {text: len(tokens) for text, tokens in zip(different, ids, strict=True)}
    longest = max(lengths.values(), default=0)
    if max_new_tokens is None:
        return max(longest + 1, LEAST_NEW_TOKENS)
    if cut := sum(lengths[text] > max_new_tokens for text in answers):
        print(
            f"max_new_tokens {max_new_tokens} cuts off {cut} of {len(answers)} true answers, which are then wrong; "
            f"the longest has {longest} tokens",
            file=sys.stderr,
        )
    return max_new_tokens


def end_tokens(model, processor) -> list[int]:
    """The tokens that end an answer: those that the model generates with, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    own = [] if own is None else own if isinstance(own, list) else [own]
    return list(dict.fromkeys([*own, processor.tokenizer.eos_token_id]))


@torch.no_grad()
def greedy(model, processor, batch, max_new_tokens: int, **options):
    """What ``model.generate`` returns for a batch padded on the left, decoding greedily; options go to generate."""
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
    """The model's greedy answers to a batch of ``prompts``, and which of them ``max_new_tokens`` cut off."""
    ids = greedy(model, processor, batch, max_new_tokens)[:, batch["input_ids"].shape[1] :]
    ended = torch.isin(ids, torch.tensor(end_tokens(model, processor), device=ids.device)).any(1)
    return processor.batch_decode(ids, skip_special_tokens=True), (~ended).tolist()


def pictured(data: LlavaData, questions: list[dict]) -> list[tuple[list[dict], list]]:
    """Each of ``questions`` (see LlavaData.questions) by ``alone``."""
    return [alone(data[question["index"]], question["turn"]) for question in questions]


def alone(example: Example, turn: int) -> tuple[list[dict], list]:
    """Question ``turn`` of a conversation as it is trained, but without the questions and answers before it.

    Returns:
        The messages: system turns, and the question with its pictures and clips in their places; those of earlier
        questions go first. And the pictures and clips, opened.
    """
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
    looks = [*example.images[: count["image"]], *example.videos[: count["video"]]]
    return [*system, {**question, "content": content}], looks


def is_right(prediction: str, truth: str) -> bool:
    """Exact match but for case, blanks and a full stop."""
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
    """One row per question: index, type, question, answer, prediction, truncated, correct (exact match, case ignored).

    plan: compression in force while answering. limit: the first so many questions. max_new_tokens: of an answer; None:
    as many as the longest true answer has, and its end. truncated: no end token came within them; their number is said
    on stderr where a limit was given, since such an answer is longer than any true one otherwise.
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
