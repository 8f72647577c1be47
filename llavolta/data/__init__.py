"""Conversations with images and videos in LLaVA's format, read, checked and collated to batches.

``entries`` brings each conversation into one form. ``jsonlist`` and ``table`` read the files, and
``index`` records where the entries are. ``LlavaData`` opens them with their images (``images``) and
videos (``video``). ``check`` lists those that cannot be trained on. ``chat`` renders a conversation
with the processor's template, ``Collator`` makes batches of them, and ``GroupedSampler`` orders the
batches.
"""

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
