"""One conversation: each form of entry that is read, made LLaVA's own, and transformers' chat format of that.

JSON and tables come through here alike, so that they cannot differ. ``data/README.md`` lists the forms.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Collection
from reprlib import repr as short
from typing import NamedTuple
from urllib.parse import unquote

from llavolta.errors import DataError

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
SPEAKERS = {role: speaker for speaker, role in ROLES.items()} | {
    speaker: speaker for speaker in ROLES
}
MEDIA = {
    "image": "<image>",
    "video": "<video>",
}  # an entry's key, and what stands for it in the text
MARKS = ("<bbox>", "<ref-object>")  # ms-swift's, which it fills from an entry's 'objects'
PLACEHOLDER = re.compile("<(image|video)>")
READ = {
    "id",
    "image",
    "video",
    "conversations",
    "types",
    "objects",
}  # keys of an entry in LLaVA's form
LEARNED = (
    "learn",
    "loss",
    "weight",
    "train",
    "trainable",
)  # of a turn: whether its answer is learned

# Keys that change what is trained, and that nothing reads: refused, unless the user ignores them.
OF_ENTRIES = (
    *(*LEARNED, "audio", "audios", "functions", "history", "loss_scale", "tools"),
    *("rejected", "rejected_images", "rejected_messages", "rejected_response"),
)
OF_TURNS = (
    *("function_call", "loss_scale", "reasoning", "reasoning_content", "thinking", "tool_calls"),
    *(
        "fps",
        "max_pixels",
        "min_pixels",
        "nframes",
        "resized_height",
        "resized_width",
        "video_end",
        "video_start",
    ),
)
HARMLESS = (
    None,
    "",
    "[]",
    "{}",
    [],
    {},
    True,
)  # values under which such a key changes nothing; 1 is True
_TURNS = "this form is not read; write each as two turns of 'messages', a user's and an assistant's"
OTHER_FORMS = {
    (
        "chosen",
    ): "pairs of preferences are not read; keep the chosen answer as the last turn of 'messages'",
    ("instruction", "output"): _TURNS,  # Alpaca
    ("query", "response"): _TURNS,
    ("question", "answer"): _TURNS,
}
_UNREAD = re.compile(
    "(image|img|picture|photo|video|clip|frame)s?(_?(base64|byte|file|list|name|path|url)s?)?_?[0-9]*"
)
_STILLS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
_BASE64 = re.compile(
    "(iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/\\s]{50,}={0,2}\\s*"
)  # PNG, JPEG, GIF, WebP
_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]+://")
_SURROGATE = re.compile("[\ud800-\udfff]")


class Cell(NamedTuple):
    """An image or clip that stays in its table until it is asked for; place: in the lists of the column's cell."""

    column: str
    place: tuple[int, ...]


def media_paths_of(entry: dict, medium: str = "image") -> list[str | bytes | Cell]:
    """The images or clips of an entry in LLaVA's form: paths, the files' own bytes, or where a table has them."""
    paths = entry.get(medium)
    return [] if not paths else paths if isinstance(paths, list) else [paths]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def read_entry(entry: object, name: str, ignore: Collection[str] = ()) -> dict:
    """``entry`` in LLaVA's form: ``conversations`` of ``from`` and ``value``, ``image``, ``video``.

    Args:
        entry: what a line of JSON or a row of a table holds.
        name: of the entry, for errors.
        ignore: keys of entries, turns and parts that are taken as not there.

    Returns:
        The same entry where it is in that form already. A turn that is not to be learned has ``learn`` False.

    Raises:
        DataError: The entry is of no form that is read, says what nothing follows, or has other
            images than places for them.
    """
    entry = dict(entry) if isinstance(entry, dict) else {}
    for key in ignore:
        entry.pop(key, None)
    turns, of_roles = _turns(entry, name)
    turns = [_turn(turn, name, ignore) for turn in turns]
    if system := entry.pop("system", None):
        if not isinstance(system, str) or any(turn["from"] == "system" for turn in turns):
            raise DataError(
                f"{name}: 'system' must be a text beside turns of which none is a system's"
            )
        turns.insert(0, {"from": "system", "value": [("words", system)]})
    asked = _check_order(turns, name)
    named = {medium for medium in MEDIA if medium in entry or f"{medium}s" in entry}
    given = {medium: _media(entry, medium, name) for medium in MEDIA}
    _refuse(entry, OF_ENTRIES, name, any(given.values()))
    _place(turns, entry, given, named, of_roles, name)
    for turn in turns:
        turn["value"] = "".join([value for _, value in turn["value"]])
    entry["conversations"] = turns
    text = text_of(entry)
    if not _is_text(text):
        raise DataError(
            f"{name}: the text holds half a character (a lone surrogate) and is damaged"
        )
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark and any(entry.get(medium) for medium in MEDIA):
        raise DataError(
            f"{name} has the mark {mark}, which is not filled from 'objects' here and would be learned as a word; "
            "write the box or name itself into the text, in the form of the model's family"
        )
    types = entry.get("types")
    if types and not (
        isinstance(types, list) and len(types) == asked and all(map(_is_text, types))
    ):
        raise DataError(
            f"{name}: 'types' must name a type for each of the {asked} questions, not {short(types)}"
        )
    return entry


def text_of(entry: dict) -> str:
    """A turn a line."""
    return "\n".join([turn["value"] for turn in entry["conversations"]])


def unread_keys(entry: dict) -> set[str]:
    """Of an entry in LLaVA's form, and of its turns: keys that are taken for mere notes."""
    keys = {key for key, value in entry.items() if value is not None} - READ
    return keys.union(*entry["conversations"]) - {"from", "value", "learn"}


def form_of(keys: Collection[str]) -> str | None:
    """The key that holds the conversation of an entry with ``keys``.

    Raises:
        DataError: They are those of a form that is not read.
    """
    found = [key for key in ("conversations", "messages", "texts", "completion") if key in keys]
    if len(found) > 1 and found[1] == "messages":
        raise DataError(
            "has both 'messages' and 'conversations'; take one out, or ignore it (ignore_keys)"
        )
    for marks, form in OTHER_FORMS.items():
        if set(marks) <= set(keys) and ("chosen" in marks or not found):
            raise DataError(f"has {' and '.join(map(repr, marks))}: {form}")
    return next((key for key in found if key != "completion" or "prompt" in keys), None)


def _turns(entry: dict, name: str) -> tuple[list, bool]:
    """The turns of ``entry``, which loses them, and whether they have roles, so that unmarked images go first."""
    if entry.get("messages") == entry.get("conversations"):
        entry.pop("messages", None)
    try:
        form = form_of([key for key, value in entry.items() if value is not None])
    except DataError as error:
        raise DataError(f"{name} {error}") from None
    turns = entry.pop(form, None)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            turns = json.loads(turns)
        except (ValueError, RecursionError):
            raise DataError(f"{name}: {form!r} is a text that is no JSON list of turns") from None
    if form == "completion":
        turns = _prompt_and_completion(entry.pop("prompt"), turns, name)
    elif form == "texts":  # FineVision
        pairs = (
            turns
            if isinstance(turns, list) and all(isinstance(pair, dict) for pair in turns)
            else []
        )
        turns = [
            {"role": role, "content": pair.get(role)}
            for pair in pairs
            for role in ("user", "assistant")
        ]
    if not isinstance(turns, list) or not turns:
        keys = f"; it has {', '.join(map(str, entry))}" if form is None and entry else ""
        raise DataError(f"{name} has no 'conversations' list nor 'messages'{keys}")
    return turns, any(isinstance(turn, dict) and "role" in turn for turn in turns)


def _prompt_and_completion(prompt: object, completion: object, name: str) -> list[dict]:
    """As TRL learns them: of the completion alone."""
    roles = {"user": prompt, "assistant": completion}
    asked, answered = (
        [{"role": role, "content": said}] if isinstance(said, str) else said
        for role, said in roles.items()
    )
    if not all(
        isinstance(said, list) and all(isinstance(turn, dict) for turn in said)
        for said in (asked, answered)
    ):
        raise DataError(f"{name}: 'prompt' and 'completion' must each be a text or a list of turns")
    return [
        turn | {"loss": False} if turn.get("role") == "assistant" else turn for turn in asked
    ] + answered


def _turn(turn: object, name: str, ignore: Collection[str]) -> dict:
    """``value`` becomes parts: ("words", text) that may hold placeholders, or as of ``_part``."""
    others = turn if isinstance(turn, dict) else {}
    if (
        len(others) == 2
        and isinstance(others.get("value"), str)
        and others.get("from") in ("human", "gpt")
    ):
        return {
            "from": turn["from"],
            "value": [("words", turn["value"])],
        }  # nearly all: this takes most of the time
    others = {
        key: value for key, value in others.items() if value is not None and key not in ignore
    }
    speaker = others.pop("from", None) or others.pop("role", None)
    content = others.pop("value", None)
    content = others.pop("content", None) if content is None else content
    speaker = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if speaker is None or not isinstance(content, (str, list)):
        raise DataError(
            f"{name}: each turn needs 'from' (human or gpt) and 'value' (text), not {short(turn)}"
        )
    if others:
        marks = {key: others.pop(key) for key in LEARNED if key in others}
        for key, value in marks.items():
            if value not in (0, 1) or value and speaker != "gpt":
                raise DataError(
                    f"{name}: {key!r} of a turn is {short(value)}; it may be 0 or 1, and 1 only of answers"
                )
        _refuse(others, OF_TURNS, name, False)
        if speaker == "gpt" and not all(marks.values()):
            others["learn"] = False
    parts = (
        [("words", content)]
        if isinstance(content, str)
        else [_part(part, name, ignore) for part in content]
    )
    return {**others, "from": speaker, "value": parts}


def _part(part: object, name: str, ignore: Collection[str]) -> tuple[str, object]:
    """("text", text), or a medium and what stands there: its file, its number in the entry, or None for the next."""
    if not isinstance(part, dict):
        raise DataError(
            f"{name}: a part of a turn must be an object with 'type' and 'text', not {short(part)}"
        )
    part = {key: value for key, value in part.items() if value is not None and key not in ignore}
    kind = part.get("type") or next((key for key in ("text", *MEDIA) if key in part), None)
    kind = str(kind).removeprefix("input_").removeprefix("output_").removesuffix("_url")
    if kind == "text" and isinstance(part.get("text"), str):
        return "text", part["text"]
    index = part.get("index")
    if kind not in MEDIA or not isinstance(index, int | None):
        raise DataError(
            f"{name}: a part of a turn must be a text, an image or a video, not {short(part)}"
        )
    _refuse(part, OF_TURNS, name, True)
    return kind, index if _source(part, kind) is None else content_of(part, kind, name)


def _check_order(turns: list[dict], name: str) -> int:
    """How many questions ``turns`` have, each with its answer."""
    speakers = [turn["from"] for turn in turns if turn["from"] != "system"]
    asked = len(speakers) // 2
    if not asked or speakers != ["human", "gpt"] * asked:
        raise DataError(
            f"{name}: the turns must alternate human, gpt, human, gpt, ..., not {speakers[:6]}"
        )
    if all(turn.get("learn") is False for turn in turns if turn["from"] == "gpt"):
        raise DataError(f"{name}: none of its answers is to be learned; take the entry out")
    return asked


def _refuse(found: dict, keys: Collection[str], name: str, has_media: bool) -> None:
    """Raise DataError for what ``found`` says about the training and nothing follows, and for images nothing reads."""
    refused = [key for key in keys if key in found and found[key] not in HARMLESS]
    for key in found:
        if (
            found[key]
            and isinstance(key, str)
            and _UNREAD.fullmatch(key)
            and (not has_media or key[-1].isdigit())
        ):
            refused.append(key)
    if refused:
        raise DataError(
            f"{name}: nothing reads {', '.join(map(repr, refused))}, which may change what is learned; take it out, "
            "or train without it ('ignore_keys' of a configuration, '--ignore' of the check)"
        )


def _media(entry: dict, medium: str, name: str) -> list[str | bytes | Cell]:
    """What stands beside the turns, under the medium's name or its plural, which ``entry`` loses."""
    found = [entry.get(medium), entry.pop(f"{medium}s", None)]
    lists = [
        [content_of(one, medium, name) for one in (value if isinstance(value, list) else [value])]
        for value in found
        if value is not None
    ]
    lists = [files for files in lists if files] or [[]]
    if lists[0] != lists[-1]:
        raise DataError(
            f"{name} has both {medium!r} and '{medium}s'; take one out, or ignore it (ignore_keys)"
        )
    return lists[0]


def _source(item: dict, medium: str) -> str | None:
    keys = ("bytes", "base64", "path", medium, "url", f"{medium}_url")
    return next((key for key in keys if item.get(key) is not None), None)


def content_of(item: object, medium: str, name: str) -> str | bytes | Cell:
    """The path of an image or a clip, or its content, however it is written. Raises DataError."""
    if isinstance(item, dict) and (key := _source(item, medium)):
        inline = key in ("bytes", "base64") and isinstance(item[key], str)
        return content_of(f"data:;base64,{item[key]}" if inline else item[key], medium, name)
    if isinstance(item, (bytes, Cell)):
        return item
    if medium == "video" and (isinstance(item, list) or str(item).lower().endswith(_STILLS)):
        raise DataError(
            f"{name}: 'video' lists frames ({short(item)}); make them one clip (ffmpeg), or give 'images'"
        )
    if not isinstance(item, str) or not item.strip() or not _is_text(item):
        raise DataError(
            f"{name}: {medium!r} must be a path, a list of paths, or a file's content, not {short(item)}"
        )
    if item.startswith("data:") or _BASE64.fullmatch(item):
        try:
            return base64.b64decode(item.rpartition(",")[2])
        except ValueError as error:
            raise DataError(f"{name}: {medium} {short(item)} is not base64 ({error})") from None
    if item.startswith("file://"):
        return unquote(item.removeprefix("file://"))
    if _ADDRESS.match(item):
        raise DataError(
            f"{name}: {medium} {short(item)} is on the web; fetch it (curl -O) and give the file's path"
        )
    return item


def _place(
    turns: list, entry: dict, given: dict, named: set[str], of_roles: bool, name: str
) -> None:
    """Write a placeholder for each image and clip into ``turns``, and the files in that order into ``entry``.

    Where a part stands for an image, the word <image> in a text part is a word.
    """
    kinds = {kind for turn in turns for kind, _ in turn["value"]}
    as_image = bool(given["video"]) and not given["image"] and kinds.isdisjoint(MEDIA)
    if as_image:
        text = "".join(value for turn in turns for _, value in turn["value"])
        as_image = "<image>" in text and "<video>" not in text  # as LLaVA-Video-178K has it
    for medium, placeholder in MEDIA.items():
        mark = "<image>" if as_image and medium == "video" else placeholder
        if as_image and medium == "image":
            continue
        files, places = given[medium], []
        if not files and medium not in kinds:
            _check_words(turns, medium, medium in named, name)
            continue
        for turn in turns:
            before = len(places)
            for number, (kind, value) in enumerate(turn["value"]):
                if kind == medium:
                    places.append(value)
                    value = placeholder
                elif kind == "words" or kind == "text" and medium not in kinds:
                    places += [None] * value.count(mark)
                    value = value.replace(mark, placeholder)
                elif kind == "text":
                    value = value.replace(mark, f"< {medium}>")
                turn["value"][number] = kind, value
            if turn["from"] != "human" and len(places) > before:
                raise DataError(
                    f"{name} has {mark} in an answer or a system message; {medium}s belong to questions"
                )
        if of_roles and not places:
            first = next(turn for turn in turns if turn["from"] == "human")
            first["value"].insert(0, (medium, f"{placeholder}\n" * len(files)))
            places = [None] * len(files)
        numbers = {place for place in places if isinstance(place, int)}
        if numbers and (None in places or numbers != set(range(len(files)))):
            raise DataError(
                f"{name} has {len(files)} {medium}s and parts with the indices {sorted(numbers)}"
            )
        if not numbers and places.count(None) != len(files):
            raise DataError(
                f"{name} has {places.count(None)} {mark} placeholders for {len(files)} {medium}s; they must be equal"
            )
        rest = iter(files)
        files = [
            next(rest) if place is None else files[place] if isinstance(place, int) else place
            for place in places
        ]
        if entry.get(medium) not in (files, files[0]):
            entry[medium] = files


def _check_words(turns: list[dict], medium: str, named: bool, name: str) -> None:
    """Raise DataError where a question of an entry without a ``medium`` has a place for one.

    The words are text in markup and where a sentence speaks of them, as in mix665k; so a place is told by the key that
    is there and empty, or by the beginning of a line.
    """
    mark = MEDIA[medium]
    parts = [part for turn in turns if turn["from"] == "human" for part in turn["value"]]
    text = "\n".join(value for kind, value in parts if kind not in MEDIA)
    if mark in text and (
        named or re.search(rf"(?m)^\s*{mark}", text) and f"</{medium}>" not in text
    ):
        raise DataError(
            f"{name} has a place for {'an image' if medium == 'image' else 'a video'}, {mark}, and no {medium}; name "
            f"its file in {medium!r}, or write < {medium}> if it is a word"
        )


def plain_text(entry: dict, text: str) -> str:
    """``text`` with the words <image> and <video> broken up where ``entry`` has none of it: else tokenizers
    take them for media."""
    for medium, placeholder in MEDIA.items():
        if not media_paths_of(entry, medium):
            text = text.replace(placeholder, f"< {medium}>")
    return text


def chat_messages(entry: dict) -> list[dict]:
    """transformers' chat format. Media stand where the text has them; one at an end goes first, as in LLaVA.

    A message that is not to be learned has ``learn`` False.
    """
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
        marks = {} if turn.get("learn", True) else {"learn": False}
        messages.append({"role": ROLES[turn["from"]], "content": parts, **marks})
    return messages
