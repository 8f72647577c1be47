"""What a data set is made of, in tokens of a model: for models whose pictures have as many as their size makes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llavolta.data.collate import Collator
from llavolta.data.entries import chat_messages, media_paths_of
from llavolta.data.llava import LlavaData

SAMPLE = 500  # entries that are looked at, evenly over the data set


@dataclass(frozen=True)
class TokenStatistics:
    """Means over the entries looked at. text_tokens, images: of an entry; visual_tokens: of a picture; picture_size:
    (width, height) of the picture that comes nearest to that; None without pictures. Clips are left out."""

    entries: int
    text_tokens: float
    images: float
    visual_tokens: float
    picture_size: tuple[int, int] | None


def token_statistics(data: LlavaData, collate: Collator, sample: int = SAMPLE) -> TokenStatistics:
    """Counted on at most ``sample`` entries, the same each time; of a picture only the head of its file is read."""
    texts, images, counts = [], [], {}
    for index in np.unique(
        np.linspace(0, len(data) - 1, min(sample, len(data))).astype(int)
    ).tolist():
        entry = data.entry(index)
        sizes = [
            data.picture_size(index, path, data._name(index, entry))
            for path in media_paths_of(entry)
        ]
        texts.append(collate.text_tokens(chat_messages(entry)))
        images.append(len(sizes))
        for size in sizes:
            alone = len(sizes) == 1
            counts.setdefault(size, []).append(
                collate.fixed_picture_tokens or collate.picture_tokens(size, alone)
            )
    every = (
        np.concatenate([np.asarray(found) for found in counts.values()]) if counts else np.zeros(1)
    )
    mean = float(every.mean())
    nearest = min(counts, key=lambda size: abs(counts[size][0] - mean), default=None)
    return TokenStatistics(len(data), float(np.mean(texts)), float(np.mean(images)), mean, nearest)
