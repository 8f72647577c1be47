"""Finds entries that cannot be trained on, and why: structure, media, unknown words, lengths."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from reprlib import repr as short

import numpy as np
from PIL import Image, ImageFile
from tqdm.auto import tqdm

from llavolta.data.collate import Collator
from llavolta.data.entries import chat_messages, media_paths_of
from llavolta.data.images import find_file
from llavolta.data.index import Index, keep, kept_path, read_index
from llavolta.data.llava import LlavaData
from llavolta.errors import DataError

# Letters that no vocabulary of words contains: a tokenizer that can write them can write any text.
RARE = "\ua66e \U00013000"
# Bytes that a question and its answer take in LLaVA's form beside their texts, at least.
QUESTION = len('{"from":"human","value":""},{"from":"gpt","value":""},')
MAY_BE_UNKNOWN = 0.01  # share of the words


def check_words(texts: Iterable[str], tokenizer, name: object) -> None:
    """Check that a tokenizer knows at least 99% of the words of some texts.

    If it does not know a smaller share, a note on stderr names some of them. A tokenizer that can
    write any text, for example by bytes, passes at once.

    Args:
        texts: The texts of a data set.
        tokenizer: The model's tokenizer.
        name: What messages call the data set.

    Raises:
        DataError: Over 1% of the words, counted as often as they occur, have an unknown token.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in tokenizer(RARE, add_special_tokens=False)["input_ids"]:
        return
    counts = Counter(word for text in texts for word in text.split())
    if not counts:
        return
    written = tokenizer(list(counts), add_special_tokens=False)["input_ids"]
    strange = [word for word, ids in zip(counts, written, strict=True) if unknown in ids]
    share = sum(counts[word] for word in strange) / counts.total()
    if not strange:
        return
    told = (
        f"{share:.1%} of the words of {name} are unknown to the tokenizer: "
        f"{', '.join(map(short, strange[:10]))}"
    )
    if share > MAY_BE_UNKNOWN:
        raise DataError(
            f"{told}; each would be {tokenizer.unk_token}. Use a model that can read any word, "
            "such as nano-tuned (-p model nano-tuned)"
        )
    print(f"note: {told}", file=sys.stderr)


def find_bad(
    file: str | Path,
    images: str | Path | None = None,
    workers: int | None = None,
    fresh: bool = False,
    progress: bool = True,
    ignore: Collection[str] = (),
) -> dict[int, str]:
    """Find the entries of a data file whose structure, images or videos cannot be used.

    Every image and video is decoded. The findings are saved in data/cache and used again while the
    data file, its media (by size, modification time and inode), Pillow's settings and the code of
    ``llavolta.data`` are the same. Where only media have changed, their entries alone are checked
    again.

    Args:
        file: The data file; see ``LlavaData``.
        images: The folder that media paths are relative to; None: the folder of ``file``.
        workers: Threads that decode, which Pillow does outside of Python's lock; None: one per
            core.
        fresh: Whether to check every entry, whatever was saved.
        progress: Whether to show a progress bar.
        ignore: Keys that are treated as absent; see ``entries.read_entry``.

    Returns:
        The reason of each bad entry, by its number in the file, in rising order.

    Raises:
        DataError: The data file cannot be read, or the image folder does not exist.
    """
    file, folder = Path(file), Path(images) if images else Path(file).parent
    index = read_index(file, ignore)
    saved = kept_path(file, "json", folder.resolve(), *sorted(ignore))
    version = [*index.version, Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES]
    # media: of each path its stamp and the entries that name it. todo: entries to check; None: all.
    bad, media, todo = (None if fresh else _read_findings(saved, version, folder)) or (
        dict(index.bad),
        {},
        None,
    )
    if todo is not None and not todo:
        return bad
    if len(index.bad) < len(index.start):
        data = LlavaData(file, folder, skip=(), ignore=ignore)
        entries = (
            np.arange(len(data)) if todo is None else np.flatnonzero(np.isin(data.rows, list(todo)))
        )
        # Parts of 64 entries or so, as a task for each entry would cost more than it saves.
        parts, seen = np.array_split(entries, -(-len(entries) // 64)), {}
        with (
            ThreadPoolExecutor(workers or os.cpu_count()) as pool,
            tqdm(
                total=len(entries), desc=f"checking {file.name}", unit="entry", disable=not progress
            ) as bar,
        ):
            for part, (found, looked) in zip(
                parts, pool.map(partial(_look_at, data), parts), strict=True
            ):
                bad |= found
                for path, stamp, row in looked:
                    rows = seen.setdefault(path, [stamp, []])[1]
                    if rows[-1:] != [row]:  # an entry may name the same file twice
                        rows.append(row)
                bar.update(len(part))
        for path, (stamp, rows) in seen.items():
            media.setdefault(path, [stamp, rows])[0] = stamp
    bad = dict(sorted(bad.items()))
    keep(saved, json.dumps({"version": version, "bad": bad, "media": media}).encode())
    return bad


def _read_findings(
    saved: Path, version: list, folder: Path
) -> tuple[dict[int, str], dict[str, list], set[int]] | None:
    """Read what an earlier check saved about entries whose media have not changed.

    Returns:
        None if nothing of use was saved. Else the reasons by bad entry; for each media path its
        stamp and the entries that name it; and the entries to check again.
    """
    try:
        found = json.loads(saved.read_text())
        if found["version"] != version:
            return None
        media = found["media"]
        changed = {
            row
            for path, (stamp, rows) in media.items()
            if stamp != _stamp(folder, path)
            for row in rows
        }
        return (
            {int(row): why for row, why in found["bad"].items() if int(row) not in changed},
            media,
            changed,
        )
    # No findings, or damaged ones: the entries are checked again.
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _stamp(folder: Path, path: str) -> list[int] | None:
    """Return what changes when the file at ``path`` does; None if there is no such file."""
    try:
        stat = find_file(folder, path, "").stat()
    except (DataError, OSError):
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _look_at(
    data: LlavaData, part: np.ndarray
) -> tuple[dict[int, str], list[tuple[str, list[int] | None, int]]]:
    """Return the bad entries of ``part``, and (path, stamp, entry) of each media file."""
    bad, seen = {}, []
    for index in part:
        row = int(data.rows[index])
        try:
            # Media inside of the data file change with it and need no stamp. The others' stamps
            # are taken before they are read, so that a change in between is noticed next time.
            outside = [path for path, content in data.sources(index) if content is None]
            seen += [(path, _stamp(data.folder, path), row) for path in outside]
            data.check_media(index)
        except DataError as error:
            bad[row] = str(error)
    return bad, seen


def count_entries(index: Index, bad: Collection[int]) -> dict[str, int]:
    """Count the usable entries of a data file by modality, and their answers.

    Args:
        index: The index of the file.
        bad: The entries that are not counted.

    Returns:
        How many entries have "images", "videos" or "text" alone, and how many answers are trained
        on ("learned") or not ("unlearned").
    """
    good = np.setdiff1d(np.arange(len(index.start)), list(bad))
    text, images, videos = np.bincount(index.medium[good], minlength=3).tolist()
    learned, unlearned = (int(turns[good].sum()) for turns in (index.learned, index.unlearned))
    return {
        "images": images,
        "videos": videos,
        "text": text,
        "learned": learned,
        "unlearned": unlearned,
    }


def find_too_long(data: LlavaData, collate: Collator, progress: bool = True) -> dict[int, str]:
    """Find entries that do not fit into ``max_length``, or whose images the processor rejects.

    Images are not decoded, as their visual tokens follow from their sizes; videos are. Most entries
    need not be tokenized either: a text has at most one token per byte, so many are certain to fit.
    If the chat template rejects system turns there is no such bound, and all are tokenized.

    Args:
        data: The data set.
        collate: The collator whose ``max_length`` and processor must take the entries.
        progress: Whether to show a progress bar.

    Returns:
        The reason of each such entry, by its number in the file.
    """
    fixed, bytes_ = collate.fixed_picture_tokens, (data.index.stop - data.index.start)[data.rows]
    pictures = data.index.media[data.rows]  # (n,) images and videos of each entry
    first, each = collate.template_tokens or (np.inf, 0)
    # (n,) upper bound of the tokens: one a byte. Each further question adds ``each`` tokens of the
    # template, and has some QUESTION bytes beside its text to make up for them.
    at_most = bytes_ * max(1, each / QUESTION) + first + pictures * (fixed or 0)
    unsure = (pictures > 0) & (fixed is None) | (data.medium == 2)  # (n,)
    found = {}
    for index in tqdm(
        np.flatnonzero(unsure | (at_most > collate.max_length)),
        desc=f"lengths of {data.file.name}",
        unit="entry",
        disable=not progress,
        leave=False,
    ):
        entry = data.entry(index)
        name = data._name(index, entry)
        try:
            if data.medium[index] == 2:  # the tokens of a video are known once it is processed
                collate([data[index]])
            else:
                counts = [fixed] * int(pictures[index])
                if fixed is None:
                    sizes = [data.picture_size(index, path, name) for path in media_paths_of(entry)]
                    counts = [collate.picture_tokens(size, len(sizes) == 1, name) for size in sizes]
                collate.check_room(chat_messages(entry), name, counts)
        except DataError as error:
            found[int(data.rows[index])] = str(error)
    return found
