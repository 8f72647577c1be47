"""What of a data set cannot be trained on, and why: structure, pictures, words, lengths."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from reprlib import repr as short

import numpy as np
from tqdm.auto import tqdm

from llavolta.data.collate import Collator
from llavolta.data.entries import chat_messages, media_paths_of
from llavolta.data.index import keep, kept_path, read_index, read_reasons
from llavolta.data.llava import LlavaData
from llavolta.errors import DataError

RARE = "\ua66e \U00013000"  # letters that no vocabulary of words holds
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
) -> dict[int, str]:
    """The bad entries of a data file, in order, and the reason of each: structure, pictures and clips (all decoded).

    workers: threads, for Pillow decodes outside Python's lock; None: one a core. What was found is kept in data/cache
    and holds while the file stays as it is; fresh: look again. Raises DataError if the file itself cannot be read.
    """
    file, folder = Path(file), Path(images) if images else Path(file).parent
    index = read_index(file)
    kept = kept_path(file, "json", folder.resolve())
    if kept.exists() and not fresh:
        try:
            held = json.loads(kept.read_text())
            if held["version"] == index.version:
                return read_reasons(held["bad"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged; it is made again
            pass
    bad = dict(index.bad)
    if len(bad) < len(index.start):
        data = LlavaData(file, folder, skip=())
        parts = np.array_split(np.arange(len(data)), -(-len(data) // 64))
        with (
            ThreadPoolExecutor(workers or os.cpu_count()) as pool,
            tqdm(total=len(data), desc=f"checking {file.name}", unit="entry", disable=not progress) as bar,
        ):
            for part, found in zip(parts, pool.map(partial(_bad_media, data), parts), strict=True):
                bad |= found
                bar.update(len(part))
    bad = dict(sorted(bad.items()))
    keep(kept, json.dumps({"version": index.version, "bad": json.dumps(bad)}).encode())
    return bad


def _bad_media(data: LlavaData, part: np.ndarray) -> dict[int, str]:
    bad = {}
    for index in part:
        try:
            data.check_media(index)
        except DataError as error:
            bad[int(data.rows[index])] = str(error)
    return bad


def find_too_long(data: LlavaData, collate: Collator, progress: bool = True) -> dict[int, str]:
    """The entries of ``data``'s file of which ``collate`` would refuse what ``max_length`` leaves, and why.

    Without decoding a picture: how many tokens one becomes depends on its size. A text has at most a token a byte, so
    of most entries not even the text is tokenized.
    """
    fixed, bytes_ = collate.fixed_picture_tokens, (data.index.stop - data.index.start)[data.rows]
    pictures, some = data.index.media[data.rows], collate.template_tokens
    at_most = bytes_ + some + pictures * (fixed or 0)
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
                    counts = [collate.picture_tokens(size, len(sizes) == 1) for size in sizes]
                collate.check_room(chat_messages(entry), name, counts)
        except DataError as error:
            found[int(data.rows[index])] = str(error)
    return found
