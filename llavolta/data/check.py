"""What of a data set cannot be trained on, and why: structure, pictures, words, lengths."""

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

RARE = "\ua66e \U00013000"  # letters that no vocabulary of words holds
QUESTION = len(
    '{"from":"human","value":""},{"from":"gpt","value":""},'
)  # bytes of a file beside its text, at least
MAY_BE_UNKNOWN = 0.01  # of a file's words


def check_words(texts: Iterable[str], tokenizer, name: object) -> None:
    """Raise DataError, naming ``name``, if the tokenizer knows less than 99% of the words of ``texts``.

    Fewer that it does not know are told on stderr. A tokenizer that can write any text, by bytes, is asked nothing.
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
    told = f"{share:.1%} of the words of {name} are unknown to the tokenizer: {', '.join(map(short, strange[:10]))}"
    if share > MAY_BE_UNKNOWN:
        raise DataError(
            f"{told}; each would be {tokenizer.unk_token}. Use a model that can read any word, such as nano-tuned "
            "(-p model nano-tuned)"
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
    """The bad entries of a data file, in order, and the reason of each: structure, pictures and clips (all decoded).

    What was found is saved in data/cache. It holds while the data file, its images and clips (by size, time and inode)
    and this code stay as they are: entries whose files have changed, come or gone are looked at again.

    Args:
        workers: threads, for Pillow decodes outside Python's lock; None: one a core.
        fresh: look at all entries again.
        ignore: keys that are taken as not there; see entries.read_entry.

    Raises:
        DataError: the file itself cannot be read.
    """
    file, folder = Path(file), Path(images) if images else Path(file).parent
    index = read_index(file, ignore)
    saved = kept_path(file, "json", folder.resolve(), *sorted(ignore))
    version = [*index.version, Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES]
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
                    if rows[-1:] != [row]:
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
    """What an earlier check saved of entries whose files are as they were; None if there is nothing of use.

    Returns:
        The reasons of bad entries, by entry; of each path its stamp and the entries that name it; and the entries that
        are to be looked at again.
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
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # none, or damaged; it is made again
        return None


def _stamp(folder: Path, path: str) -> list[int] | None:
    """What changes when the image or clip at ``path`` does; None if there is none."""
    try:
        stat = find_file(folder, path, "").stat()
    except (DataError, OSError):
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _look_at(
    data: LlavaData, part: np.ndarray
) -> tuple[dict[int, str], list[tuple[str, list[int] | None, int]]]:
    """The bad entries of ``part``, and the path and stamp of each of its files, taken before it is read."""
    bad, seen = {}, []
    for index in part:
        row = int(data.rows[index])
        try:
            outside = [path for path, content in data.sources(index) if content is None]
            seen += [(path, _stamp(data.folder, path), row) for path in outside]
            data.check_media(index)
        except DataError as error:
            bad[row] = str(error)
    return bad, seen


def count_entries(index: Index, bad: Collection[int]) -> dict[str, int]:
    """How many of a file's entries that are not ``bad`` have images, videos or text alone, and of their answers, how
    many are learned and how many are not."""
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
    """The entries of ``data``'s file of which ``collate`` would refuse what ``max_length`` leaves, or whose images its
    processor refuses for their sizes, and why.

    Without decoding a picture: how many tokens one becomes depends on its size. A text has at most a token a byte, so
    of most entries not even the text is tokenized, unless the chat template refuses system turns: then all are.
    """
    fixed, bytes_ = collate.fixed_picture_tokens, (data.index.stop - data.index.start)[data.rows]
    pictures = data.index.media[data.rows]
    first, each = collate.template_tokens or (np.inf, 0)
    at_most = bytes_ * max(1, each / QUESTION) + first + pictures * (fixed or 0)
    unsure = (pictures > 0) & (fixed is None) | (data.medium == 2)
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
            if data.medium[index] == 2:
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
