"""LLaVA's JSON to batches: a list of conversations with pictures and clips, indexed, checked, collated, ordered."""

from llavolta.data.check import check_words, find_bad, find_too_long
from llavolta.data.collate import Collator
from llavolta.data.images import open_image, open_video, pad_to_square, padding_colour, to_rgb
from llavolta.data.index import read_index
from llavolta.data.llava import Example, LlavaData
from llavolta.data.sampler import GroupedSampler
from llavolta.data.statistics import TokenStatistics, token_statistics
from llavolta.errors import DataError

__all__ = [
    "Collator",
    "DataError",
    "Example",
    "GroupedSampler",
    "LlavaData",
    "TokenStatistics",
    "check_words",
    "find_bad",
    "find_too_long",
    "open_image",
    "open_video",
    "pad_to_square",
    "padding_colour",
    "read_index",
    "to_rgb",
    "token_statistics",
]
