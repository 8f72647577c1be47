"""Brings one conversation from any supported form into LLaVA's, and from that into chat messages.

JSON and tables both come through ``read_entry``, so they cannot differ. ``data/README.md`` lists
the forms.
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
# The placeholder in a text, by the entry's key that has the files.
MEDIA = {"image": "<image>", "video": "<video>"}
MARKS = ("<bbox>", "<ref-object>")  # ms-swift fills these from an entry's 'objects'
PLACEHOLDER = re.compile("<(image|video)>")
# Keys of an entry in LLaVA's form that are read.
READ = {"id", "image", "video", "conversations", "types", "objects"}
# Keys of a turn that say whether its answer is trained on, as several trainers call them.
LEARNED = ("learn", "loss", "weight", "train", "trainable")

# Keys that change what is trained on, and that nothing reads. They are errors, unless ignored.
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
# With these values such a key changes nothing. 1 equals True.
HARMLESS = (None, "", "[]", "{}", [], {}, True)
_TURNS = "this form is not read; write each as two turns of 'messages', a user's and an assistant's"
OTHER_FORMS = {  # what to do about an entry that has all of these keys
    (
        "chosen",
    ): "pairs of preferences are not read; keep the chosen answer as the last turn of 'messages'",
    ("instruction", "output"): _TURNS,  # Alpaca
    ("query", "response"): _TURNS,
    ("question", "answer"): _TURNS,
}
# Keys that seem to name an image or video, such as "image_path" or "image2".
_UNREAD = re.compile(
    "(image|img|picture|photo|video|clip|frame)s?"
    "(_?(base64|byte|file|list|name|path|url)s?)?_?[0-9]*"
)
_STILLS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
# How PNG, JPEG, GIF and WebP files begin in base64.
_BASE64 = re.compile("(iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/\\s]{50,}={0,2}\\s*")
_ADDRESS = re.compile("[A-Za-z][A-Za-z0-9+.-]+://")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half of a pair: damaged text


class Cell(NamedTuple):
    """Where a table has an image or video, which stays there until it is needed.

    Attributes:
        column: Name of the column.
        place: Indices into the lists of the column's cell, from the outermost.
    """

    column: str
    place: tuple[int, ...]


def media_paths_of(entry: dict, medium: str = "image") -> list[str | bytes | Cell]:
    """List the images or videos of an entry in LLaVA's form.

    Returns:
        For each the path below the image folder, the bytes of the file, or the cell of a table.
    """
    paths = entry.get(medium)
    return [] if not paths else paths if isinstance(paths, list) else [paths]


def _is_text(value: object) -> bool:
    """Return whether ``value`` is text without lone surrogates, which cannot be encoded."""
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def read_entry(entry: object, name: str, ignore: Collection[str] = ()) -> dict:
    """Check an entry, and bring it into LLaVA's form.

    That form has ``conversations``, a list of turns with ``from`` and ``value``, and may have
    ``image`` and ``video``, a path or a list. An answer that is not to be trained on has ``learn``
    False.

    Args:
        entry: What a line of JSON or a row of a table holds.
        name: What errors call the entry.
        ignore: Keys of entries, turns and parts that are treated as absent.

    Returns:
        A new entry, equal to the given one where that is in LLaVA's form already.

    Raises:
        DataError: The entry has no supported form, has a key that would change the training and
            that nothing reads, or has a different number of placeholders and media.
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
    # Modalities whose key is there, even if it is empty: then a placeholder is an error.
    named = {medium for medium in MEDIA if medium in entry or f"{medium}s" in entry}
    given = {medium: _media(entry, medium, name) for medium in MEDIA}
    _refuse(entry, OF_ENTRIES, name, any(given.values()))
    _place(turns, entry, given, named, of_roles, name)
    for turn in turns:  # the parts become one text again
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
            f"{name} has the mark {mark}, which is not filled from 'objects' here and would be "
            "learned as a word; write the box or name itself into the text, in the form of the "
            "model's family"
        )
    types = entry.get("types")
    if types and not (
        isinstance(types, list) and len(types) == asked and all(map(_is_text, types))
    ):
        raise DataError(
            f"{name}: 'types' must name a type for each of the {asked} questions, not "
            f"{short(types)}"
        )
    return entry


def text_of(entry: dict) -> str:
    """Join the texts of all turns of an entry in LLaVA's form, one per line."""
    return "\n".join([turn["value"] for turn in entry["conversations"]])


def unread_keys(entry: dict) -> set[str]:
    """Return the keys of an entry in LLaVA's form, and of its turns, that nothing reads."""
    keys = {key for key, value in entry.items() if value is not None} - READ
    return keys.union(*entry["conversations"]) - {"from", "value", "learn"}


def form_of(keys: Collection[str]) -> str | None:
    """Return the key that holds the conversation of an entry.

    Args:
        keys: The keys of the entry, or the columns of a table.

    Returns:
        "conversations", "messages", "texts", or "completion" where "prompt" is there too; None if
        there is no such key.

    Raises:
        DataError: The keys are those of a form that is not supported.
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
    """Take the turns out of ``entry``. Also return whether they have roles in place of "from"."""
    # The same conversation under both keys is no contradiction.
    if entry.get("messages") == entry.get("conversations"):
        entry.pop("messages", None)
    try:
        form = form_of([key for key, value in entry.items() if value is not None])
    except DataError as error:
        raise DataError(f"{name} {error}") from None
    turns = entry.pop(form, None)
    # Some tables have the conversation as JSON text.
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
    """Join a prompt and a completion to turns; as in TRL, only the completion is trained on."""
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
    """Return a turn in LLaVA's form, whose value is still a list of parts.

    A part is ("words", text that may hold placeholders), or what ``_part`` returns.
    """
    others = turn if isinstance(turn, dict) else {}
    if (
        len(others) == 2
        and isinstance(others.get("value"), str)
        and others.get("from") in ("human", "gpt")
    ):
        # Nearly every turn ends here, and reading them takes most of the time of an index.
        return {"from": turn["from"], "value": [("words", turn["value"])]}
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
                    f"{name}: {key!r} of a turn is {short(value)}; it may be 0 or 1, and 1 only of "
                    "answers"
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
    """Read a part of a turn's content.

    Returns:
        ("text", text), or the modality with the part's own file, its number in the entry's list, or
        None for the next one of that list.
    """
    if not isinstance(part, dict):
        raise DataError(
            f"{name}: a part of a turn must be an object with 'type' and 'text', not {short(part)}"
        )
    part = {key: value for key, value in part.items() if value is not None and key not in ignore}
    kind = part.get("type") or next((key for key in ("text", *MEDIA) if key in part), None)
    # OpenAI's "input_image", "output_text" and "image_url" are types of the same three kinds.
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
    """Return the number of questions, each of which must have its answer."""
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
    """Raise DataError for keys that nothing reads and that may change what is trained on.

    Args:
        found: An entry, a turn, or a part.
        keys: The keys that change the training, unless their value is one of ``HARMLESS``.
        name: What the error calls the entry.
        has_media: Whether media were found. If not, a key such as "image_path" is an error as well;
            with a number at its end, as "image2", it always is.
    """
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
            f"{name}: nothing reads {', '.join(map(repr, refused))}, which may change what is "
            "learned; take it out, or train without it ('ignore_keys' of a configuration, "
            "'--ignore' of the check)"
        )


def _media(entry: dict, medium: str, name: str) -> list[str | bytes | Cell]:
    """Return the media beside the turns, and remove the plural key from ``entry``."""
    found = [entry.get(medium), entry.pop(f"{medium}s", None)]
    lists = [
        [content_of(one, medium, name) for one in (value if isinstance(value, list) else [value])]
        for value in found
        if value is not None
    ]
    # Both keys may be there if one is empty, or if they say the same.
    lists = [files for files in lists if files] or [[]]
    if lists[0] != lists[-1]:
        raise DataError(
            f"{name} has both {medium!r} and '{medium}s'; take one out, or ignore it (ignore_keys)"
        )
    return lists[0]


def _source(item: dict, medium: str) -> str | None:
    """Return the key under which an object has the path or content of an image or video."""
    keys = ("bytes", "base64", "path", medium, "url", f"{medium}_url")
    return next((key for key in keys if item.get(key) is not None), None)


def content_of(item: object, medium: str, name: str) -> str | bytes | Cell:
    """Return the path or the content of an image or video, in whatever form an entry gives it.

    Args:
        item: A path, a ``file://`` or ``data:`` URL, bare base64, bytes, a cell of a table, or an
            object that holds one of these.
        medium: "image" or "video".
        name: What the error calls the entry.

    Returns:
        A path, the bytes of the file, or a cell of a table.

    Raises:
        DataError: The item is none of these, is on the web, is no valid base64, or is a frame of a
            video.
    """
    if isinstance(item, dict) and (key := _source(item, medium)):
        inline = key in ("bytes", "base64") and isinstance(item[key], str)
        return content_of(f"data:;base64,{item[key]}" if inline else item[key], medium, name)
    if isinstance(item, (bytes, Cell)):
        return item
    if medium == "video" and (isinstance(item, list) or str(item).lower().endswith(_STILLS)):
        raise DataError(
            f"{name}: 'video' lists frames ({short(item)}); make them one clip (ffmpeg), or give "
            "'images'"
        )
    if not isinstance(item, str) or not item.strip() or not _is_text(item):
        raise DataError(
            f"{name}: {medium!r} must be a path, a list of paths, or a file's content, not "
            f"{short(item)}"
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
            f"{name}: {medium} {short(item)} is on the web; fetch it (curl -O) and give the file's "
            "path"
        )
    return item


def _place(
    turns: list, entry: dict, given: dict, named: set[str], of_roles: bool, name: str
) -> None:
    """Write a placeholder for each image and video into the turns, and their files into ``entry``.

    The files of ``entry`` then are in the order of the placeholders. Where some part of the turns
    is an image, "<image>" in a text part is a word.
    """
    kinds = {kind for turn in turns for kind, _ in turn["value"]}
    # LLaVA-Video-178K writes <image> for a video.
    as_image = bool(given["video"]) and not given["image"] and kinds.isdisjoint(MEDIA)
    if as_image:
        text = "".join(value for turn in turns for _, value in turn["value"])
        as_image = "<image>" in text and "<video>" not in text
    for medium, placeholder in MEDIA.items():
        mark = "<image>" if as_image and medium == "video" else placeholder
        if as_image and medium == "image":
            continue
        # places: for each placeholder its own file, its number in ``files``, or None for the next.
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
                elif kind == "text":  # parts stand for the media, so this is a word
                    value = value.replace(mark, f"< {medium}>")
                turn["value"][number] = kind, value
            if turn["from"] != "human" and len(places) > before:
                raise DataError(
                    f"{name} has {mark} in an answer or a system message; {medium}s belong to "
                    "questions"
                )
        # As in TRL, messages without any placeholder have their media before the first question.
        if of_roles and not places:
            first = next(turn for turn in turns if turn["from"] == "human")
            first["value"].insert(0, (medium, f"{placeholder}\n" * len(files)))
            places = [None] * len(files)
        # Parts name either all files by number, or none.
        numbers = {place for place in places if isinstance(place, int)}
        if numbers and (None in places or numbers != set(range(len(files)))):
            raise DataError(
                f"{name} has {len(files)} {medium}s and parts with the indices {sorted(numbers)}"
            )
        if not numbers and places.count(None) != len(files):
            raise DataError(
                f"{name} has {places.count(None)} {mark} placeholders for {len(files)} {medium}s; "
                "they must be equal"
            )
        rest = iter(files)
        files = [
            next(rest) if place is None else files[place] if isinstance(place, int) else place
            for place in places
        ]
        if entry.get(medium) not in (files, files[0]):
            entry[medium] = files


def _check_words(turns: list[dict], medium: str, named: bool, name: str) -> None:
    """Raise DataError if a question has a place for an image or video, and the entry has none.

    In markup, and where a sentence speaks of it (as in mix665k), "<image>" is a word. It is a place
    if the entry's key is there and empty, or if it begins a line.
    """
    mark = MEDIA[medium]
    parts = [part for turn in turns if turn["from"] == "human" for part in turn["value"]]
    text = "\n".join(value for kind, value in parts if kind not in MEDIA)
    if mark in text and (
        named or re.search(rf"(?m)^\s*{mark}", text) and f"</{medium}>" not in text
    ):
        raise DataError(
            f"{name} has a place for {'an image' if medium == 'image' else 'a video'}, {mark}, and "
            f"no {medium}; name its file in {medium!r}, or write < {medium}> if it is a word"
        )


def plain_text(entry: dict, text: str) -> str:
    """Break up "<image>" and "<video>" in a text if its entry has no such media.

    Tokenizers would take the words for placeholders.

    Args:
        entry: An entry in LLaVA's form.
        text: The text of one of its turns.

    Returns:
        The text, with ``< image>``, for example.
    """
    for medium, placeholder in MEDIA.items():
        if not media_paths_of(entry, medium):
            text = text.replace(placeholder, f"< {medium}>")
    return text


def chat_messages(entry: dict) -> list[dict]:
    """Convert an entry to transformers' chat format.

    Media stay where their placeholders are. A single one at the beginning or end of a text goes
    first, as in LLaVA.

    Args:
        entry: An entry in LLaVA's form.

    Returns:
        One message per turn; ``learn`` is False for an answer that is not to be trained on.
    """
    messages = []
    for turn in entry["conversations"]:
        # Splitting by a pattern with a group gives text, medium, text, medium, ..., text.
        first, *rest = PLACEHOLDER.split(plain_text(entry, turn["value"]).strip())
        media, texts = rest[::2], [first, *rest[1::2]]
        if len(media) == 1 and not all(text.strip() for text in texts):
            texts = ["", "".join(texts)]
        parts = [{"type": "text", "text": texts[0].strip() if not media else texts[0].lstrip()}]
        for medium, text in zip(media, texts[1:], strict=True):
            parts += [{"type": medium}, {"type": "text", "text": text.strip()}]
        parts = [part for part in parts if part.get("text") != ""]
        if len(parts) == len(media):  # some templates need a text part
            parts.append({"type": "text", "text": ""})
        marks = {} if turn.get("learn", True) else {"learn": False}
        messages.append({"role": ROLES[turn["from"]], "content": parts, **marks})
    return messages
