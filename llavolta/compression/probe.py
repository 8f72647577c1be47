"""Compute what compressors read at a layer: attention, keys and text, from the layer's own weights.

``LayerProbe`` answers at decoder layers. It computes attention only for the query rows that are
needed, so the model may use any attention backend. ``TowerProbe`` answers from the queries and keys
that were recorded in the vision tower. The answers have no gradient. VisualTokens documents them
for authors of compressors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llavolta.errors import UnsupportedModel


@dataclass
class LayerInput:
    """The input of a decoder layer.

    Attributes:
        layer: The decoder layer.
        hidden: (B, T, C) hidden states.
        rotary: Cosines and sines of the rotary embedding, each (B or 1, T, d).
    """

    layer: nn.Module
    hidden: Tensor
    rotary: tuple[Tensor, Tensor]


@dataclass
class LayerProbe:
    """What a compressor can read at a decoder layer.

    B batch rows have T rows each, and I images at most L tokens each.

    Attributes:
        here: Input of this layer.
        before: Input of the layer before, if the compressor needs it.
        valid: (B, T) bool, False at padding and at guesses of assisted generation.
        images: (I, L) flat rows of the images' tokens.
        image_mask: (I, L) bool, False at padding.
        sample: (B, T) number of the packed sample of each token, the same at all real tokens of a
            batch row that is one sample.
        answers: (B, T) bool, True at tokens that predict the first token of an answer. None without
            labels.
        labelled: (B, T) bool, True at tokens that have a label. None without labels.
        norm: The decoder's final norm.
        index: (B, T) column of each token in the input of this pass.
        start: The VisualTokens of layer 0, if the compressor needs them.
        tower: The probe of the vision tower, at layer 0 and if the compressor needs it.
    """

    here: LayerInput
    before: LayerInput | None
    valid: Tensor
    images: Tensor
    image_mask: Tensor
    sample: Tensor
    answers: Tensor | None = None
    labelled: Tensor | None = None
    norm: nn.Module | None = None
    index: Tensor | None = None
    start: object | None = None
    tower: TowerProbe | None = None

    @torch.no_grad()
    def attention(self, query: str | Tensor, previous: bool) -> Tensor:
        """Compute the attention that each visual token receives; see VisualTokens.attention.

        Args:
            query: "last", "instruction", or (I, T) bool, True at the query tokens of each image.
            previous: Whether to use the layer before this one.

        Returns:
            (I, L) float32, the mean over heads and queries.

        Raises:
            ValueError: Unknown query, or the layer before was not recorded.
            UnsupportedModel: The layer's attention cannot be computed from outside.
        """
        if isinstance(query, Tensor):
            return self._attention_of(query, previous)
        if query not in ("last", "instruction"):
            raise ValueError(
                f"query must be 'last' or 'instruction' at a decoder layer, not {query!r}"
            )
        chosen = self._queries(query)
        rows, mask = _compact(chosen)  # (B, T) -> (B, Q)
        weights = attention_rows(self._at(previous), rows, self.valid, self.sample)  # (B, Q, T)
        # The mean over the queries of each token's sample: (B, Q, T) -> (B, T)
        weights = weights.masked_fill(~mask[..., None], 0).sum(1) / self._of_sample(
            chosen.long()
        ).clamp(min=1)
        return weights.reshape(-1)[self.images]  # (B, T) -> (I, L)

    def _at(self, previous: bool) -> LayerInput:
        """The input of this layer, or of the one before."""
        if previous and self.before is None:
            raise ValueError(
                'the attention of the previous layer needs "previous_layer" in needs, and a layer '
                "above 0"
            )
        return self.before if previous else self.here  # pyright: ignore[reportReturnType]

    def _attention_of(self, chosen: Tensor, previous: bool) -> Tensor:
        """(I, L) the mean attention from the tokens that ``chosen`` (I, T) marks for each image."""
        at, row = self._at(previous), self.row()
        rows, mask = _compact(chosen)  # (I, T) -> (I, Q)
        # Repeat each batch row for every image in it: (B, T, C) -> (I, T, C)
        rotary = tuple(part if len(part) == 1 else part[row] for part in at.rotary)
        at = LayerInput(at.layer, at.hidden[row], rotary)
        weights = attention_rows(at, rows, self.valid[row], self.sample[row])  # (I, Q, T)
        weights = weights.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(
            min=1
        )
        return weights.gather(1, self.images % self.valid.shape[1])  # (I, T) -> (I, L)

    def from_start(self, marks: Tensor) -> Tensor:
        """Carry marks of tokens from layer 0 to this layer.

        Args:
            marks: (I, T0) bool, True at tokens at layer 0 of each image's batch row.

        Returns:
            (I, T) bool, True at those of the marked tokens that are still there.
        """
        # The columns in the pass's input identify the tokens: before (I, T0), here (I, T).
        before, here = (probe.index[probe.row()] for probe in (self.start.probe, self))
        there = self.start.probe.valid[self.start.probe.row()]
        wide = marks.new_zeros(
            len(marks), 1 + max(int(before.max()), int(here.max())), dtype=torch.long
        )
        # (I, T0) -> (I, columns) -> (I, T). Padding repeats a real column, so "amax" is needed.
        wide = wide.scatter_reduce(1, before, (marks & there).long(), "amax").bool()
        return wide.gather(1, here) & self.valid[self.row()]

    @torch.no_grad()
    def keys(self, rotated: bool = False) -> Tensor:
        """Compute the keys of the visual tokens in this layer.

        Args:
            rotated: Whether the rotary embedding is applied.

        Returns:
            (I, L, heads * d), all key heads side by side.

        Raises:
            UnsupportedModel: The layer's keys cannot be computed from outside.
        """
        if rotated:
            # (B, heads, T, d) -> (B * T, heads * d) -> (I, L, heads * d)
            return _rotated(self.here, "k").transpose(1, 2).flatten(2).flatten(0, 1)[self.images]
        hidden = self.here.hidden.flatten(0, 1)[self.images]  # (B, T, C) -> (I, L, C)
        layer = self.here.layer
        return _attention_module(layer).k_proj(layer.input_layernorm(hidden))

    @torch.no_grad()
    def own_attention(self) -> Tensor:
        """Compute the attention from the mean query of an image and all tokens before it.

        Queries and keys are those of this layer, before rotation. The keys are those of the same
        tokens (PACT, arXiv 2504.08966).

        Returns:
            (I, L) the softmax of each head, and its mean over heads.

        Raises:
            UnsupportedModel: The layer's queries and keys cannot be computed from outside.
        """
        attention, row = _attention_module(self.here.layer), self.row()
        query, key = _split(self.here, "q"), _split(self.here, "k")  # (B, heads, T, d)
        column = torch.arange(self.valid.shape[1], device=self.valid.device)
        place = self.images % len(column)  # (I, L) columns
        # All tokens up to the image's last one.
        upto = self.valid[row] & (
            column <= place.masked_fill(~self.image_mask, 0).amax(1, keepdim=True)
        )  # (I, T)
        weight = upto.float() / upto.sum(1, keepdim=True)
        mean = torch.einsum("ihtd,it->ihd", query[row].float(), weight)
        # Query heads share key heads (grouped-query attention).
        mean = mean.unflatten(1, (key.shape[1], -1))  # (I, key heads, query heads of each, d)
        scores = torch.einsum("ikgd,iktd->ikgt", mean, key[row].float()) * attention.scaling
        given = scores.masked_fill(~upto[:, None, None], -torch.inf).softmax(-1).mean((1, 2))
        return given.gather(1, place)  # (I, T) -> (I, L)

    @torch.no_grad()
    def rotated_keys(self) -> Tensor:
        """Compute the rotated keys of all rows in the layer before.

        Returns:
            (B, T, heads * d), all key heads side by side.

        Raises:
            ValueError: The layer before was not recorded.
            UnsupportedModel: The layer's keys cannot be computed from outside.
        """
        if self.before is None:
            raise ValueError(
                'the keys of the previous layer need "previous_layer" in needs, and a layer above 0'
            )
        return _rotated(self.before, "k").transpose(1, 2).flatten(2)

    def behind(self) -> Tensor:
        """Mark the text after the last image of each image's batch row.

        Returns:
            (I, T) bool. If there is no text after the last image, all text of the batch row. If
            labels are given, answers are not marked.

        Raises:
            UnsupportedModel: A batch row has no text, or several packed samples.
        """
        text, column = self._text(), torch.arange(self.valid.shape[1], device=self.valid.device)
        # The last column of each image (I,), and of the last image of each batch row (B,).
        ends = (self.images % len(column)).masked_fill(~self.image_mask, 0).amax(1)
        last = ends.new_zeros(len(text)).scatter_reduce(0, self.row(), ends, "amax")
        behind = text & (column > last[:, None])
        # (B, T) -> (I, T)
        chosen = torch.where(behind.any(1, keepdim=True), behind, text)[self.row()]
        if not bool(chosen.any(1).all()):
            raise UnsupportedModel(
                "a row of this batch has a picture and no text but answers, so nothing ranks its "
                "tokens; use a method that does not read the question, such as divprune"
            )
        return chosen

    def _text(self) -> Tensor:
        """(B, T) bool, True at real tokens that are not visual, and have no label.

        Raises UnsupportedModel for packed samples, because it is unknown whose text is meant.
        """
        if ((self.sample != self.sample.gather(1, self._last_row())) & self.valid).any():
            raise UnsupportedModel(
                "rows of this batch are packed: they hold several samples, each with a question of "
                "its own; use a compressor that does not read the question, or one sample a row"
            )
        text = self.valid.clone()
        text.view(-1)[self.images[self.image_mask]] = False
        return text if self.labelled is None else text & ~self.labelled

    def row(self) -> Tensor:
        """(I,) the batch row of each image."""
        return self.images[:, 0] // self.valid.shape[1]

    def _last_row(self) -> Tensor:
        """(B, 1) column of the last real token of each batch row."""
        column = torch.arange(self.valid.shape[1], device=self.valid.device)
        return (self.valid * column).amax(1, keepdim=True)

    def _of_sample(self, values: Tensor) -> Tensor:
        """(B, T) the sum of ``values`` (B, T) over the packed sample of each token."""
        return torch.zeros_like(values).scatter_add(1, self.sample, values).gather(1, self.sample)

    def _queries(self, query: str) -> Tensor:
        """(B, T) bool, True at the query tokens; each packed sample has at least one."""
        place = self.valid * torch.arange(self.valid.shape[1], device=self.valid.device)
        ends = torch.zeros_like(self.sample).scatter_reduce(1, self.sample, place, "amax")
        # Compared by column, because padding may stand between the samples of a batch row.
        last = self.valid & (ends.gather(1, self.sample) == place)
        if query == "last" or self.answers is None:
            return last
        answers = self.answers & self.valid
        return torch.where(self._of_sample(answers.long()) > 0, answers, last)


@dataclass
class TowerLayer:
    """Queries and keys of one layer of the vision tower.

    Attributes:
        query: (I, T, D) queries of the T tokens of each image or segment, D = heads * d, rotated if
            the tower rotates them.
        key: (I, T, D) keys, likewise.
        heads: Number of heads.
        mask: (I, T) bool, False at padding. None: there is no padding.
        plain: (I, T, D) keys before rotation. None: the tower does not rotate.
    """

    query: Tensor
    key: Tensor
    heads: int
    mask: Tensor | None = None
    plain: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """(I, T, D) keys before rotation."""
        return self.key if self.plain is None else self.plain

    def attention(self, rows: slice, per_head: bool) -> Tensor:
        """Compute the attention that each token receives.

        Args:
            rows: The query tokens.
            per_head: Whether to average the softmax of each head. Otherwise all heads are taken as
                one head of width D.

        Returns:
            (I, T) the mean over queries (and heads), with a softmax over all T tokens.
        """
        heads = self.heads if per_head else 1
        query, key = (
            self.query[:, rows].unflatten(-1, (heads, -1)),  # (I, T, D) -> (I, Q, heads, d)
            self.key.unflatten(-1, (heads, -1)),
        )
        scale, given = key.shape[-1] ** -0.5, 0
        # Head by head, because scores (I, heads, T, T) would take much memory.
        for head in range(heads):  # scores (I, Q, T)
            scores = matmul_float32(query[:, :, head], key[:, :, head].transpose(1, 2)) * scale
            if self.mask is None:
                given = given + scores.softmax(-1).mean(1)
            else:
                asking = self.mask[:, rows, None]  # (I, Q, 1), False at queries that are padding
                weights = scores.masked_fill(~self.mask[:, None], -torch.inf).softmax(-1) * asking
                given = given + weights.sum(1) / asking.sum(1)
        return given / heads  # pyright: ignore[reportReturnType]


@dataclass
class TowerProbe:
    """What a compressor can read of the vision tower, at "vision" and at layer 0.

    The tower computes T tokens per image, and the compressor has L tokens per image. If the model
    merges patches into one token, the answer for the token is the mean over its patches.

    Attributes:
        layers: Queries and keys by layer, as named in the compressor's ``tower_layers``.
        length: L, the tokens that an image (or tile) of the tower becomes; 0 if it is unknown or
            if images are packed.
        class_token: Whether a class token stands before the patches.
        unit: Number of patches per merged token, if images of any size are packed in one row
            (Qwen).
        order: (n,) indices that undo the order of window attention on packed merged tokens.
        spread: (I, L) bool at layer 0, True where an image has a token.
        source: (n,) at layer 0, which of the tower's tokens each of these is.
        pack: For images cut into tiles, maps values (tiles, L, D) to the ``made`` tokens of all
            images (made, D), newlines among them, as the model does.
        made: The number of tokens from ``pack``, 0 if it is unknown; None for models without tiles.
    """

    layers: dict[str | int, TowerLayer]
    length: int
    class_token: bool
    unit: int = 1
    order: Tensor | None = None
    spread: Tensor | None = None
    source: Tensor | None = None
    pack: Callable[[Tensor], Tensor] | None = None
    made: int | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens that all images of the tower become."""
        if self.made is not None:
            return self.made
        first = next(iter(self.layers.values()))
        return (
            len(first.key) * self.length
            if first.mask is None
            else int(first.mask.sum()) // self.unit
        )

    @property
    def fits(self) -> bool:
        """Whether it is known which patches became which tokens."""
        first = next(iter(self.layers.values()))
        if self.spread is not None:
            whole = self.tokens > 0 and len(self.source) == int(self.spread.sum())
            if not whole or int(self.source.max()) >= self.tokens:
                return False
        if first.mask is not None:  # packed images state how they are merged
            return True
        total = first.key.shape[1]
        patches = total - self.class_token
        # A square of patches, merged in square blocks of ``merged`` x ``merged``.
        side, merged = round(patches**0.5), round((patches / self.length) ** 0.5)
        blocks = (
            side * side == patches
            and merged * merged * self.length == patches
            and side % merged == 0
        )
        return self.length in (total, patches) or blocks

    @torch.no_grad()
    def attention(self, query: str, layer: str | int = "last", per_head: bool = False) -> Tensor:
        """Compute attention in a layer of the tower; see VisualTokens.attention.

        Args:
            query: "class", from the class token; or "received", the mean over all tokens of the
                image (for packed images, of its segment).
            layer: One of the compressor's ``tower_layers``.
            per_head: See TowerLayer.attention.

        Returns:
            (I, L) attention that each token receives.

        Raises:
            ValueError: Unknown query, or a layer that was not recorded.
            UnsupportedModel: "class" for a tower without a class token.
        """
        if query not in ("class", "received"):
            raise ValueError(
                f"at 'vision' there is attention('class') or attention('received'), not {query!r}"
            )
        if query == "class" and not self.class_token:
            raise UnsupportedModel(
                "the vision tower has no class token whose attention could rank patches"
            )
        rows = slice(0, 1) if query == "class" else slice(None)
        at = self._layer(layer)
        return self._per_token(at.attention(rows, per_head)[..., None], at.mask)[..., 0]

    @torch.no_grad()
    def keys(self, layer: str | int = "last", per_head: bool = False) -> Tensor:
        """Return keys of a layer of the tower, before rotation.

        Args:
            layer: One of the compressor's ``tower_layers``.
            per_head: Whether to average over heads, in float32.

        Returns:
            (I, L, D), all heads side by side, or (I, L, D / heads) if ``per_head``.

        Raises:
            ValueError: A layer that was not recorded.
        """
        at = self._layer(layer)
        values = at.keys.unflatten(-1, (at.heads, -1)).float().mean(-2) if per_head else at.keys
        return self._per_token(values, at.mask)

    def _layer(self, name: str | int) -> TowerLayer:
        if name not in self.layers:
            raise ValueError(
                f"layer {name!r} of the vision tower was not kept; list it in tower_layers"
            )
        return self.layers[name]

    def _per_token(self, values: Tensor, mask: Tensor | None) -> Tensor:
        """Values (I, T, D) of the tower's tokens -> (I, L, D) of the compressor's tokens."""
        if mask is not None:
            # Packed images: (I, T, D) -> (S, D) -> (S / unit, unit, D) -> (S / unit, D)
            values = values[mask].unflatten(0, (-1, self.unit)).mean(1)
            values = values if self.order is None else values[self.order]
        else:
            values = self._of_blocks(values)  # (I, T, D) -> (I, L, D)
            values = values if self.pack is None else self.pack(values)  # -> (made, D)
        if self.spread is None:
            return values
        # Layer 0 orders and pads tokens in its own way: (.., D) -> (tokens, D) -> (I, L, D)
        spread = values.new_zeros(*self.spread.shape, values.shape[-1])
        flat = values.reshape(-1, values.shape[-1])
        spread[self.spread] = flat[self.source]
        return spread

    def _of_blocks(self, values: Tensor) -> Tensor:
        """Values (I, T, D) of square images -> (I, L, D), the means over blocks of patches."""
        patches = values.shape[1] - self.class_token
        if patches <= self.length:  # nothing is merged; the class token stays if L counts it
            return values[:, -self.length :]
        merged, side = round((patches / self.length) ** 0.5), round(patches**0.5)
        # (I, patches, D) -> (I, rows, merged, columns, merged, D) -> (I, rows, columns, D)
        blocks = values[:, -patches:].unflatten(1, (side // merged, merged, side // merged, merged))
        return blocks.mean((2, 4)).flatten(1, 2)


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """Multiply matrices in float32, also under autocast.

    It is for scores and distances that are ranked, where rounding would change the ranks.

    Args:
        a: (..., n, d).
        b: (..., d, m).

    Returns:
        (..., n, m) in float32.
    """
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


def _compact(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The columns (B, Q) at which ``chosen`` (B, T) is True, in order, and their mask (B, Q)."""
    count = chosen.sum(1)
    longest = max(int(count.max()), 1)
    # The stable sort puts the chosen columns first.
    index = torch.argsort(~chosen, dim=1, stable=True)[:, :longest]
    return index, torch.arange(longest, device=chosen.device) < count[:, None]


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """Values (B or 1, T, C) at rows (B, Q) -> (B, Q, C)."""
    return values.expand(len(rows), -1, -1).gather(
        1, rows[..., None].expand(-1, -1, values.shape[-1])
    )


def attention_rows(at: LayerInput, rows: Tensor, valid: Tensor, sample: Tensor) -> Tensor:
    """Compute the causal attention of some rows of a decoder layer.

    Args:
        at: The input of the layer.
        rows: (B, Q) columns of the query tokens.
        valid: (B, T) bool, False at padding.
        sample: (B, T) number of each token's packed sample.

    Returns:
        (B, Q, T) ``softmax(q k^T * scale)`` over the tokens of the same sample up to the query, the
        mean over heads.

    Raises:
        UnsupportedModel: The layer's attention cannot be computed from outside.
    """
    attention, length = _attention_module(at.layer), at.hidden.shape[1]
    query, key = _rotated(at, "q", rows), _rotated(at, "k")
    query = query.unflatten(1, (key.shape[1], -1))  # (B, key heads, query heads of each, Q, D)
    scores = (query @ key[:, :, None].transpose(-1, -2)).float() * attention.scaling
    cap = getattr(attention, "attn_logit_softcapping", None)
    scores = torch.tanh(scores / cap) * cap if cap else scores  # (B, key heads, groups, Q, T)
    # (T,), (B, Q, 1) -> (B, Q, T)
    seen = (torch.arange(length, device=rows.device) <= rows[..., None]) & valid[:, None]
    seen &= sample[:, None] == sample.gather(1, rows)[..., None]
    return scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).mean((1, 2))


def _rotated(at: LayerInput, which: str, rows: Tensor | None = None) -> Tensor:
    """Rotated queries ("q") or keys ("k"): (B, heads, T, d), or (B, heads, Q, d) at rows (B, Q)."""
    attention = _attention_module(at.layer)
    # Each model family has its own function, in the module of its attention class.
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        raise UnsupportedModel(
            f"{type(attention).__name__}: no apply_rotary_pos_emb beside it to rotate queries with"
        )
    cos, sin = at.rotary
    if rows is not None:
        cos, sin = (_take(values, rows) for values in (cos, sin))
    heads = _split(at, which, rows)
    return rotate(heads, heads, cos, sin)[0]  # it takes and returns queries and keys together


def _split(at: LayerInput, which: str, rows: Tensor | None = None) -> Tensor:
    """Queries or keys before rotation; see _rotated."""
    attention = _attention_module(at.layer)
    normed = at.layer.input_layernorm(at.hidden)
    normed = normed if rows is None else _take(normed, rows)
    # (B, T, C) -> (B, T, heads, d) -> (B, heads, T, d)
    split = getattr(attention, f"{which}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    return getattr(attention, f"{which}_norm", nn.Identity())(split).transpose(1, 2)


def _attention_module(layer: nn.Module) -> nn.Module:
    """The layer's attention module.

    Raises UnsupportedModel if attention scores cannot be computed from its parts.
    """
    attention = getattr(layer, "self_attn", None)
    config = getattr(attention, "config", None)
    if hasattr(config, "no_rope_layers") or getattr(config, "model_type", "").startswith("cohere2"):
        raise UnsupportedModel(
            f"{type(attention).__name__} rotates queries and keys in some layers only, so its "
            "attention scores cannot be computed from outside; use a compressor that needs none, "
            "such as avgpool"
        )
    needed = [
        getattr(attention, name, None) for name in ("q_proj", "k_proj", "head_dim", "scaling")
    ]
    if None in needed or not hasattr(layer, "input_layernorm"):
        raise UnsupportedModel(
            f"{type(layer).__name__} has no self_attn with q_proj and k_proj behind an "
            "input_layernorm, from which attention scores could be computed; use a compressor that "
            "needs none, such as avgpool"
        )
    return attention  # pyright: ignore[reportReturnType]
