"""What each row of the hidden states stands for, before and behind a compressor: arithmetic on tensors, no model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llavolta.compression.compressors import CompressedTokens, VisualTokens
from llavolta.compression.compressors.base import sum_groups
from llavolta.compression.families import Pictures


@dataclass
class Rows:
    """What the rows (B, T) of the hidden states stand for, from one compressed layer to the next.

    index: the column of this pass's stock attention mask. later: the column that the same token will have in the
    stock masks of later passes on the same cache. valid: False at padding. positions: (B, T, A). pictures: the flat
    rows of each picture's tokens. deepstack: features (I, L, C) that are due after a layer. rotary: the rotary
    embeddings that replace a stock one. size (B, T): for how many tokens each stands as a key, 1 for text; None: for
    itself. calibration (B, T): see CompressedTokens; None: 0.
    """

    index: Tensor
    later: Tensor
    valid: Tensor
    positions: Tensor
    pictures: Pictures
    deepstack: dict[int, Tensor] = field(default_factory=dict)
    rotary: dict[int, object] = field(default_factory=dict)
    size: Tensor | None = None
    calibration: Tensor | None = None

    @classmethod
    def of_inputs(
        cls, real: Tensor, positions: Tensor, pictures: Pictures, deepstack: dict[int, Tensor]
    ) -> Rows:
        """Those of the input tokens (B, T), False in ``real`` at padding; deepstack: features (visual tokens, C)."""
        index, mask, spread = columns(real.shape[1], real), pictures.mask, {}
        for layer, features in deepstack.items():
            spread[layer] = features.new_zeros(*mask.shape, features.shape[-1])
            spread[layer][mask] = features
        return cls(index, index, real, positions, pictures, spread)

    def by_clip(self) -> Rows:
        """The same with clips in place of frames."""
        deepstack = {
            layer: self.pictures.merge(features) for layer, features in self.deepstack.items()
        }
        return replace(self, pictures=self.pictures.by_clip(), deepstack=deepstack)

    def tokens(self, hidden: Tensor, training: bool, probe) -> VisualTokens:
        """The visual tokens in hidden (B, T, C), as a compressor gets them."""
        pictures = self.pictures
        flat, positions = (
            hidden.reshape(-1, hidden.shape[-1]),
            self.positions.reshape(-1, self.positions.shape[-1]),
        )
        at, size = (
            pictures.rows,
            None if self.size is None else self.size.reshape(-1)[pictures.rows],
        )
        return VisualTokens(
            flat[at],
            pictures.mask,
            positions[at],
            pictures.grid,
            training,
            probe,
            pictures.frames,
            size,
        )

    def compressed(
        self, hidden: Tensor, out: CompressedTokens, whole: bool, first: bool, contiguous: bool
    ) -> tuple[Tensor, Rows, Tensor | int]:
        """hidden (B, T, C) -> (B, T', C) with ``out`` in place of the visual tokens; what its rows stand for; and how
        far (B, 1) the last token moved up.

        whole: ``out`` has no padding. first: this is at layer 0, so later stock masks have the columns that are left
        here. contiguous: the gaps are closed, sample by sample of a packed row. With 3-D positions
        there are none: text behind an image goes on from its longer side, whatever is left of it.
        """
        (batch, length, width), pictures = hidden.shape, self.pictures
        flat, positions = (
            hidden.reshape(batch * length, width),
            self.positions.reshape(batch * length, -1),
        )

        # The token that an anchor stands for is the only visual token that stays. Padding goes to a row to spare.
        anchor_rows = pictures.rows.gather(1, out.anchor)  # (I, M) flat
        keep = torch.nn.functional.pad(self.valid.reshape(-1), (0, 1))
        keep = keep.index_fill(
            0, pictures.rows.where(pictures.mask, batch * length).view(-1), False
        )
        keep = keep.index_fill(0, anchor_rows.where(out.mask, batch * length).view(-1), True)
        keep = keep[:-1].view(batch, length)

        count = keep.sum(1)
        new_length = int(count.max())
        take = torch.argsort(~keep, dim=1, stable=True)[
            :, :new_length
        ]  # kept columns first, in their order
        valid = torch.arange(new_length, device=keep.device) < count[:, None]
        take = torch.where(valid, take, take[:, :1])
        start = torch.arange(batch, device=keep.device)[:, None]
        source = (take + start * length).view(-1)
        target = (keep.cumsum(1) - 1 + start * new_length).view(-1)[
            anchor_rows
        ]  # (I, M) flat, new rows

        def real(
            values: Tensor,
        ) -> Tensor:  # without padding; where there is none, without asking the device
            return values.flatten(0, 1) if whole else values[out.mask]

        out_positions = out.positions if out.positions is not None else positions[anchor_rows]
        new = flat.index_select(0, source).index_copy(0, real(target), real(out.hidden))
        new_positions = positions.index_select(0, source).index_copy(
            0, real(target), real(out_positions)
        )
        moved = 0
        if contiguous and self.positions.shape[-1] == 1:
            dropped = (self.valid & ~keep).long()
            gone = dropped.cumsum(1)
            before = torch.where(begins(self.positions[..., 0], self.valid), gone - dropped, 0)
            gone = gone - before.cummax(1).values
            moved = gone[:, -1:]
            new_positions = new_positions - gone.gather(1, take).view(-1, 1)

        def per_key(
            name: str, rest: float
        ) -> Tensor | None:  # what ``out`` says of keys, else that of its anchors
            before, of_visual = getattr(self, name), getattr(out, name)
            if before is None and of_visual is None:
                return None
            before = (
                torch.full_like(self.index, rest, dtype=torch.float) if before is None else before
            )
            before = before.reshape(-1)
            of_visual = before[anchor_rows] if of_visual is None else of_visual.float()
            return (
                before[source].index_copy(0, real(target), real(of_visual)).view(batch, new_length)
            )

        left = out.mask.sum(1)
        grid = (
            out.grid if out.grid is not None else torch.stack([torch.ones_like(left), left], dim=1)
        )
        frames = torch.ones_like(left) if out.frames is None else out.frames
        rows = Rows(
            self.index.gather(1, take),
            columns(new_length, keep) if first else self.later.gather(1, take),
            valid,
            new_positions.view(batch, new_length, -1),
            Pictures(target, out.mask, grid, pictures.clip, frames, pictures.has_clips),
            {
                layer: merge_like(out, features, pictures.mask)
                for layer, features in self.deepstack.items()
            },
            size=per_key("size", 1),
            calibration=per_key("calibration", 0),
        )
        return new.view(batch, new_length, width), rows, moved

    def text(self) -> Tensor:
        """(B, T) bool, real tokens that are not visual."""
        text = self.valid.clone()
        text.view(-1)[self.pictures.rows[self.pictures.mask]] = False
        return text

    def add_deepstack(self, hidden: Tensor, layer: int) -> Tensor:
        """hidden (B, T, C) plus the features that the model adds to its visual tokens after ``layer``, if any."""
        if layer not in self.deepstack:
            return hidden
        pictures, features = self.pictures, self.deepstack[layer].to(hidden.dtype)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat.index_add(0, pictures.rows[pictures.mask], features[pictures.mask]).view_as(
            hidden
        )

    def answering(self, length: int) -> Tensor:
        """(B, T) for each of ``length`` input tokens the row that answers for it: the last remaining token at or
        before it."""
        remaining = torch.zeros(
            len(self.index), length + 1, dtype=torch.long, device=self.index.device
        )
        remaining.scatter_(1, torch.where(self.valid, self.index, length), 1)
        return (remaining[:, :length].cumsum(1) - 1).clamp(min=0)


def columns(count: int, like: Tensor) -> Tensor:
    """(B, count) 0, 1, 2, ... in every row of a batch as large as that of ``like``."""
    return torch.arange(count, device=like.device).expand(len(like), -1)


def begins(positions: Tensor, valid: Tensor) -> Tensor:
    """(B, T) bool, where a sample of a packed row begins: real tokens whose position is below that
    of the real token before. positions, valid: (B, T)."""
    last = torch.where(valid, columns(valid.shape[1], valid), 0).cummax(1).values
    return torch.nn.functional.pad(positions.gather(1, last).diff(dim=1) < 0, (1, 0))


def positions_by_row(position_ids: Tensor, batch: int) -> Tensor:
    """(1 or B, T), or (A, 1 or B, T) of A-dimensional ones, -> (B, T, A)."""
    if position_ids.dim() == 2:
        return position_ids.expand(batch, -1)[..., None]
    return position_ids.expand(-1, batch, -1).permute(1, 2, 0)


def merge_like(out: CompressedTokens, features: Tensor, mask: Tensor) -> Tensor:
    """features (I, L, C) of the tokens before a compressor -> (I, M, C), merged or dropped as the tokens were."""
    if out.group is None:
        return features.gather(1, out.anchor[..., None].expand(-1, -1, features.shape[-1]))
    windows = out.mask.shape[1]
    group = out.group.masked_fill(~mask, windows)
    total, count = (
        sum_groups(values.float(), group, windows) for values in (features, mask[..., None])
    )
    return (total / count.clamp(min=1)).to(features.dtype)
