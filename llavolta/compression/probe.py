"""Attention, keys and question at one layer, computed from its own weights for the rows asked for only."""

from __future__ import annotations

import sys
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
    """

    here: LayerInput
    before: LayerInput | None
    valid: Tensor
    images: Tensor
    image_mask: Tensor
    sample: Tensor
    answers: Tensor | None = None
    labelled: Tensor | None = None

    @torch.no_grad()
    def attention(self, query: str, previous: bool) -> Tensor:
        if query not in ("last", "instruction"):
            raise ValueError(f"query must be 'last' or 'instruction' at a decoder layer, not {query!r}")
        if previous and self.before is None:
            raise ValueError('the attention of the previous layer needs "previous_layer" in needs, and a layer above 0')
        chosen = self._queries(query)
        rows, mask = _compact(chosen)
        weights = attention_rows(self.before if previous else self.here, rows, self.valid, self.sample)  # (B, Q, T)
        weights = weights.masked_fill(~mask[..., None], 0).sum(1) / self._of_sample(chosen.long()).clamp(min=1)
        return weights.reshape(-1)[self.images]

    @torch.no_grad()
    def keys(self) -> Tensor:
        hidden = self.here.hidden.flatten(0, 1)[self.images]
        layer = self.here.layer
        return _attention_module(layer).k_proj(layer.input_layernorm(hidden))

    def question(self) -> tuple[Tensor, Tensor]:
        if ((self.sample != self.sample.gather(1, self._last_row())) & self.valid).any():
            raise UnsupportedModel(
                "rows of this batch are packed: they hold several samples, each with a question of its own; use a "
                "compressor that does not read the question, or one sample a row"
            )
        text = self.valid.clone()
        text.view(-1)[self.images[self.image_mask]] = False
        if self.labelled is not None:
            text &= ~self.labelled
        rows, mask = _compact(text)
        return _take(self.here.hidden, rows), mask

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
        goes_on = self.valid[:, 1:] & (self.sample[:, 1:] == self.sample[:, :-1])
        last = self.valid & ~torch.nn.functional.pad(goes_on, (0, 1))
        if query == "last" or self.answers is None:
            return last
        answers = self.answers & self.valid
        return torch.where(self._of_sample(answers.long()) > 0, answers, last)


@dataclass
class TowerProbe:
    """What a compressor may ask at "vision": the class token's attention and the keys of the tower's last layer.

    query (I, D): of the class token. key (I, T, D): of the class token and all patches; both as the layer's own query
    and key projections gave them. length: L, the last of these T tokens that go to the projector.
    """

    query: Tensor
    key: Tensor
    length: int

    @torch.no_grad()
    def attention(self, query: str, previous: bool) -> Tensor:
        if query != "class" or previous:
            raise ValueError("at 'vision' there is the attention of the class token only: tokens.attention('class')")
        scores = matmul_float32(self.query[:, None], self.key.transpose(1, 2))[:, 0]
        return (scores * self.key.shape[-1] ** -0.5).softmax(-1)[:, -self.length :]

    def keys(self) -> Tensor:
        return self.key[:, -self.length :]

    def question(self):
        raise ValueError("there is no question yet at 'vision'; use a decoder layer")

    row = question


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
    return values.expand(len(rows), -1, -1).gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))


def attention_rows(at: LayerInput, rows: Tensor, valid: Tensor, sample: Tensor) -> Tensor:
    """(B, Q, T) attention of rows (B, Q) to all tokens: softmax(q k^T * scale) over the earlier ones of the same sample
    (B, T), mean over heads."""
    attention = _attention_module(at.layer)
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        raise UnsupportedModel(f"{type(attention).__name__}: no apply_rotary_pos_emb beside it to rotate queries with")
    normed = at.layer.input_layernorm(at.hidden)
    batch, length, _ = normed.shape

    def heads(projected: Tensor, norm: str) -> Tensor:
        split = projected.view(batch, projected.shape[1], -1, attention.head_dim)
        return getattr(attention, norm, nn.Identity())(split).transpose(1, 2)

    cos, sin = at.rotary
    query, key = heads(attention.q_proj(_take(normed, rows)), "q_norm"), heads(attention.k_proj(normed), "k_norm")
    query, _ = rotate(query, query, _take(cos, rows), _take(sin, rows))
    key, _ = rotate(key, key, cos, sin)
    query = query.unflatten(1, (key.shape[1], -1))  # (B, key heads, query heads of each, Q, D)
    scores = (query @ key[:, :, None].transpose(-1, -2)).float() * attention.scaling
    cap = getattr(attention, "attn_logit_softcapping", None)
    scores = torch.tanh(scores / cap) * cap if cap else scores
    seen = (torch.arange(length, device=rows.device) <= rows[..., None]) & valid[:, None]  # (B, Q, T)
    seen &= sample[:, None] == sample.gather(1, rows)[..., None]
    return scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1).mean((1, 2))


def _attention_module(layer: nn.Module) -> nn.Module:
    attention = getattr(layer, "self_attn", None)
    config = getattr(attention, "config", None)
    if hasattr(config, "no_rope_layers") or getattr(config, "model_type", "").startswith("cohere2"):
        raise UnsupportedModel(
            f"{type(attention).__name__} rotates queries and keys in some layers only, so its attention scores cannot "
            "be computed from outside; use a compressor that needs none, such as avgpool"
        )
    needed = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "head_dim", "scaling")]
    if None in needed or not hasattr(layer, "input_layernorm"):
        raise UnsupportedModel(
            f"{type(layer).__name__} has no self_attn with q_proj and k_proj behind an input_layernorm, from which "
            "attention scores could be computed; use a compressor that needs none, such as avgpool"
        )
    return attention
