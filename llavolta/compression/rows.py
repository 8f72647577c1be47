"""Track which token each row of the hidden states stands for, before and after a compressor.

A row is one of the T places of a sequence in hidden states (B, T, C). A flat row is an index into
all B * T places. A batch row is one of the B sequences; where samples are packed, it holds several.
This module is arithmetic on tensors and needs no model.
"""

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

    I is the number of images (tiles, frames), L the largest number of tokens of one of them.

    Attributes:
        index: (B, T) column of each token among the input tokens of this pass, as the stock
            attention mask counts them.
        later: (B, T) column that the same token has in the stock masks of later passes on the same
            cache. It differs from ``index`` after layer 0 was compressed.
        valid: (B, T) bool, False at padding.
        positions: (B, T, A) rotary positions. A is 1, or 3 with M-RoPE.
        pictures: Flat rows of the tokens of each image.
        deepstack: By decoder layer, features (I, L, C) that are added to the visual tokens after
            that layer.
        rotary: By the id of the model's rotary embeddings, those of these rows that replace them.
        size: (B, T) number of tokens that each row counts for as a key, 1 for text. None: all 1.
        calibration: (B, T), see CompressedTokens. None: all 0.
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
        """Describe the input tokens, before any compressor.

        Args:
            real: (B, T) bool, False at padding.
            positions: (B, T, A) rotary positions.
            pictures: The tokens of each image.
            deepstack: By decoder layer, features (n, C) of the n visual tokens in text order.

        Returns:
            The rows of the input, whose ``index`` and ``later`` are 0, 1, ..., T - 1.
        """
        index, mask, spread = columns(real.shape[1], real), pictures.mask, {}
        for layer, features in deepstack.items():  # (n, C) -> (I, L, C)
            spread[layer] = features.new_zeros(*mask.shape, features.shape[-1])
            spread[layer][mask] = features
        return cls(index, index, real, positions, pictures, spread)

    def by_clip(self) -> Rows:
        """The same rows, with each clip as one image in place of its frames."""
        deepstack = {
            layer: self.pictures.merge(features) for layer, features in self.deepstack.items()
        }
        return replace(self, pictures=self.pictures.by_clip(), deepstack=deepstack)

    def tokens(self, hidden: Tensor, training: bool, probe) -> VisualTokens:
        """Collect the visual tokens as a compressor gets them.

        Args:
            hidden: (B, T, C) hidden states of these rows.
            training: Whether the model is in training mode.
            probe: The LayerProbe of this layer.

        Returns:
            VisualTokens with hidden states (I, L, C), one row per image.
        """
        pictures = self.pictures
        flat, positions = (
            hidden.reshape(-1, hidden.shape[-1]),  # (B, T, C) -> (B * T, C)
            self.positions.reshape(-1, self.positions.shape[-1]),  # (B, T, A) -> (B * T, A)
        )
        at, size = (
            pictures.rows,
            None if self.size is None else self.size.reshape(-1)[pictures.rows],
        )
        return VisualTokens(
            flat[at],  # (B * T, C) -> (I, L, C)
            pictures.mask,
            positions[at],  # (B * T, A) -> (I, L, A)
            pictures.grid,
            training,
            probe,
            pictures.frames,
            size,
        )

    def compressed(
        self, hidden: Tensor, out: CompressedTokens, whole: bool, first: bool, contiguous: bool
    ) -> tuple[Tensor, Rows, Tensor | int]:
        """Rebuild the sequence from its text tokens and a compressor's output.

        Args:
            hidden: (B, T, C) hidden states of these rows.
            out: The compressor's output for the visual tokens, M rows per image.
            whole: Whether ``out`` has no padding. Then its tokens are selected without a mask, for
                which the host would have to wait for the device.
            first: Whether this is layer 0. The stock masks of later passes take their length from
                the cache of layer 0, so they have one column per row that remains there.
            contiguous: Whether positions close the gaps of removed tokens, in each packed sample by
                itself. It has no effect with 3-D positions: there text continues from the longer
                side of the image before it, however many of the image's tokens remain.

        Returns:
            The hidden states (B, T', C) with padding at the end; what their rows stand for; and by
            how much the position of the last token has decreased, (B, 1), or 0 if gaps stay.
        """
        (batch, length, width), pictures = hidden.shape, self.pictures
        flat, positions = (
            hidden.reshape(batch * length, width),  # (B, T, C) -> (B * T, C)
            self.positions.reshape(batch * length, -1),  # (B, T, A) -> (B * T, A)
        )

        # Keep the text and, of the visual tokens, the anchors. Padding in ``rows`` and ``anchor``
        # points at some real row, so its writes go to one extra entry at the end.
        anchor_rows = pictures.rows.gather(1, out.anchor)  # (I, L) -> (I, M), flat rows
        keep = torch.nn.functional.pad(self.valid.reshape(-1), (0, 1))  # (B, T) -> (B * T + 1,)
        keep = keep.index_fill(
            0, pictures.rows.where(pictures.mask, batch * length).view(-1), False
        )
        keep = keep.index_fill(0, anchor_rows.where(out.mask, batch * length).view(-1), True)
        keep = keep[:-1].view(batch, length)  # (B * T + 1,) -> (B, T)

        count = keep.sum(1)
        new_length = int(count.max())
        # The stable sort puts the columns to keep first, in their order: (B, T) -> (B, T')
        take = torch.argsort(~keep, dim=1, stable=True)[:, :new_length]
        valid = torch.arange(new_length, device=keep.device) < count[:, None]
        # Padding repeats the first column to keep, because removed rows may contain NaN.
        take = torch.where(valid, take, take[:, :1])
        start = torch.arange(batch, device=keep.device)[:, None]
        source = (take + start * length).view(-1)  # (B, T') -> (B * T',), flat rows of the input
        # The running count of rows to keep tells each one's new column: (B, T) -> (I, M), flat rows
        # of the output.
        target = (keep.cumsum(1) - 1 + start * new_length).view(-1)[anchor_rows]

        # (I, M, ...) -> (m, ...) without padding. ``flatten`` needs no result from the device.
        def real(values: Tensor) -> Tensor:
            return values.flatten(0, 1) if whole else values[out.mask]

        out_positions = out.positions if out.positions is not None else positions[anchor_rows]
        # (B * T, C) -> (B * T', C), in which the compressor's tokens replace those at the anchors.
        new = flat.index_select(0, source).index_copy(0, real(target), real(out.hidden))
        new_positions = positions.index_select(0, source).index_copy(
            0, real(target), real(out_positions)
        )
        moved = 0
        if contiguous and self.positions.shape[-1] == 1:
            # Each token moves up by the number of tokens removed before it in its packed sample.
            # ``before`` is the number removed before the sample begins; cummax carries it on.
            dropped = (self.valid & ~keep).long()
            gone = dropped.cumsum(1)
            before = torch.where(begins(self.positions[..., 0], self.valid), gone - dropped, 0)
            gone = gone - before.cummax(1).values
            moved = gone[:, -1:]
            new_positions = new_positions - gone.gather(1, take).view(-1, 1)  # (B * T', 1)

        # Values per key (B, T) -> (B, T'): those of ``out``, or else those of its anchors. ``rest``
        # is the value of tokens that have none.
        def per_key(name: str, rest: float) -> Tensor | None:
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
            self.index.gather(1, take),  # (B, T) -> (B, T')
            columns(new_length, keep) if first else self.later.gather(1, take),
            valid,
            new_positions.view(batch, new_length, -1),  # (B * T', A) -> (B, T', A)
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
        """(B, T) bool, True at tokens that are neither visual nor padding."""
        text = self.valid.clone()
        text.view(-1)[self.pictures.rows[self.pictures.mask]] = False
        return text

    def add_deepstack(self, hidden: Tensor, layer: int) -> Tensor:
        """Add the deep-stack features that are due after a layer to the visual tokens.

        Args:
            hidden: (B, T, C) output of ``layer``.
            layer: A decoder layer.

        Returns:
            (B, T, C), ``hidden`` itself if nothing is due.
        """
        if layer not in self.deepstack:
            return hidden
        pictures, features = self.pictures, self.deepstack[layer].to(hidden.dtype)
        flat = hidden.reshape(-1, hidden.shape[-1])
        return flat.index_add(0, pictures.rows[pictures.mask], features[pictures.mask]).view_as(
            hidden
        )

    def answering(self, length: int) -> Tensor:
        """Map each input token to the row that stands for it in the output.

        Args:
            length: Number of input tokens T0 of the pass.

        Returns:
            (B, T0) row of the last remaining token at or before each input token; 0 where there is
            none.
        """
        remaining = torch.zeros(
            len(self.index), length + 1, dtype=torch.long, device=self.index.device
        )
        # Padding writes to the extra column: (B, T) -> (B, T0 + 1)
        remaining.scatter_(1, torch.where(self.valid, self.index, length), 1)
        return (remaining[:, :length].cumsum(1) - 1).clamp(min=0)


def columns(count: int, like: Tensor) -> Tensor:
    """(B, count) of 0, 1, 2, ... in each batch row; B and the device are those of ``like``."""
    return torch.arange(count, device=like.device).expand(len(like), -1)


def begins(positions: Tensor, valid: Tensor) -> Tensor:
    """Mark where a further sample of a packed batch row begins.

    A sample begins at a real token whose position is below that of the real token before it. The
    first real token is compared with the padding before it, if any.

    Args:
        positions: (B, T) positions.
        valid: (B, T) bool, False at padding.

    Returns:
        (B, T) bool.
    """
    # The last real column at or before each column, so that padding repeats its position.
    last = torch.where(valid, columns(valid.shape[1], valid), 0).cummax(1).values
    return torch.nn.functional.pad(positions.gather(1, last).diff(dim=1) < 0, (1, 0))


def positions_by_row(position_ids: Tensor, batch: int) -> Tensor:
    """Bring position ids into one shape.

    Args:
        position_ids: (1 or B, T), or (A, 1 or B, T) of A-dimensional positions.
        batch: B.

    Returns:
        (B, T, A); A is 1 for the first form.
    """
    if position_ids.dim() == 2:
        return position_ids.expand(batch, -1)[..., None]  # (1 or B, T) -> (B, T, 1)
    return position_ids.expand(-1, batch, -1).permute(1, 2, 0)  # (A, 1 or B, T) -> (B, T, A)


def merge_like(out: CompressedTokens, features: Tensor, mask: Tensor) -> Tensor:
    """Merge or drop features as a compressor merged or dropped its tokens.

    Args:
        out: The compressor's output, M rows per image.
        features: (I, L, C) features of the tokens before the compressor.
        mask: (I, L) bool, False at padding.

    Returns:
        (I, M, C): the mean over each merged group, or the features of the anchors where ``out``
        only kept or dropped tokens.
    """
    if out.group is None:
        return features.gather(1, out.anchor[..., None].expand(-1, -1, features.shape[-1]))
    windows = out.mask.shape[1]
    # Padding belongs to an extra group M, which sum_groups drops.
    group = out.group.masked_fill(~mask, windows)
    total, count = (
        sum_groups(values.float(), group, windows) for values in (features, mask[..., None])
    )
    return (total / count.clamp(min=1)).to(features.dtype)  # (I, M, C) / (I, M, 1)
