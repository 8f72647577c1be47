"""Token counts of a data set for one model, where the visual tokens depend on the image size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llavolta.data.collate import Collator
from llavolta.data.entries import chat_messages, media_paths_of
from llavolta.data.llava import LlavaData

SAMPLE = 500  # entries that are inspected, spread evenly over the data set


@dataclass(frozen=True)
class TokenStatistics:
    """Means over the inspected entries. Videos are not counted.

    Attributes:
        entries: Entries of the whole data set.
        text_tokens: Text tokens per entry, with the chat template's.
        images: Images per entry.
        visual_tokens: Visual tokens per image; 0 without images.
        picture_size: (width, height) in pixels of the image whose visual tokens are nearest to that
            mean; None without images.
    """

    entries: int
    text_tokens: float
    images: float
    visual_tokens: float
    picture_size: tuple[int, int] | None


def token_statistics(data: LlavaData, collate: Collator, sample: int = SAMPLE) -> TokenStatistics:
    """Count the tokens of at most ``sample`` entries.

    The entries are spread evenly, so they are the same at each call. Images are not decoded: only
    their sizes are read.

    Args:
        data: The data set.
        collate: The collator whose processor counts the tokens.
        sample: How many entries are inspected at most.

    Returns:
        The means.
    """
    texts, images, counts = [], [], {}  # counts: visual tokens of the images of each size
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
