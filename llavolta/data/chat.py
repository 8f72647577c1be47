"""Conversations as text and tokens by the processor's chat template: one way for training and for asking."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from jinja2 import TemplateError

from llavolta.errors import DataError

REWRITES = (
    "the chat template writes a turn otherwise than the same turn later; give one that only appends"
)


def render(processor, messages: list[dict], **options) -> str:
    """Returns ``messages`` as the chat template of ``processor`` writes them.

    Args:
        messages: Of transformers' chat format. Control tokens that their texts quote are text; see ``as_text``.
        options: For the template, such as ``add_generation_prompt``.

    Raises:
        DataError: The template refuses the conversation, such as its system turn.
    """
    messages = [_with_texts(message, lambda text: as_text(processor, text)) for message in messages]
    try:
        return processor.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages[:4])
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"the model's chat template refuses these turns ({roles}): {why}") from None


def as_text(processor, text: str) -> str:
    """Returns ``text`` with a blank in each control token that it quotes, so that the tokenizer reads none.

    Control tokens are those that the tokenizer and the processor know by a name (begin, end, padding, image, ...) and
    the special ones that the chat template writes. Other special tokens, such as Qwen's for boxes, stay: a data set
    may train them.
    """
    control = _control(processor, str(processor.chat_template), len(processor.tokenizer))
    return control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


@lru_cache(maxsize=8)
def _control(processor, template: str, vocabulary: int) -> re.Pattern:
    tokenizer = processor.tokenizer
    values = [*vars(processor).values(), *tokenizer.special_tokens_map.values()]
    named = {value for value in values if isinstance(value, str)}
    added = (token for token in tokenizer.added_tokens_decoder.values() if len(token.content) > 1)
    control = [
        token.content
        for token in added
        if token.content in named or token.special and token.content in template
    ]
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")


def _with_texts(message: dict, change: Callable[[str], str]) -> dict:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": change(content)}
    parts = [
        {**part, "text": change(part["text"])} if part["type"] == "text" else part
        for part in content
    ]
    return {**message, "content": parts}


def split_at(processor, messages: list[dict], role: str, **options) -> list[str]:
    """Returns the rendered text, cut where the text of each turn of ``role`` begins and ends: 2 n + 1 pieces.

    Raises:
        DataError: The template refuses the conversation, or does not write these texts as they are.
    """
    text = render(processor, messages, **options)
    mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
    turns = [_marked(message, mark) if message["role"] == role else message for message in messages]
    pieces = render(processor, turns, **options).split(mark)
    if (
        len(pieces) != 2 * sum(message["role"] == role for message in messages) + 1
        or "".join(pieces) != text
    ):
        raise DataError(REWRITES)
    return pieces


def _marked(message: dict, mark: str) -> dict:
    """``message`` with ``mark`` before and behind its text, within blanks, which some templates trim."""
    content = message["content"]
    count = 1 if isinstance(content, str) else sum(part["type"] == "text" for part in content)
    numbers = iter(range(count))

    def put(text: str) -> str:
        number = next(numbers)
        text = re.sub(r"\A\s*", rf"\g<0>{mark}", text, count=1) if number == 0 else text
        return re.sub(r"\s*\Z", rf"{mark}\g<0>", text, count=1) if number == count - 1 else text

    return _with_texts(message, put)


def write(processor, messages: list[dict], ask: bool = False) -> tuple[str, list[tuple[int, int]]]:
    """Returns a conversation as text, and from where to where in it each answer that is learned goes.

    Its end token belongs to it, and is added where the template, as llava-1.5-7b-hf's, writes none behind an answer. A
    message with ``"learn": False`` is read and not learned.

    Args:
        messages: Of transformers' chat format.
        ask: Whether the text ends where the model is to answer.

    Raises:
        DataError: The template refuses the conversation, or rewrites earlier turns.
    """
    pieces = split_at(processor, messages, "assistant", add_generation_prompt=ask)
    text, spans = pieces[0], []
    if len(pieces) == 1:
        return text, spans
    first = next(
        number for number, message in enumerate(messages) if message["role"] == "assistant"
    )
    # Turns are alike: what stands around the first answer stands around all. So the work grows with the turns alone.
    before = render(processor, messages[:first], add_generation_prompt=True)
    after = render(processor, messages[: first + 1])
    lead, behind = text[len(before) :], after[len(text) + len(pieces[1]) :]
    alike = all(piece.endswith(lead) for piece in pieces[:-1:2]) and all(
        p.startswith(behind) for p in pieces[2::2]
    )
    if not (alike and text.startswith(before) and "".join(pieces).startswith(after)):
        raise DataError(REWRITES)
    tokenizer = processor.tokenizer
    eos, end = tokenizer.eos_token or "", behind.rstrip()
    added = (
        "" if end.endswith((*tokenizer.get_added_vocab(), eos)) else eos
    )  # else it would never learn to stop
    answers = (message for message in messages if message["role"] == "assistant")
    for message, answer, rest in zip(answers, pieces[1::2], pieces[2::2], strict=True):
        start = len(text) - len(lead)
        text += answer + end + added
        if message.get("learn", True):
            spans.append((start, len(text) + (0 if added else len(behind) - len(end))))
        text += rest[len(end) :]
    return text, spans


def within(text: str, spans: list[tuple[int, int]], offsets: torch.Tensor) -> torch.Tensor:
    """(T,) whether a token goes into one of the ``spans`` of ``text``; offsets (T, 2): see ``Collator.offsets``.

    One that begins in the blanks before a span does, too: some tokenizers write a blank and the word behind it as one.
    """
    starts, ends = offsets.unbind(1)
    found = torch.zeros(len(offsets), dtype=torch.bool)
    for first, last in spans:
        blanks = len(text[:first].rstrip())
        found |= (starts >= blanks) & (ends > first) & (starts < last) & (ends > starts)
    return found


def special(processor, text: str) -> dict:
    """The tokenizer's options for a rendered text: no begin token on top of the template's, as in transformers."""
    begin = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if begin and text.startswith(begin) else {}


def encode(
    processor, texts: Sequence[str], images: list[list], videos: list[list], padding_side: str
):
    """Returns the processor's batch of rendered ``texts``, padded.

    Args:
        texts: B of them, all by one template.
        images: Of each text its opened images.
        videos: The frames of each clip of the batch.
        padding_side: "left" or "right".

    Raises:
        DataError: The processor reads no video.
    """
    if videos and not hasattr(processor, "video_processor"):
        raise DataError(
            f"{type(processor).__name__} reads no video; train a model that does, or drop them"
        )
    visual = {"images": images if any(images) else None} | ({"videos": videos} if videos else {})
    padding = dict(padding=True, padding_side=padding_side, return_tensors="pt")
    return processor(text=list(texts), **visual, **padding, **special(processor, texts[0]))
