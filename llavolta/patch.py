"""``compress``: fewer visual tokens inside a stock Hugging Face vision-language model, by forward hooks alone.

What happens in one forward pass, with a compressor at the input of decoder layer K:

1. The hook on the base model notes which tokens are visual and which image each belongs to.
2. The hook on layer K hands each image's hidden states to the compressor, and rebuilds the sequence from the text
   tokens (untouched) and what the compressor left. Padding goes too; rows of the batch that end up shorter are
   padded at their end.
3. The hooks on layers K, K+1, ... exchange the attention mask and the rotary embeddings for those of the shorter
   sequence: the mask is the stock one, looked up at the tokens that stay, so whatever pattern the model uses
   (causal, sliding window, padding, a cache) is kept. Text tokens keep their positions.
4. The hook on the decoder's output gives back one row per input token, so that the head, the loss and ``generate``
   see the shape they expect; in training with labels only the rows that predict a label (see ``compress``).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from llavolta.compressors import CompressedTokens, Compressor, VisualTokens
from llavolta.families import UnsupportedModel, find_parts, has_pictures, image_rows
from llavolta.plan import Plan, check_layers, format_plan, parse_plan

IGNORED = -100  # the label of tokens without loss, as everywhere in transformers

_active: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def compress(
    model: nn.Module, plan: str | Mapping[int, Compressor] | None, *, labelled_only: bool | None = None
) -> Compression:
    """Compress the visual tokens of ``model`` by ``plan`` until the returned handle is removed or its block ends.

    model: any supported vision-language model, also inside DDP or PEFT. plan: ``{layer: compressor}`` or its text,
    such as ``"2:avgpool:8"``; "none" leaves the model as it is.

    The loss is that of the same labelled tokens as without compression. ``logits`` hold one row per input token:
    the row of a token that was merged or dropped is that of the last remaining token at or before it. In training,
    when labels are given, ``logits`` are (1, M + 1, vocabulary) instead: the rows of the M labelled tokens of the
    batch in order, and one to spare; the loss and all gradients are the same, at a fraction of the memory.
    ``labelled_only=False`` keeps the full logits in training too, ``True`` spares them also under a plan that
    removes nothing (which otherwise leaves the model untouched, bit for bit).

    Raises PlanError for a plan that does not fit, UnsupportedModel for a model without visual tokens, RuntimeError
    if the model is being compressed already.
    """
    return Compression(model, plan, labelled_only)


@dataclass
class _Rows:
    """What the rows (B, T) of the hidden states stand for, from one compressed layer to the next.

    index: the column of this pass's stock attention mask. later: the column that the same token will have in the
    stock masks of later passes on the same cache. valid: False at padding. positions: (B, T, A). images (I, L) and
    image_mask: the flat rows of each image's tokens. rotary: the rotary embeddings that replace a stock one.
    """

    index: Tensor
    later: Tensor
    valid: Tensor
    positions: Tensor
    images: Tensor
    image_mask: Tensor
    rotary: dict[int, object] = field(default_factory=dict)


@dataclass
class _Pass:
    """The state of one forward pass."""

    visual: Tensor  # (B, T) bool
    images: Tensor | None = None  # (I, L); None in a pass without images
    image_mask: Tensor | None = None
    real: Tensor | None = None  # (B, T) bool, False at padding
    cache: object | None = None
    past: int = 0  # columns that the stock mask holds before this pass's own
    rotary: list[tuple[tuple, dict, object]] = field(default_factory=list)
    rows: _Rows | None = None
    masks: dict[tuple[int, int], object] = field(default_factory=dict)  # by layer of the plan and stock mask
    cached: dict[int, _CachedRows] = field(default_factory=dict)  # what the cache will hold, by layer of the plan


@dataclass
class _CachedRows:
    """What the rows (B, n) of a key-value cache stand for: see _Rows. original: the column without compression."""

    later: Tensor
    original: Tensor
    valid: Tensor
    seen: int  # how many tokens, compressed or not, this cache was shown


class Compression:
    """The handle that ``compress`` returns: a context manager with ``remove()``. ``plan`` is the parsed plan."""

    def __init__(self, model: nn.Module, plan, labelled_only: bool | None):
        self.parts = find_parts(model)
        self.plan: Plan = check_layers(parse_plan(plan), len(self.parts.layers))
        self.working: Plan = {layer: c for layer, c in self.plan.items() if not c.is_identity}
        self.labelled_only = labelled_only if labelled_only is not None else bool(self.working)
        self._pass: _Pass | None = None
        self._labelled: tuple[Tensor, Tensor] | None = None
        self._caches: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._hooks: list = []
        if self.parts.decoder in _active:
            raise RuntimeError("this model is being compressed already; remove() the first handle or leave its block")
        if self.working or self.labelled_only:
            self._install()

    def __repr__(self) -> str:
        return f"compress({format_plan(self.plan)!r}{'' if self._hooks else ', not in force'})"

    def __enter__(self) -> Compression:
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def remove(self) -> None:
        """Take every hook off the model; calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        _active.discard(self.parts.decoder)

    def _install(self) -> None:
        parts, add = self.parts, self._hooks.append
        _active.add(parts.decoder)
        if parts.top is not None and self.labelled_only:
            add(parts.top.register_forward_pre_hook(self._before_top, with_kwargs=True))
            add(parts.top.register_forward_hook(self._after_top, always_call=True))
        add(parts.decoder.register_forward_hook(self._after_decoder))
        if not self.working:
            return
        add(parts.base.register_forward_pre_hook(self._before_base, with_kwargs=True))
        add(parts.base.register_forward_hook(self._after_base, always_call=True))
        add(parts.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        add(parts.rotary.register_forward_hook(self._after_rotary, with_kwargs=True))
        for number in range(min(self.working), len(parts.layers)):
            segment = max(layer for layer in self.working if layer <= number)
            hook = partial(self._before_layer, number, segment)
            add(parts.layers[number].register_forward_pre_hook(hook, with_kwargs=True))

    # --- around the whole model: labels ---

    def _before_top(self, module, args, kwargs):
        labels = kwargs.get("labels")
        if labels is None or not module.training or kwargs.get("shift_labels") is not None:
            return None
        row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # column: of the token that predicts
        self._labelled = (row, column)
        # The head gets one row to spare, because the stock loss shifts labels by one.
        short = torch.cat([labels.new_full((1,), IGNORED), labels[row, column + 1]])[None]
        return args, {**kwargs, "labels": short}

    def _after_top(self, module, args, output):
        self._labelled = None

    # --- around the base model: which tokens are visual ---

    def _before_base(self, module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise UnsupportedModel("compress needs input_ids to find the visual tokens; pass them, not inputs_embeds")
        visual = torch.zeros_like(ids, dtype=torch.bool)
        if has_pictures(kwargs):  # else a placeholder is an ordinary token, as for the stock model
            for token in self.parts.visual_ids:
                visual |= ids == token
        state = _Pass(visual)
        if visual.any():
            state.images, state.image_mask = image_rows(visual, kwargs)
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            state.real = mask[:, -ids.shape[1] :].bool()
        else:
            state.real = torch.ones_like(visual)
        self._pass = state

    def _after_base(self, module, args, output):
        self._pass = None

    # --- around the decoder ---

    def _before_decoder(self, module, args, kwargs):
        state = self._pass
        if state is None:
            return None
        state.cache = kwargs.get("past_key_values")
        if state.cache is None:
            return None
        state.past = state.cache.get_seq_length()
        first = self._caches.get(state.cache, {}).get(0)
        if first is None:
            return None
        # Layer 0's cache is a compressed one, and the stock code takes mask and positions from its length.
        kwargs = dict(kwargs)
        new, mask = state.visual.shape[1], kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            past = mask.gather(1, first.original) * first.valid.to(mask.dtype)
            kwargs["attention_mask"] = torch.cat([past, mask[:, -new:]], dim=1)
        elif mask is None and not first.valid.all():
            kwargs["attention_mask"] = torch.cat([first.valid, torch.ones_like(state.visual)], dim=1).long()
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = torch.arange(first.seen, first.seen + new, device=state.visual.device)[None]
        return args, kwargs

    def _after_rotary(self, module, args, kwargs, output):
        if self._pass is not None:
            self._pass.rotary.append((args, kwargs, output))

    def _after_decoder(self, module, args, output):
        state = self._pass
        if state is not None and state.cache is not None and state.cached:
            self._caches.setdefault(state.cache, {}).update(state.cached)
        rows = state.rows if state is not None else None
        hidden = output[0]
        if rows is None and self._labelled is None:
            return None
        back = None if rows is None else _rows_of_inputs(rows, state.visual.shape)
        if self._labelled is not None:
            row, column = self._labelled
            picked = hidden[row, column if back is None else back[row, column]]
            hidden = torch.cat([picked, picked.new_zeros(1, picked.shape[-1])])[None]
        else:
            hidden = hidden.gather(1, back[..., None].expand(-1, -1, hidden.shape[-1]))
        if isinstance(output, tuple):
            return (hidden, *output[1:])
        output.last_hidden_state = hidden
        return output

    # --- at a decoder layer ---

    def _before_layer(self, number: int, segment: int, module, args, kwargs):
        """The pre-forward hook of layer ``number``, whose rows the compressor at layer ``segment`` made."""
        state = self._pass
        if state is None:
            return None
        if "hidden_states" in kwargs:
            args, kwargs = (kwargs["hidden_states"], *args), {k: v for k, v in kwargs.items() if k != "hidden_states"}
        hidden = args[0]
        state.cache = kwargs.get("past_key_values")
        if number == segment and state.images is not None:
            hidden = self._shrink(self.working[number], number, hidden, state)
        if number == segment and state.cache is not None:
            self._note_cache(number, state)
        if state.rows is None and segment not in state.cached:
            return None
        kwargs = dict(kwargs)
        kwargs["attention_mask"] = self._mask(kwargs.get("attention_mask"), segment, state)
        if state.rows is not None:
            kwargs["position_embeddings"] = self._position_embeddings(kwargs.get("position_embeddings"), state)
            kwargs["position_ids"] = None  # the attention code takes gaps in them for packed sequences
        return (hidden, *args[1:]), kwargs

    def _shrink(self, compressor: Compressor, number: int, hidden: Tensor, state: _Pass) -> Tensor:
        """hidden (B, T, C) -> (B, T', C) after ``compressor``; state.rows then describes the new rows."""
        rows = state.rows or self._first_rows(state)
        batch, length, width = hidden.shape
        flat = hidden.reshape(batch * length, width)
        positions = rows.positions.reshape(batch * length, -1)
        out = compressor(VisualTokens(flat[rows.images], rows.image_mask, positions[rows.images]))
        where = f"compressor {compressor} at layer {number}"
        anchor = _check(out, rows, width, where)

        # The token that an anchor stands for is the only visual token that stays.
        anchor_rows = rows.images.gather(1, anchor)  # (I, M) flat
        visual = torch.zeros_like(rows.valid).view(-1)
        visual[rows.images[rows.image_mask]] = True
        keep = rows.valid.view(-1) & ~visual
        keep[anchor_rows[out.mask]] = True
        keep = keep.view(batch, length)

        count = keep.sum(1)
        new_length = int(count.max())
        take = torch.argsort(~keep, dim=1, stable=True)[:, :new_length]  # kept columns first, in their order
        valid = torch.arange(new_length, device=hidden.device) < count[:, None]
        take = torch.where(valid, take, take[:, :1])
        start = torch.arange(batch, device=hidden.device)[:, None]
        source = (take + start * length).view(-1)
        target = (keep.cumsum(1) - 1 + start * new_length).view(-1)[anchor_rows]  # (I, M) flat, new rows

        out_positions = out.positions if out.positions is not None else positions[anchor_rows]
        new = flat.index_select(0, source).index_copy(0, target[out.mask], out.hidden[out.mask])
        new_positions = positions.index_select(0, source).index_copy(0, target[out.mask], out_positions[out.mask])
        later = rows.later.gather(1, take)
        if number == 0:  # later stock masks have the columns that are left here
            later = _columns(new_length, state)
        state.rows = _Rows(
            rows.index.gather(1, take),
            later,
            valid,
            new_positions.view(batch, new_length, -1),
            target,
            out.mask,
        )
        return new.view(batch, new_length, width)

    def _first_rows(self, state: _Pass) -> _Rows:
        batch, length = state.visual.shape
        index = _columns(length, state)
        position_ids = _position_ids(*state.rotary[0][:2])
        if position_ids.dim() == 2:
            positions = position_ids.expand(batch, -1)[..., None]
        else:  # (A, B, T)
            positions = position_ids.expand(-1, batch, -1).permute(1, 2, 0)
        return _Rows(index, index, state.real, positions, state.images, state.image_mask)

    def _note_cache(self, segment: int, state: _Pass) -> None:
        """Describe the rows of the cache that layers from ``segment`` on will hold after this pass."""
        length = state.visual.shape[1]
        past = self._caches.get(state.cache, {}).get(segment)
        if past is None and state.rows is None:
            return
        if past is None:  # so far the cache holds every token
            before = _columns(state.past, state)
            past = _CachedRows(before, before, torch.ones_like(before, dtype=torch.bool), state.past)
        held = state.cache.get_seq_length(segment)
        if held != past.valid.shape[1]:
            raise RuntimeError(
                f"the cache holds {held} tokens at layer {segment}, not the {past.valid.shape[1]} that compress left "
                "there; a cache that was cropped or edited cannot be continued"
            )
        rows = state.rows
        index, later, valid = (
            (rows.index, rows.later, rows.valid) if rows else (_columns(length, state),) * 2 + (state.real,)
        )
        state.cached[segment] = _CachedRows(
            torch.cat([past.later, later + state.past], dim=1),
            torch.cat([past.original, index + past.seen], dim=1),
            torch.cat([past.valid, valid], dim=1),
            past.seen + length,
        )

    def _mask(self, mask, segment: int, state: _Pass):
        """The stock attention ``mask`` for the rows and cached rows of ``segment``; see _look_up_mask."""
        if (segment, id(mask)) not in state.masks:
            rows, past = state.rows, self._caches.get(state.cache, {}).get(segment) if state.cache else None
            index = _columns(state.visual.shape[1], state) if rows is None else rows.index
            valid = torch.ones_like(index, dtype=torch.bool) if rows is None else rows.valid
            before = _columns(state.past, state) if past is None else past.later
            before_valid = torch.ones_like(before, dtype=torch.bool) if past is None else past.valid
            key = torch.cat([before, index + state.past], dim=1)
            key_valid = torch.cat([before_valid, valid], dim=1)
            state.masks[segment, id(mask)] = _look_up_mask(mask, index, key, key_valid)
        return state.masks[segment, id(mask)]

    def _position_embeddings(self, stock, state: _Pass):
        rows = state.rows
        if id(stock) not in rows.rotary:
            for args, kwargs, output in state.rotary:
                if output is stock:
                    break
            else:
                raise UnsupportedModel("a decoder layer got rotary embeddings that its rotary_emb did not make")
            positions = rows.positions.permute(2, 0, 1)
            like = _position_ids(args, kwargs)
            args, kwargs = _with_position_ids(args, kwargs, positions if like.dim() == 3 else positions[0])
            rows.rotary[id(stock)] = self.parts.rotary.forward(*args, **kwargs)
        return rows.rotary[id(stock)]


def _columns(count: int, state: _Pass) -> Tensor:
    """(B, count) 0, 1, 2, ... in every row."""
    return torch.arange(count, device=state.visual.device).expand(state.visual.shape[0], -1)


def _position_ids(args: tuple, kwargs: dict) -> Tensor:
    return kwargs["position_ids"] if "position_ids" in kwargs else args[1]


def _with_position_ids(args: tuple, kwargs: dict, positions: Tensor) -> tuple[tuple, dict]:
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": positions}
    return (args[0], positions, *args[2:]), kwargs


def _check(out: CompressedTokens, rows: _Rows, width: int, where: str) -> Tensor:
    """The anchors, clamped at padding, of a compressor's output that has been found sound."""
    images, length = rows.image_mask.shape
    kept = tuple(out.mask.shape)
    if out.hidden.shape != (*kept, width) or kept[0] != images or out.anchor.expand(out.mask.shape).shape != kept:
        raise ValueError(
            f"{where} returned hidden {tuple(out.hidden.shape)}, mask {kept}, anchor {tuple(out.anchor.shape)} for "
            f"{images} images of width {width}; expected ({images}, M, {width}), ({images}, M), ({images}, M)"
        )
    if not out.mask.any(1).all():
        raise ValueError(f"{where} left an image with no token; every image must keep at least one")
    if not torch.isfinite(out.hidden).all():
        raise FloatingPointError(f"{where} returned NaN or infinite values; check the compressor and the learning rate")
    return out.anchor.expand(kept).clamp(0, length - 1)


def _rows_of_inputs(rows: _Rows, shape: tuple[int, int]) -> Tensor:
    """(B, T) for each input token the row that answers for it: the last remaining token at or before it."""
    batch, length = shape
    remaining = torch.zeros(batch, length + 1, dtype=torch.long, device=rows.index.device)
    remaining.scatter_(1, torch.where(rows.valid, rows.index, length), 1)
    return (remaining[:, :length].cumsum(1) - 1).clamp(min=0)


def _look_up_mask(mask, query: Tensor, key: Tensor, key_valid: Tensor):
    """The attention mask of a part of the tokens, looked up in the mask of them all.

    mask: as the attention backend takes it: (B or 1, 1, T, S) bool or additive, (B, S) for flash attention, or None
    for plain causal attention. query (B, Q) and key (B, K): their rows and columns in it. key_valid (B, K).
    """
    if mask is None:
        # Padding stands at the end of a row, where causal attention never looks, unless the rows came from a cache.
        if key.shape[1] == query.shape[1] or bool(key_valid.all()):
            return None
        return key_valid[:, None, None, :].expand(-1, 1, query.shape[1], -1)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        grid = mask.expand(query.shape[0], *mask.shape[1:])
        batch = torch.arange(len(query), device=query.device)[:, None, None]
        picked = grid[:, 0][batch, query[:, :, None], key[:, None, :]][:, None]
        if bool(key_valid.all()):
            return picked
        hidden = ~key_valid[:, None, None, :]
        if mask.dtype == torch.bool:
            return picked & ~hidden
        return picked.masked_fill(hidden, torch.finfo(mask.dtype).min)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.gather(1, key) * key_valid.to(mask.dtype)
    raise UnsupportedModel(f"compress cannot shorten an attention mask of type {type(mask).__name__}")
