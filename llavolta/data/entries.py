"""One conversation of LLaVA's JSON: its form, its checks, and transformers' chat format of it."""

from __future__ import annotations

import re
from reprlib import repr as short

from llavolta.errors import DataError

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
SPEAKERS = {role: speaker for speaker, role in ROLES.items()}
MEDIA = {"image": "<image>", "video": "<video>"}  # an entry's key, and what stands for it in the text
MARKS = ("<bbox>", "<ref-object>")  # ms-swift's, which it fills from an entry's 'objects'
PLACEHOLDER = re.compile("<(image|video)>")
_SURROGATE = re.compile("[\ud800-\udfff]")


def media_paths_of(entry: dict, medium: str = "image") -> list[str]:
    paths = entry.get(medium)
    return [] if not paths else [paths] if isinstance(paths, str) else list(paths)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def as_llava(entry: object) -> object:
    """``entry`` with ``conversations`` of ``from`` and ``value`` where it has ``messages`` of ``role`` and ``content``.

    A content may be a list of parts, as in transformers' chat format; what is of neither form stays as it is.
    """
    turns = entry.get("conversations", entry.get("messages")) if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not any(isinstance(turn, dict) and "role" in turn for turn in turns):
        return entry
    others = {key: value for key, value in entry.items() if key != "messages"}
    return {**others, "conversations": [_turn(turn) for turn in turns]}


def _turn(turn: object) -> object:
    if not isinstance(turn, dict) or "role" not in turn:
        return turn
    content = turn.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        parts = [part.get("text") if part.get("type") == "text" else MEDIA.get(part.get("type")) for part in content]
        content = "".join(map(str, parts)) if all(isinstance(part, str) for part in parts) else content
    return {"from": SPEAKERS.get(turn["role"], turn["role"]), "value": content}


def check_entry(entry: object, name: str) -> str:
    """The text of ``entry``, a turn a line, if it is a LLaVA conversation whose placeholders match its pictures and
    videos; else raises DataError, naming it ``name``."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{name} has no 'conversations' list; the file is not in LLaVA's format")
    for turn in turns:
        texts = isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("from", "value"))
        if not texts or turn["from"] not in ROLES:
            raise DataError(f"{name}: each turn needs 'from' (human or gpt) and 'value' (text), not {short(turn)}")
    speakers = [turn["from"] for turn in turns if turn["from"] != "system"]
    asked = len(speakers) // 2
    if not asked or speakers != ["human", "gpt"] * asked:
        raise DataError(f"{name}: the turns must alternate human, gpt, human, gpt, ..., not {speakers[:6]}")
    text = "\n".join([turn["value"] for turn in turns])
    asking = "\n".join([turn["value"] for turn in turns if turn["from"] == "human"])
    if not _is_text(text):
        raise DataError(f"{name}: the text holds half a character (a lone surrogate) and is damaged")
    for medium, placeholder in MEDIA.items():
        paths = entry.get(medium)
        if paths is not None and not isinstance(paths, (str, list)):
            raise DataError(f"{name}: '{medium}' must be a path or a list of paths, not {type(paths).__name__}")
        paths, placeholders = media_paths_of(entry, medium), text.count(placeholder)
        if not all(map(_is_text, paths)):
            raise DataError(f"{name}: '{medium}' must list paths, not {short(paths)}")
        if not paths:
            continue  # the words are text, such as HTML's <video>
        if asking.count(placeholder) != placeholders:
            raise DataError(f"{name} has {placeholder} in an answer or a system message; {medium}s belong to questions")
        if placeholders != len(paths):
            raise DataError(
                f"{name} has {placeholders} {placeholder} placeholders for {len(paths)} {medium}s; they must be equal"
            )
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark and any(entry.get(medium) for medium in MEDIA):
        raise DataError(
            f"{name} has the mark {mark}, which is not filled from 'objects' here and would be learned as a word; "
            "write the box or name itself into the text, in the form of the model's family"
        )
    types = entry.get("types")
    if types and not (isinstance(types, list) and len(types) == asked and all(map(_is_text, types))):
        raise DataError(f"{name}: 'types' must name a type for each of the {asked} questions, not {short(types)}")
    return text


def plain_text(entry: dict, text: str) -> str:
    """``text`` with the words <image> and <video> broken up where ``entry`` has none of it: else tokenizers
    take them for media."""
    for medium, placeholder in MEDIA.items():
        if not media_paths_of(entry, medium):
            text = text.replace(placeholder, f"< {medium}>")
    return text


def chat_messages(entry: dict) -> list[dict]:
    """transformers' chat format. Media stand where the text has them; one at an end goes first, as in LLaVA."""
    messages = []
    for turn in entry["conversations"]:
        first, *rest = PLACEHOLDER.split(plain_text(entry, turn["value"]).strip())
        media, texts = rest[::2], [first, *rest[1::2]]
        if len(media) == 1 and not all(text.strip() for text in texts):
            texts = ["", "".join(texts)]
        parts = [{"type": "text", "text": texts[0].strip() if not media else texts[0].lstrip()}]
        for medium, text in zip(media, texts[1:], strict=True):
            parts += [{"type": medium}, {"type": "text", "text": text.strip()}]
        parts = [part for part in parts if part.get("text") != ""]
        if len(parts) == len(media):  # templates look for a text
            parts.append({"type": "text", "text": ""})
        messages.append({"role": ROLES[turn["from"]], "content": parts})
    return messages
