"""Attention, keys and rows at one layer, computed from its own weights for the rows asked for only."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llavolta.errors import UnsupportedModel


@dataclass
class LayerInput:
    """What a decoder layer is about to work on: hidden (B, T, C) and rotary (cos, sin), each (B or 1, T, D)."""

    layer: nn.Module
    hidden: Tensor
    rotary: tuple[Tensor, Tensor]


@dataclass
class LayerProbe:
    """What a compressor may ask at its layer; see VisualTokens, which documents the answers.

    here, before: this layer and (if captured) the one before it. valid (B, T): False at padding. answers (B, T): rows
    that predict the first token of an answer, and labelled (B, T), both None without labels. images (I, L): flat rows.
    sample (B, T): the number of the packed sample that a token belongs to; all the same where a row is one sample.
    norm: the decoder's final one. index (B, T): each token's column in the input of this pass. start: the
    VisualTokens of layer 0, where a compressor asks for them. tower: what may be asked of the vision tower, at layer 0.
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
        if isinstance(query, Tensor):
            return self._attention_of(query, previous)
        if query not in ("last", "instruction"):
            raise ValueError(
                f"query must be 'last' or 'instruction' at a decoder layer, not {query!r}"
            )
        chosen = self._queries(query)
        rows, mask = _compact(chosen)
        weights = attention_rows(self._at(previous), rows, self.valid, self.sample)  # (B, Q, T)
        weights = weights.masked_fill(~mask[..., None], 0).sum(1) / self._of_sample(
            chosen.long()
        ).clamp(min=1)
        return weights.reshape(-1)[self.images]

    def _at(self, previous: bool) -> LayerInput:
        if previous and self.before is None:
            raise ValueError(
                'the attention of the previous layer needs "previous_layer" in needs, and a layer above 0'
            )
        return self.before if previous else self.here  # pyright: ignore[reportReturnType]

    def _attention_of(self, chosen: Tensor, previous: bool) -> Tensor:
        """(I, L) from the tokens of its row that ``chosen`` (I, T) marks for each picture, their mean."""
        at, row = self._at(previous), self.row()
        rows, mask = _compact(chosen)
        rotary = tuple(part if len(part) == 1 else part[row] for part in at.rotary)
        at = LayerInput(at.layer, at.hidden[row], rotary)
        weights = attention_rows(at, rows, self.valid[row], self.sample[row])  # (I, Q, T)
        weights = weights.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(
            min=1
        )
        return weights.gather(1, self.images % self.valid.shape[1])

    def from_start(self, marks: Tensor) -> Tensor:
        """marks (I, T0) of the tokens at layer 0 of each picture's row -> (I, T) of those that are here."""
        before, here = (probe.index[probe.row()] for probe in (self.start.probe, self))
        there = self.start.probe.valid[self.start.probe.row()]
        wide = marks.new_zeros(
            len(marks), 1 + max(int(before.max()), int(here.max())), dtype=torch.long
        )
        wide = wide.scatter_reduce(1, before, (marks & there).long(), "amax").bool()
        return wide.gather(1, here) & self.valid[self.row()]

    @torch.no_grad()
    def keys(self, rotated: bool = False) -> Tensor:
        if rotated:
            return _rotated(self.here, "k").transpose(1, 2).flatten(2).flatten(0, 1)[self.images]
        hidden = self.here.hidden.flatten(0, 1)[self.images]
        layer = self.here.layer
        return _attention_module(layer).k_proj(layer.input_layernorm(hidden))

    @torch.no_grad()
    def own_attention(self) -> Tensor:
        attention, row = _attention_module(self.here.layer), self.row()
        query, key = _split(self.here, "q"), _split(self.here, "k")  # (B, heads, T, d)
        column = torch.arange(self.valid.shape[1], device=self.valid.device)
        place = self.images % len(column)
        upto = self.valid[row] & (
            column <= place.masked_fill(~self.image_mask, 0).amax(1, keepdim=True)
        )  # (I, T)
        weight = upto.float() / upto.sum(1, keepdim=True)
        mean = torch.einsum("ihtd,it->ihd", query[row].float(), weight)
        mean = mean.unflatten(1, (key.shape[1], -1))  # (I, key heads, query heads of each, d)
        scores = torch.einsum("ikgd,iktd->ikgt", mean, key[row].float()) * attention.scaling
        given = scores.masked_fill(~upto[:, None, None], -torch.inf).softmax(-1).mean((1, 2))
        return given.gather(1, place)

    @torch.no_grad()
    def rotated_keys(self) -> Tensor:
        """(B, T, D) of the layer before, with its rotation, of all rows, heads side by side."""
        if self.before is None:
            raise ValueError(
                'the keys of the previous layer need "previous_layer" in needs, and a layer above 0'
            )
        return _rotated(self.before, "k").transpose(1, 2).flatten(2)

    def behind(self) -> Tensor:
        """(I, T) bool, the text of each picture's row behind its last picture, or all its text where there is none
        behind; without answers where labels are given. Raises UnsupportedModel for a row without text, or packed."""
        text, column = self._text(), torch.arange(self.valid.shape[1], device=self.valid.device)
        ends = (self.images % len(column)).masked_fill(~self.image_mask, 0).amax(1)
        last = ends.new_zeros(len(text)).scatter_reduce(0, self.row(), ends, "amax")
        behind = text & (column > last[:, None])
        chosen = torch.where(behind.any(1, keepdim=True), behind, text)[self.row()]
        if not bool(chosen.any(1).all()):
            raise UnsupportedModel(
                "a row of this batch has a picture and no text but answers, so nothing ranks its tokens; use a method "
                "that does not read the question, such as divprune"
            )
        return chosen

    def _text(self) -> Tensor:
        """(B, T) bool, real tokens that are neither visual nor, where labels are given, answers. Raises
        UnsupportedModel for packed rows, whose text is that of several samples."""
        if ((self.sample != self.sample.gather(1, self._last_row())) & self.valid).any():
            raise UnsupportedModel(
                "rows of this batch are packed: they hold several samples, each with a question of its own; use a "
                "compressor that does not read the question, or one sample a row"
            )
        text = self.valid.clone()
        text.view(-1)[self.images[self.image_mask]] = False
        return text if self.labelled is None else text & ~self.labelled

    def row(self) -> Tensor:
        return self.images[:, 0] // self.valid.shape[1]

    def _last_row(self) -> Tensor:
        """(B, 1) the last real token of each row."""
        column = torch.arange(self.valid.shape[1], device=self.valid.device)
        return (self.valid * column).amax(1, keepdim=True)

    def _of_sample(self, values: Tensor) -> Tensor:
        """values (B, T) -> (B, T) their sum over the sample that each token belongs to."""
        return torch.zeros_like(values).scatter_add(1, self.sample, values).gather(1, self.sample)

    def _queries(self, query: str) -> Tensor:
        """(B, T) the tokens whose attention counts, some in each sample."""
        place = self.valid * torch.arange(self.valid.shape[1], device=self.valid.device)
        ends = torch.zeros_like(self.sample).scatter_reduce(1, self.sample, place, "amax")
        last = self.valid & (ends.gather(1, self.sample) == place)  # padding may stand between
        if query == "last" or self.answers is None:
            return last
        answers = self.answers & self.valid
        return torch.where(self._of_sample(answers.long()) > 0, answers, last)


@dataclass
class TowerLayer:
    """What the query and key projections of a layer of the vision tower gave for its T tokens, (I, T, D) each, with all
    ``heads`` side by side; rotated, where the tower does. mask (I, T): False at padding; None: there is none. plain:
    keys without their rotation, where there is one."""

    query: Tensor
    key: Tensor
    heads: int
    mask: Tensor | None = None
    plain: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        return self.key if self.plain is None else self.plain

    def attention(self, rows: slice, per_head: bool) -> Tensor:
        """(I, T) what each token gets from ``rows``, their mean: the softmax over all T tokens, of each head (and their
        mean) or of all heads as one of width D."""
        heads = self.heads if per_head else 1
        query, key = (
            self.query[:, rows].unflatten(-1, (heads, -1)),
            self.key.unflatten(-1, (heads, -1)),
        )
        scale, given = key.shape[-1] ** -0.5, 0
        for head in range(heads):  # those of all T rows and heads at once would take much memory
            scores = matmul_float32(query[:, :, head], key[:, :, head].transpose(1, 2)) * scale
            if self.mask is None:
                given = given + scores.softmax(-1).mean(1)
            else:
                asking = self.mask[:, rows, None]
                weights = scores.masked_fill(~self.mask[:, None], -torch.inf).softmax(-1) * asking
                given = given + weights.sum(1) / asking.sum(1)
        return given / heads  # pyright: ignore[reportReturnType]


@dataclass
class TowerProbe:
    """What a compressor may ask at "vision" and layer 0: attention and keys of the tower's layers that it lists.

    layers: by the names they were asked for. length: L, the tokens that a picture of the tower becomes. class_token:
    whether one stands before the patches. If the model merges square blocks of patches into its L tokens, a token's
    answers are the means over its block. unit: where patches of unlike pictures stand in one row, merged ``unit`` at a
    time, and order: of the merged ones. pack: where images are cut in tiles, from (tiles, L, D) to the ``made``
    tokens of all images (made, D), newlines among them, as the model does it. spread (I, L): at layer 0, where the
    tokens of all pictures stand, and source (n,): which of the tower's each of them is.
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
        """How many tokens the tower's pictures become, all together."""
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
        """Whether it is known which patches the L tokens are made of."""
        first = next(iter(self.layers.values()))
        if self.spread is not None:
            whole = self.tokens > 0 and len(self.source) == int(self.spread.sum())
            if not whole or int(self.source.max()) >= self.tokens:
                return False
        if first.mask is not None:
            return True
        total = first.key.shape[1]
        patches = total - self.class_token
        side, merged = round(patches**0.5), round((patches / self.length) ** 0.5)
        blocks = (
            side * side == patches
            and merged * merged * self.length == patches
            and side % merged == 0
        )
        return self.length in (total, patches) or blocks

    @torch.no_grad()
    def attention(self, query: str, layer: str | int = "last", per_head: bool = False) -> Tensor:
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
        """(I, T, D) -> (I, L, D)."""
        if mask is not None:
            values = values[mask].unflatten(0, (-1, self.unit)).mean(1)
            values = values if self.order is None else values[self.order]
        else:
            values = self._of_blocks(values)
            values = values if self.pack is None else self.pack(values)
        if self.spread is None:
            return values
        spread = values.new_zeros(*self.spread.shape, values.shape[-1])
        flat = values.reshape(-1, values.shape[-1])
        spread[self.spread] = flat[self.source]
        return spread

    def _of_blocks(self, values: Tensor) -> Tensor:
        """(I, T, D) of whole square pictures -> (I, L, D)."""
        patches = values.shape[1] - self.class_token
        if patches <= self.length:
            return values[:, -self.length :]
        merged, side = round((patches / self.length) ** 0.5), round(patches**0.5)
        blocks = values[:, -patches:].unflatten(1, (side // merged, merged, side // merged, merged))
        return blocks.mean((2, 4)).flatten(1, 2)

    def behind(self):
        raise ValueError("there is no question yet at 'vision'; use a decoder layer")

    row = rotated_keys = from_start = behind


def matmul_float32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in float32, also under autocast: for scores and distances whose order decides."""
    with torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


def _compact(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T) bool to the indices (B, Q) of the chosen columns, in order, and their mask (B, Q)."""
    count = chosen.sum(1)
    longest = max(int(count.max()), 1)
    index = torch.argsort(~chosen, dim=1, stable=True)[:, :longest]
    return index, torch.arange(longest, device=chosen.device) < count[:, None]


def _take(values: Tensor, rows: Tensor) -> Tensor:
    """values (B or 1, T, C) at rows (B, Q) -> (B, Q, C)."""
    return values.expand(len(rows), -1, -1).gather(
        1, rows[..., None].expand(-1, -1, values.shape[-1])
    )


def attention_rows(at: LayerInput, rows: Tensor, valid: Tensor, sample: Tensor) -> Tensor:
    """(B, Q, T) attention of rows (B, Q) to all tokens: softmax(q k^T * scale) over the earlier ones of the same sample
    (B, T), mean over heads."""
    attention, length = _attention_module(at.layer), at.hidden.shape[1]
    query, key = _rotated(at, "q", rows), _rotated(at, "k")
    query = query.unflatten(1, (key.shape[1], -1))  # (B, key heads, query heads of each, Q, D)
    scores = (query @ key[:, :, None].transpose(-1, -2)).float() * attention.scaling
    cap = getattr(attention, "attn_logit_softcapping", None)
    scores = torch.tanh(scores / cap) * cap if cap else scores
    seen = (torch.arange(length, device=rows.device) <= rows[..., None]) & valid[
        :, None
    ]  # (B, Q, T)
    seen &= sample[:, None] == sample.gather(1, rows)[..., None]
    return scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).mean((1, 2))


def _rotated(at: LayerInput, which: str, rows: Tensor | None = None) -> Tensor:
    """(B, heads, T, d) rotated queries ("q") or keys ("k") of a layer; of the given rows (B, Q) only if any are."""
    attention = _attention_module(at.layer)
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        raise UnsupportedModel(
            f"{type(attention).__name__}: no apply_rotary_pos_emb beside it to rotate queries with"
        )
    cos, sin = at.rotary
    if rows is not None:
        cos, sin = (_take(values, rows) for values in (cos, sin))
    heads = _split(at, which, rows)
    return rotate(heads, heads, cos, sin)[0]


def _split(at: LayerInput, which: str, rows: Tensor | None = None) -> Tensor:
    """(B, heads, T, d) queries or keys before rotation; see _rotated."""
    attention = _attention_module(at.layer)
    normed = at.layer.input_layernorm(at.hidden)
    normed = normed if rows is None else _take(normed, rows)
    split = getattr(attention, f"{which}_proj")(normed).unflatten(-1, (-1, attention.head_dim))
    return getattr(attention, f"{which}_norm", nn.Identity())(split).transpose(1, 2)


def _attention_module(layer: nn.Module) -> nn.Module:
    attention = getattr(layer, "self_attn", None)
    config = getattr(attention, "config", None)
    if hasattr(config, "no_rope_layers") or getattr(config, "model_type", "").startswith("cohere2"):
        raise UnsupportedModel(
            f"{type(attention).__name__} rotates queries and keys in some layers only, so its attention scores cannot "
            "be computed from outside; use a compressor that needs none, such as avgpool"
        )
    needed = [
        getattr(attention, name, None) for name in ("q_proj", "k_proj", "head_dim", "scaling")
    ]
    if None in needed or not hasattr(layer, "input_layernorm"):
        raise UnsupportedModel(
            f"{type(layer).__name__} has no self_attn with q_proj and k_proj behind an input_layernorm, from which "
            "attention scores could be computed; use a compressor that needs none, such as avgpool"
        )
    return attention  # pyright: ignore[reportReturnType]
