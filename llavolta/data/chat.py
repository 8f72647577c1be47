"""Conversations as text, rendered with the processor's chat template.

Training (``Collator``) and evaluation both render through this module, so a model is asked in the
format that it was trained on.
"""

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
    """Render messages with the chat template of a processor.

    Args:
        processor: A transformers processor with a chat template.
        messages: Messages in transformers' chat format. Control tokens that their texts quote are
            broken up, see ``as_text``.
        **options: Options of ``apply_chat_template``, such as ``add_generation_prompt``.

    Returns:
        The rendered text.

    Raises:
        DataError: The template rejects the conversation, for example its system turn.
    """
    messages = [_with_texts(message, lambda text: as_text(processor, text)) for message in messages]
    try:
        return processor.apply_chat_template(messages, tokenize=False, **options)
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message["role"] for message in messages[:4])
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"the model's chat template refuses these turns ({roles}): {why}") from None


def as_text(processor, text: str) -> str:
    """Put a blank into each control token that a text quotes, so that it is read as plain text.

    Control tokens are the added tokens that the processor or the tokenizer has a name for (begin,
    end, padding, image, ...), and the special tokens that the chat template writes. Other special
    tokens, such as Qwen's for boxes, stay, because a data set may train them.

    Args:
        processor: The processor whose tokenizer will read the text.
        text: The text of a turn.

    Returns:
        The text, with ``<|im_end|>`` as ``< |im_end|>``, for example.
    """
    # Template and vocabulary are cache keys: a user may change them on the same processor.
    control = _control(processor, str(processor.chat_template), len(processor.tokenizer))
    return control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


@lru_cache(maxsize=8)
def _control(processor, template: str, vocabulary: int) -> re.Pattern:
    """Compile the pattern that matches control tokens; see ``as_text``."""
    tokenizer = processor.tokenizer
    # Processors hold the names of their tokens in attributes, such as processor.image_token.
    values = [*vars(processor).values(), *tokenizer.special_tokens_map.values()]
    named = {value for value in values if isinstance(value, str)}
    added = (token for token in tokenizer.added_tokens_decoder.values() if len(token.content) > 1)
    control = [
        token.content
        for token in added
        if token.content in named or token.special and token.content in template
    ]
    # Longest first, as a token may begin with another one. "(?!)" matches nothing.
    return re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")


def _with_texts(message: dict, change: Callable[[str], str]) -> dict:
    """Return a copy of a message with each of its texts changed."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": change(content)}
    parts = [
        {**part, "text": change(part["text"])} if part["type"] == "text" else part
        for part in content
    ]
    return {**message, "content": parts}


def split_at(processor, messages: list[dict], role: str, **options) -> list[str]:
    """Render a conversation, and cut it where the texts of one role begin and end.

    Args:
        processor: A transformers processor with a chat template.
        messages: Messages in transformers' chat format.
        role: "system", "user" or "assistant".
        **options: Options of ``apply_chat_template``.

    Returns:
        2n + 1 pieces for n messages of ``role``: every second one, from the second, is such a
        message's text. Joined, the pieces are the rendered text.

    Raises:
        DataError: The template rejects the conversation, or does not write these texts as they are.
    """
    text = render(processor, messages, **options)
    # A private-use character that the text does not contain marks the cuts.
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
    """Return a message with ``mark`` before and after its text."""
    content = message["content"]
    count = 1 if isinstance(content, str) else sum(part["type"] == "text" for part in content)
    numbers = iter(range(count))

    def put(text: str) -> str:
        number = next(numbers)
        # Inside the outer blanks, so that a template that trims texts trims these ones the same.
        text = re.sub(r"\A\s*", rf"\g<0>{mark}", text, count=1) if number == 0 else text
        return re.sub(r"\s*\Z", rf"{mark}\g<0>", text, count=1) if number == count - 1 else text

    return _with_texts(message, put)


def write(processor, messages: list[dict], ask: bool = False) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation, and find the answers in it that are trained on.

    The span of an answer runs from the end of the generation prompt to the end of what the template
    writes after the answer, such as the end token. Where the template writes no end token, as that
    of llava-1.5-7b-hf, the tokenizer's end-of-sequence token is added. A message with
    ``"learn": False`` is rendered but has no span.

    Args:
        processor: A transformers processor with a chat template.
        messages: Messages in transformers' chat format.
        ask: Whether the text ends with the generation prompt.

    Returns:
        The text, and the (start, end) of each span in characters.

    Raises:
        DataError: The template rejects the conversation, or writes a turn differently once other
            turns follow it.
    """
    pieces = split_at(processor, messages, "assistant", add_generation_prompt=ask)
    text, spans = pieces[0], []  # text grows to the whole conversation
    if len(pieces) == 1:
        return text, spans
    first = next(
        number for number, message in enumerate(messages) if message["role"] == "assistant"
    )
    # What the template writes around the first answer is found by rendering, and must stand around
    # all others too. So two more renderings suffice, however many turns there are.
    before = render(processor, messages[:first], add_generation_prompt=True)
    after = render(processor, messages[: first + 1])
    # lead: between generation prompt and answer, often a blank. behind: after the answer.
    lead, behind = text[len(before) :], after[len(text) + len(pieces[1]) :]
    alike = all(piece.endswith(lead) for piece in pieces[:-1:2]) and all(
        p.startswith(behind) for p in pieces[2::2]
    )
    if not (alike and text.startswith(before) and "".join(pieces).startswith(after)):
        raise DataError(REWRITES)
    tokenizer = processor.tokenizer
    eos, end = tokenizer.eos_token or "", behind.rstrip()
    # Without an end token in its labels, the model would never learn to stop.
    added = "" if end.endswith((*tokenizer.get_added_vocab(), eos)) else eos
    answers = (message for message in messages if message["role"] == "assistant")
    # pieces alternate: the template's text up to an answer, the answer, the template's text, ...
    for message, answer, rest in zip(answers, pieces[1::2], pieces[2::2], strict=True):
        start = len(text) - len(lead)
        text += answer + end + added
        if message.get("learn", True):
            # The blanks that the template writes after its end token belong to the span.
            spans.append((start, len(text) + (0 if added else len(behind) - len(end))))
        text += rest[len(end) :]  # rest begins with ``end``, which is in the text already
    return text, spans


def within(text: str, spans: list[tuple[int, int]], offsets: torch.Tensor) -> torch.Tensor:
    """Find the tokens that overlap any of the spans.

    A token that starts in the blanks before a span counts as well, because some tokenizers join a
    blank and the next word in one token.

    Args:
        text: The rendered text.
        spans: (start, end) of each span, in characters of ``text``.
        offsets: (T, 2) start and end of each token in ``text``; -1 for tokens without a place in
            it.

    Returns:
        (T,) bool, True for tokens of a span.
    """
    starts, ends = offsets.unbind(1)
    found = torch.zeros(len(offsets), dtype=torch.bool)
    for first, last in spans:
        blanks = len(text[:first].rstrip())  # where the blanks before the span begin
        found |= (starts >= blanks) & (ends > first) & (starts < last) & (ends > starts)
    return found


def special(processor, text: str) -> dict:
    """Return tokenizer options that avoid a second begin token before a rendered text.

    Chat templates often write the begin token themselves. ``apply_chat_template`` of transformers'
    processors sets the same option.
    """
    begin = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if begin and text.startswith(begin) else {}


def encode(
    processor, texts: Sequence[str], images: list[list], videos: list[list], padding_side: str
):
    """Tokenize rendered texts and preprocess their images and videos.

    Args:
        processor: A transformers processor.
        texts: B texts, all rendered with the same template.
        images: B lists, the opened images of each text.
        videos: The frames of each video of the batch, in the order of the texts.
        padding_side: "left" or "right".

    Returns:
        The processor's batch, padded: input_ids and attention_mask (B, T), and the pixel values.

    Raises:
        DataError: There are videos, and the processor has no video processor.
    """
    if videos and not hasattr(processor, "video_processor"):
        raise DataError(
            f"{type(processor).__name__} reads no video; train a model that does, or drop them"
        )
    visual = {"images": images if any(images) else None} | ({"videos": videos} if videos else {})
    padding = dict(padding=True, padding_side=padding_side, return_tensors="pt")
    return processor(text=list(texts), **visual, **padding, **special(processor, texts[0]))
