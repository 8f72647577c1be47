"""What a compressor gets, what it returns, and the registry that plan texts, sliders and tests read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

from torch import Tensor

COMPRESSORS: dict[str, type[Compressor]] = {}


@dataclass
class VisualTokens:
    """The visual tokens of a batch at one layer, one row per image (or tile, or clip).

    hidden: (I, L, C) in raster order; rows of images with fewer than L tokens are padded at the end.
    mask: (I, L) True where a token is real.
    positions: (I, L, A) integer rotary positions; A is 1, or 3 where the model has 3-D positions.
    """

    hidden: Tensor
    mask: Tensor
    positions: Tensor


@dataclass
class CompressedTokens:
    """What a compressor leaves of each image.

    hidden: (I, M, C). mask: (I, M) True where a token is real.
    anchor: (I, M) which of the L input tokens each one takes the place of; strictly rising over the real ones.
    positions: (I, M, A) integer rotary positions, or None for those of the anchors.
    """

    hidden: Tensor
    mask: Tensor
    anchor: Tensor
    positions: Tensor | None = None


@dataclass(frozen=True)
class Compressor(ABC):
    """Base class. A subclass with a ``name`` is known to plans, sliders and the test matrix at once.

    Write a frozen dataclass whose fields are the options in the order of the plan text
    (``"2:avgpool:8"`` -> ``AveragePool(8)``), check them in ``__post_init__``, and write ``__call__``.
    """

    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.name:
            COMPRESSORS[cls.name] = cls

    @abstractmethod
    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        """Compress every image of the batch; at least one token of each image must stay."""

    @abstractmethod
    def num_tokens(self, num_tokens: int) -> float:
        """How many tokens (their mean, if it depends on the image) are left of ``num_tokens``."""

    @property
    def is_identity(self) -> bool:
        """True when nothing is ever removed; the model is then left exactly as it is."""
        return False

    def __str__(self) -> str:
        """The plan text, such as ``avgpool:8``."""
        return ":".join([self.name, *(str(getattr(self, field.name)) for field in fields(self))])


def require_int(owner: str, name: str, value: int, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{owner}: {name} must be a whole number of at least {at_least}, not {value!r}")
