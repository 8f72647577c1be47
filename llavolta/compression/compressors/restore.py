"""Wrap a compressor, and merge the tokens it drops into those it keeps (RESTORE)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor

from llavolta.compression.compressors.base import (
    CompressedTokens,
    Compressor,
    VisualTokens,
    first_of,
    require_number,
    sum_groups,
)
from llavolta.compression.compressors.divprune import DivPrune
from llavolta.compression.compressors.vscan import nearest_kept


@dataclass(frozen=True)
class Restore(Compressor):
    """Keep the tokens that ``inner`` keeps, and merge the others into them (RESTORE, ICML 2026).

    In a plan it is ``restore:INNER``, such as ``0:restore:holov:64``. Each dropped token joins the
    kept token of highest cosine. A merged token is the plain mean of its group, at the lower median
    of the group's original positions. Positions are not closed up.

    From this layer on, the attention logits of a merged key at position n, for a query at m, gain

        log(s (c - D(m - n)))

    s is the number of merged tokens, c is ``calibration``, and D(x) is the mean of ``cos(x theta)``
    over the frequencies theta of the rotary embedding.

    The paper chooses new anchors, by how many tokens each resembles and how far it is from denser
    ones. Here the anchors are the tokens that ``inner`` keeps. Merging that ``inner`` does itself
    is ignored. At decoder layers only.

    Attributes:
        inner: The compressor that chooses, at any decoder layer it allows.
        calibration: c, above 1; 2 adds nothing at distance 0. 0: add log s alone.
    """

    inner: Compressor = field(default_factory=DivPrune)
    calibration: float = 2.0
    name: ClassVar[str] = "restore"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder"})

    def __post_init__(self):
        if not isinstance(self.inner, Compressor) or isinstance(self.inner, Restore):
            raise ValueError(
                f"restore: inner must be another compressor, such as divprune:0.25, "
                f"not {self.inner!r}"
            )
        require_number(self.name, "calibration", self.calibration)
        if 0 < self.calibration <= 1:
            raise ValueError(f"restore: calibration must be 0 or above 1, not {self.calibration!r}")
        if getattr(self.inner, "positions", None) == "contiguous":
            raise ValueError("restore: positions are original; leave positions=contiguous out")
        if self.inner.may_empty or "class_token" in self.inner.needs:
            raise ValueError(f"restore: {self.inner.name} does not keep tokens at a decoder layer")
        # The requirements of the inner compressor, on an instance that is frozen.
        object.__setattr__(self, "needs", self.inner.needs | {"decoder"})
        object.__setattr__(self, "tower_layers", self.inner.tower_layers)
        object.__setattr__(self, "over_clips", self.inner.over_clips)

    @property
    def is_identity(self) -> bool:
        return self.inner.is_identity

    def num_tokens(self, num_tokens: int) -> float:
        return self.inner.num_tokens(num_tokens)

    def __str__(self) -> str:
        given = "" if self.calibration == 2 else f"calibration={self.calibration}:"
        return f"{self.name}:{given}{self.inner}"

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        out, (images, length) = self.inner(tokens), tokens.mask.shape
        # A mask (I, L) of the anchors. Padding goes to one column more, which is cut off.
        at = out.anchor.expand(out.mask.shape).masked_fill(~out.mask, length)
        kept = torch.zeros(images, length + 1, dtype=torch.bool, device=at.device).scatter(
            1, at, True
        )[:, :-1]
        anchor, mask = first_of(kept, int(kept.sum(1).max()))
        groups = anchor.shape[1]
        group = nearest_kept(tokens.hidden, kept, anchor, mask).masked_fill(~tokens.mask, groups)
        count = sum_groups(tokens.mask.float()[..., None], group, groups)
        hidden = sum_groups(tokens.hidden.float(), group, groups) / count.clamp(min=1)
        # Tokens that an earlier compressor merged count with their size.
        size = sum_groups(tokens.size[..., None], group, groups)[..., 0].clamp(min=1)
        marks = torch.where(size > 1, float(self.calibration), 0.0) if self.calibration else None
        positions = medians(tokens.positions, group, groups)
        return CompressedTokens(
            hidden.to(tokens.hidden.dtype),
            mask,
            anchor,
            positions,
            group=group,
            size=size,
            calibration=marks,
        )


def medians(positions: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return the lower median (I, groups, A) of each group's positions (I, L, A), axis by axis.

    ``group`` (I, L) is ``groups`` at padding.
    """
    found = []
    for axis in positions.unbind(-1):
        # Sort by position, then stably by group: group by group, with rising positions.
        order = axis.argsort(dim=1, stable=True)
        order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))
        count = torch.zeros(len(group), groups + 1, dtype=torch.long, device=group.device)
        count = count.scatter_add(1, group, torch.ones_like(group))[:, :-1]
        # The first slot of each group plus half of its tokens: (I, groups).
        middle = (count.cumsum(1) - count + (count - 1).clamp(min=0) // 2).clamp(
            max=group.shape[1] - 1
        )
        found.append(axis.gather(1, order.gather(1, middle)))
    return torch.stack(found, -1)


def options_of_restore(options: list[str]) -> tuple[list[str], list[str]]:
    """Split the options after ``restore:`` in a plan text.

    Returns:
        Options of Restore itself, at most one, and the text of ``inner``, as parts between colons.
    """
    own = [
        option
        for option in options[:1]
        if option.partition("=")[0] in {f.name for f in fields(Restore)}
    ]
    return own, options[len(own) :]
