"""RESTORE: around any compressor, what it drops merges into what it keeps, at original positions, and weighs for it."""

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
    """``restore:INNER``, such as ``0:restore:holov:64``: the choice of INNER, and the others merged into it (RESTORE,
    ICML 2026).

    Each token that INNER drops goes to the one it keeps of highest cosine: plain mean, and the median of the group's
    original positions. The layers behind add ``log(s (c - D(m - n)))`` to the logits of a merged key at n for a query
    at m: s its tokens, D(x) the mean over frequency pairs of ``cos(x theta)``, c = ``calibration`` (2: nothing for
    neighbours); 0: ``log s`` alone. Positions are the original ones, and gaps stay.

    The paper chooses anchors anew, by how many tokens each resembles and how far it is from denser ones; here they are
    INNER's own tokens. What INNER merges by itself is not taken over, only which tokens it keeps.
    """

    inner: Compressor = field(default_factory=DivPrune)
    calibration: float = 2.0
    name: ClassVar[str] = "restore"
    needs: ClassVar[frozenset[str]] = frozenset({"decoder"})

    def __post_init__(self):
        if not isinstance(self.inner, Compressor) or isinstance(self.inner, Restore):
            raise ValueError(
                f"restore: inner must be another compressor, such as divprune:0.25, not {self.inner!r}"
            )
        require_number(self.name, "calibration", self.calibration)
        if 0 < self.calibration <= 1:
            raise ValueError(f"restore: calibration must be 0 or above 1, not {self.calibration!r}")
        if getattr(self.inner, "positions", None) == "contiguous":
            raise ValueError("restore: positions are original; leave positions=contiguous out")
        if self.inner.may_empty or "class_token" in self.inner.needs:
            raise ValueError(f"restore: {self.inner.name} does not keep tokens at a decoder layer")
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
        at = out.anchor.expand(out.mask.shape).masked_fill(~out.mask, length)
        kept = torch.zeros(images, length + 1, dtype=torch.bool, device=at.device).scatter(
            1, at, True
        )[:, :-1]
        anchor, mask = first_of(kept, int(kept.sum(1).max()))
        groups = anchor.shape[1]
        group = nearest_kept(tokens.hidden, kept, anchor, mask).masked_fill(~tokens.mask, groups)
        count = sum_groups(tokens.mask.float()[..., None], group, groups)
        hidden = sum_groups(tokens.hidden.float(), group, groups) / count.clamp(min=1)
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
    """(I, groups, A) the lower median of the positions (I, L, A) of each group; group (I, L), ``groups`` at padding."""
    found = []
    for axis in positions.unbind(-1):
        order = axis.argsort(dim=1, stable=True)
        order = order.gather(
            1, group.gather(1, order).argsort(dim=1, stable=True)
        )  # group by group, rising
        count = torch.zeros(len(group), groups + 1, dtype=torch.long, device=group.device)
        count = count.scatter_add(1, group, torch.ones_like(group))[:, :-1]
        middle = (count.cumsum(1) - count + (count - 1).clamp(min=0) // 2).clamp(
            max=group.shape[1] - 1
        )
        found.append(axis.gather(1, order.gather(1, middle)))
    return torch.stack(found, -1)


def options_of_restore(options: list[str]) -> tuple[list[str], list[str]]:
    """Restore's own options, and the text of INNER, of what stands behind ``restore:``."""
    own = [
        option
        for option in options[:1]
        if option.partition("=")[0] in {f.name for f in fields(Restore)}
    ]
    return own, options[len(own) :]
