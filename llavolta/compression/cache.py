"""The book of compressed key-value caches: what their rows stand for, from one pass on a cache to the next."""

from __future__ import annotations

import weakref
from dataclasses import fields, replace

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate

from llavolta.compression.families import Parts, has_3d_positions
from llavolta.compression.masks import (
    add_to_mask,
    is_flat,
    look_up_mask,
    sliding_window,
    whole_cache,
)
from llavolta.compression.rows import columns, positions_by_row
from llavolta.compression.state import CachedRows, Pass
from llavolta.errors import UnsupportedModel

_OF_KEYS = {"size": 1.0, "calibration": 0.0, "positions": 0.0}  # in CachedRows, and what text has


class CacheBook:
    """By cache and layer of the plan, what the rows of the layers from there on stand for.

    ``begin`` a pass, ``note`` at each layer of the plan what the cache will hold, look up each layer's ``mask``, and
    ``close`` the pass behind the decoder: one that fails on the way leaves the book as it was.
    """

    def __init__(self, parts: Parts):
        self.parts = parts
        self._held: weakref.WeakKeyDictionary = (
            weakref.WeakKeyDictionary()
        )  # {layer of the plan: CachedRows}
        self._left: weakref.WeakKeyDictionary = (
            weakref.WeakKeyDictionary()
        )  # keys as they were, see _rows_of_before

    def begin(self, state: Pass, inputs: dict) -> dict:
        """``inputs`` for a cache whose first layer is a compressed one: stock code takes lengths from that layer."""
        if getattr(state.cache, "is_compileable", False):
            raise UnsupportedModel(
                f"compress cannot fill a {type(state.cache).__name__} of fixed size; use a DynamicCache (the default)"
            )
        state.past = state.cache.get_seq_length()
        if state.past == 0:
            self._held.pop(state.cache, None)  # new, or emptied by reset()
        held = self._up_to_date(state)
        mixed = len(set(getattr(self.parts.decoder.config, "layer_types", None) or ())) > 1
        if held and mixed:
            return self._with_whole_masks(state, inputs, max(rows.seen for rows in held.values()))
        first = held.get(0)
        state.seen = seen = state.past if first is None else first.seen
        new, mask, positions = (
            state.real.shape[1],
            inputs.get("attention_mask"),
            inputs.get("position_ids"),
        )
        claimed = seen  # what the caller takes the cache to have seen
        if isinstance(mask, Tensor) and mask.dim() == 2:
            claimed = mask.shape[1] - new
        elif first is not None and positions is not None and positions.dim() == 2:
            claimed = int(positions[0, 0])
        if claimed != seen:
            raise UnsupportedModel(
                f"the cache was shown {seen} tokens, but the attention_mask or position_ids of this pass speak of "
                f"{claimed}. Continue a cache under the compress() that filled it; and with a plan at layer 0 or "
                "'vision', pass only the new input_ids, with the attention_mask of the whole conversation"
            )
        if first is None:
            return inputs
        if isinstance(mask, Tensor) and mask.dim() == 2:
            past = mask.gather(1, first.original) * first.valid.to(mask.dtype)
            mask = torch.cat([past, mask[:, -new:]], dim=1)
        elif mask is None and not first.valid.all():
            mask = torch.cat([first.valid, state.real], dim=1).long()
        window = sliding_window(self.parts.decoder.config)
        if window is not None and first.seen + new > window:
            raise UnsupportedModel(
                f"a plan at layer 0 or 'vision' cannot continue a cache past the model's sliding window of {window} "
                "tokens; use layer 1 or use_cache=False"
            )
        return self._with_positions({**inputs, "attention_mask": mask}, first.seen, state)

    def _up_to_date(self, state: Pass) -> dict[int, CachedRows]:
        """What the rows of the cache stand for, by layer of the plan; also where since the last pass its samples were
        moved, left out or repeated (beams), or its end was cropped, if that is text alone."""
        held = self._held.get(state.cache, {})
        if not held:
            return held
        of_before = _rows_of_before(
            _last_keys(state.cache), *self._left[state.cache]
        )  # held, so not empty
        if of_before is not None:
            for segment, rows in held.items():
                names = [f.name for f in fields(rows) if isinstance(getattr(rows, f.name), Tensor)]
                held[segment] = replace(
                    rows, **{name: getattr(rows, name)[of_before] for name in names}
                )
        gone = {
            rows.valid.shape[1] - state.cache.get_seq_length(segment)
            for segment, rows in held.items()
        }
        seen = max(rows.seen for rows in held.values())
        if 0 not in held and not state.whole:
            gone.add(seen - state.past)
        count = gone.pop()
        if gone or count <= 0:
            return held  # as it was, or cropped in a way that ``note`` will name
        last = torch.arange(seen - count, seen, device=state.real.device)
        if not all(
            (rows.original[:, -count:] == last).all() & rows.valid[:, -count:].all()
            for rows in held.values()
        ):
            return held
        for segment, rows in held.items():
            names = ("later", "original", "valid", *_OF_KEYS)
            cut = {
                name: getattr(rows, name)[:, :-count]
                for name in names
                if getattr(rows, name) is not None
            }
            held[segment] = replace(rows, seen=rows.seen - count, **cut)
        return held

    def _with_whole_masks(self, state: Pass, inputs: dict, seen: int) -> dict:
        """``inputs`` with masks as if the cache held every token it was shown.

        Models with several kinds of layers take each kind's mask sizes from its first layer, compressed or not.
        """
        state.past, state.seen, state.whole = seen, seen, True
        like = torch.empty(
            *state.real.shape, 1, dtype=self.parts.decoder.dtype, device=state.real.device
        )
        make = getattr(self.parts.top, "create_masks_for_generate", create_masks_for_generate)
        masks = make(
            config=self.parts.decoder.config,
            inputs_embeds=like,
            attention_mask=inputs.get("attention_mask"),
            past_key_values=whole_cache(state.cache, seen),
            position_ids=None,
            token_type_ids=inputs.get("token_type_ids"),
        )
        return self._with_positions({**inputs, "attention_mask": masks}, seen, state)

    def _with_positions(self, inputs: dict, seen: int, state: Pass) -> dict:
        new, position_ids = state.real.shape[1], inputs.get("position_ids")
        if position_ids is None:
            if has_3d_positions(self.parts):
                raise UnsupportedModel(
                    "with a plan at layer 0, pass the position_ids of the new tokens with the cache"
                )
            position_ids = torch.arange(seen, seen + new, device=state.real.device)[None]
        first = self._held.get(state.cache, {}).get(0)
        return {**inputs, "position_ids": position_ids - (0 if first is None else first.moved)}

    def note(self, segment: int, state: Pass) -> None:
        """Describe the rows of the cache that layers from ``segment`` on will hold after this pass."""
        length = state.real.shape[1]
        past = self._held.get(state.cache, {}).get(segment)
        held, expected = (
            state.cache.get_seq_length(segment),
            state.past if past is None else past.valid.shape[1],
        )
        if held != expected:
            raise UnsupportedModel(
                f"the cache holds {held} tokens at layer {segment}, not the {expected} that compress left there; "
                "one that was cropped, copied, or filled under another compress() cannot be continued"
            )
        if past is None and state.rows is None:
            return
        if past is None:  # so far the cache holds every token
            before = columns(state.past, state.real)
            past = CachedRows(before, before, torch.ones_like(before, dtype=torch.bool), state.past)
        rows = state.rows
        index = later = columns(length, state.real)
        valid = state.real
        if rows is not None:
            index, later, valid = rows.index, rows.later, rows.valid
        state.cached[segment] = CachedRows(
            torch.cat([past.later, later + state.past], dim=1),
            torch.cat([past.original, index + past.seen], dim=1),
            torch.cat([past.valid, valid], dim=1),
            past.seen + length,
            moved=past.moved + state.moved,
            **self._of_keys(past, state),
        )

    def _of_keys(self, past: CachedRows | None, state: Pass) -> dict[str, Tensor]:
        """What the bias of the cached rows and this pass's is made of, by the name in CachedRows; (B, n) each."""
        rows, found, (batch, new) = state.rows, {}, state.real.shape
        new = new if rows is None else rows.index.shape[1]
        held = state.past if past is None else past.valid.shape[1]
        for name, rest in _OF_KEYS.items():
            before = None if past is None else getattr(past, name)
            now = None if rows is None else getattr(rows, name, None)
            if name == "positions":
                now = self._places(state) if "calibration" in found else None
            if before is None and now is None:
                continue
            like = state.real.new_full((batch, 0), rest, dtype=torch.float)
            before = like.new_full((batch, held), rest) if before is None else before
            found[name] = torch.cat(
                [before, like.new_full((batch, new), rest) if now is None else now], dim=1
            )
        return found

    def _places(self, state: Pass) -> Tensor:
        """(B, T) positions of this pass's rows."""
        rows = state.rows
        positions = (
            positions_by_row(state.position_ids, len(state.real))
            if rows is None
            else rows.positions
        )
        if positions.shape[-1] > 1:
            raise UnsupportedModel(
                "attention is calibrated by the distance of two tokens, which this model's 3-D positions do not give; "
                "use restore with calibration=0, which corrects for the size of merged tokens alone"
            )
        return positions[..., 0].float()

    def _bias(self, past: CachedRows | None, state: Pass, dtype: torch.dtype) -> Tensor | None:
        """(B, 1 or Q, K) on the logits, of the cached rows and those of this pass as keys; None if there is none."""
        found = self._of_keys(past, state)
        if not found:
            return None
        size, calibration = found.get("size"), found.get("calibration")
        bias = (torch.zeros_like(calibration) if size is None else size.log())[:, None]
        if calibration is not None:
            frequency = getattr(self.parts.rotary, "inv_freq", None)
            if frequency is None:
                raise UnsupportedModel(
                    f"{type(self.parts.rotary).__name__} has no single inv_freq to calibrate attention by; use restore "
                    "with calibration=0"
                )
            places = found["positions"]
            distance = (self._places(state)[..., None] - places[:, None]).abs().long()  # (B, Q, K)
            away = torch.arange(int(distance.max()) + 1, device=distance.device)
            alike = (away[:, None] * frequency.to(away.device)).cos().mean(1)  # by distance
            calibration = calibration[:, None]
            more = (calibration - alike[distance]).clamp(min=1e-6).log()
            bias = bias + torch.where(calibration > 0, more, 0)
        return bias.to(dtype)

    def mask(self, mask, segment: int, number: int, state: Pass, dtype: torch.dtype):
        """The stock attention ``mask`` of layer ``number`` for its rows and cached rows; see look_up_mask. dtype: that
        of an additive one."""
        if (segment, id(mask)) not in state.masks:
            rows = state.rows
            past = self._held.get(state.cache, {}).get(segment) if state.cache is not None else None
            query = columns(state.real.shape[1], state.real) if rows is None else rows.index
            valid = torch.ones_like(query, dtype=torch.bool) if rows is None else rows.valid
            before = columns(state.past, state.real)
            if past is not None:
                before = past.original if state.whole else past.later
            before_valid = torch.ones_like(before, dtype=torch.bool) if past is None else past.valid
            key = torch.cat([before, query + state.past], dim=1)
            key_valid = torch.cat([before_valid, valid], dim=1)
            bias = self._bias(past, state, dtype)
            key, key_valid, first = _sliding_cache(
                state.cache, number, mask, key, key_valid, valid.shape[1], state
            )
            offset, flat = state.past - first, is_flat(self.parts.decoder)
            found = look_up_mask(mask, query, key - first, key_valid, offset, flat)
            if bias is not None:
                bias = bias[..., bias.shape[-1] - key.shape[1] :]
                found = add_to_mask(found, bias, query, key - first, key_valid, offset, flat)
            state.masks[segment, id(mask)] = found
        return state.masks[segment, id(mask)]

    def close(self, state: Pass) -> None:
        """Write down what ``state`` noted."""
        if state.cache is None or not state.cached:
            return
        self._held.setdefault(state.cache, {}).update(state.cached)
        if (keys := _last_keys(state.cache)) is not None:
            self._left[state.cache] = weakref.ref(keys), keys[:, 0, :, 0].clone()


def _last_keys(cache) -> Tensor | None:
    """(B, heads, n, D) keys of the last layer that has its own."""
    found = (getattr(layer, "keys", None) for layer in reversed(cache.layers))
    return next((keys for keys in found if keys is not None), None)


def _rows_of_before(keys: Tensor, same: weakref.ref, before: Tensor) -> Tensor | None:
    """(B',) which row of the cache each of its B' rows was when a pass left it, None if nothing moved.

    same: of the keys that the pass left; before (B, n): one channel of them, by which rows are known again: keys of the
    last layer depend on everything before them, and samples with equal ones are equal.
    """
    if same() is keys:
        return None
    now = keys[:, 0, :, 0]
    length = min(now.shape[1], before.shape[1])
    now, before = (values[:, :length].nan_to_num() for values in (now, before))
    alike = (now[:, None] == before[None]).all(-1)
    if not bool(alike.any(1).all()):
        raise UnsupportedModel(
            "the cache holds other keys than compress left there; continue it as it is, or begin anew"
        )
    if len(now) == len(before) and bool(alike.diagonal().all()):
        return None
    return alike.long().argmax(1)


def _sliding_cache(cache, number: int, mask, key: Tensor, key_valid: Tensor, new: int, state: Pass):
    """``key`` and ``key_valid`` without what a sliding-window cache has let go, and the stock mask's first column."""
    layer = cache.layers[number] if cache is not None and number < len(cache.layers) else None
    if not getattr(layer, "is_sliding", False):
        return key, key_valid, 0
    held = (layer.keys.shape[-2] if layer.get_seq_length() else 0) + new
    first = state.past + state.real.shape[1] - mask.shape[-1] if isinstance(mask, Tensor) else 0
    gone, gone_valid = key[:, :-held], key_valid[:, :-held]
    if bool((gone_valid & (gone >= first)).any()):
        raise UnsupportedModel(
            "rows of this batch that compress made unequally long crowd each other out of a sliding-window cache; "
            "pass past_key_values=DynamicCache(), which keeps every token, or one row at a time"
        )
    key, key_valid = key[:, -held:], key_valid[:, -held:]
    return key.clamp(min=first), key_valid & (key >= first), first
