"""Track what the rows of compressed key-value caches stand for, from one pass to the next.

After compression at layer K, the layers from K on cache fewer rows than the tokens that the cache
has processed. transformers derives the sizes of masks and the positions of new tokens from the
length of the cache, so both are adapted here. A segment is the layers from one layer of the plan to
the next, and is named by the first; all its layers cache the same tokens.
"""

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

# Fields of CachedRows that the bias on attention is computed from, and their values for text.
_OF_KEYS = {"size": 1.0, "calibration": 0.0, "positions": 0.0}


class CacheBook:
    """What the rows of each cache stand for, by segment.

    In each pass ``begin`` adapts the inputs, ``note`` describes the cache at each layer of the
    plan, ``mask`` gives the attention mask of each layer, and ``close`` saves the descriptions
    after the decoder. The descriptions of a pass that fails before ``close`` are discarded.
    """

    def __init__(self, parts: Parts):
        self.parts = parts
        # By cache: {segment: CachedRows}.
        self._held: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        # By cache: its keys after the last pass, by which _rows_of_before recognises batch rows.
        self._left: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def begin(self, state: Pass, inputs: dict) -> dict:
        """Adapt the inputs of a pass that has a cache.

        The stock code takes the number of past tokens from the cache of layer 0. If layer 0 is
        compressed, the mask and the positions must fit its shorter cache. If the decoder has
        several kinds of layers, such as sliding and full attention, the stock code takes the size
        of each kind's mask from the first layer of that kind, compressed or not. Then the masks are
        made here, for a cache that contains every token.

        Args:
            state: The pass; its ``past``, ``seen`` and ``whole`` are set.
            inputs: Arguments of the base model.

        Returns:
            The arguments, with other ``attention_mask`` and ``position_ids`` where needed.

        Raises:
            UnsupportedModel: The cache has a fixed size, or other keys than the last pass left. The
                mask or the positions imply another number of past tokens. Under a plan at layer 0,
                the tokens exceed the sliding window, or 3-D positions are missing.
        """
        if getattr(state.cache, "is_compileable", False):
            raise UnsupportedModel(
                f"compress cannot fill a {type(state.cache).__name__} of fixed size; use a "
                "DynamicCache (the default)"
            )
        state.past = state.cache.get_seq_length()
        if state.past == 0:
            self._held.pop(state.cache, None)  # new, or emptied by reset()
        held = state.held = self._up_to_date(state)
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
        claimed = seen  # the number of past tokens that the caller's arguments imply
        if isinstance(mask, Tensor) and mask.dim() == 2:
            claimed = mask.shape[1] - new
        elif first is not None and positions is not None and positions.dim() == 2:
            claimed = int(positions[0, 0])
        if claimed != seen:
            raise UnsupportedModel(
                f"the cache was shown {seen} tokens, but the attention_mask or position_ids of "
                f"this pass speak of {claimed}. Continue a cache under the compress() that filled "
                "it; and with a plan at layer 0 or 'vision', pass only the new input_ids, with the "
                "attention_mask of the whole conversation"
            )
        if first is None:
            return inputs
        # One mask column per row that layer 0 has cached: (B, seen + T) -> (B, n + T)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            past = mask.gather(1, first.original) * first.valid.to(mask.dtype)
            mask = torch.cat([past, mask[:, -new:]], dim=1)
        elif mask is None and not first.valid.all():
            mask = torch.cat([first.valid, state.real], dim=1).long()
        window = sliding_window(self.parts.decoder.config)
        if window is not None and first.seen + new > window:
            raise UnsupportedModel(
                "a plan at layer 0 or 'vision' cannot continue a cache past the model's sliding "
                f"window of {window} tokens; use layer 1 or use_cache=False"
            )
        return self._with_positions({**inputs, "attention_mask": mask}, first.seen, state)

    def _up_to_date(self, state: Pass) -> dict[int, CachedRows]:
        """What the rows of the cache stand for now, by segment.

        Since the last pass, ``generate`` may have reordered, removed or repeated the batch rows of
        the cache (beam search), or cropped its end (assisted generation). A crop is followed if it
        removed only the last tokens, none of them merged or dropped; else ``note`` raises.
        """
        held = dict(self._held.get(state.cache, {}))  # a pass that fails must leave the saved one
        if not held:
            return held
        # A cache with saved descriptions is not empty, so it has keys.
        of_before = _rows_of_before(_last_keys(state.cache), *self._left[state.cache])
        if of_before is not None:  # index all tensors by batch row: (B, ...) -> (B', ...)
            for segment, rows in held.items():
                names = [f.name for f in fields(rows) if isinstance(getattr(rows, f.name), Tensor)]
                held[segment] = replace(
                    rows, **{name: getattr(rows, name)[of_before] for name in names}
                )
        # The numbers of cropped rows. All segments must agree, and so must layer 0 if it has all.
        gone = {
            rows.valid.shape[1] - state.cache.get_seq_length(segment)
            for segment, rows in held.items()
        }
        seen = max(rows.seen for rows in held.values())
        if 0 not in held and not state.whole:
            gone.add(seen - state.past)
        count = gone.pop()
        if gone or count <= 0:
            return held  # nothing was cropped, or ``note`` raises an error about the length
        # The cropped rows must stand for the last ``count`` tokens in each segment.
        last = torch.arange(seen - count, seen, device=state.real.device)
        if not all(
            (rows.original[:, -count:] == last).all() & rows.valid[:, -count:].all()
            for rows in held.values()
        ):
            return held
        for segment, rows in held.items():
            names = ("later", "original", "valid", *_OF_KEYS)
            cut = {  # (B, n) -> (B, n - count)
                name: getattr(rows, name)[:, :-count]
                for name in names
                if getattr(rows, name) is not None
            }
            held[segment] = replace(rows, seen=rows.seen - count, **cut)
        return held

    def _with_whole_masks(self, state: Pass, inputs: dict, seen: int) -> dict:
        """``inputs`` with stock masks for a cache that contains all ``seen`` tokens; see begin."""
        state.past, state.seen, state.whole = seen, seen, True
        # Only shape, dtype and device of the embeddings are read.
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
        """``inputs`` with the positions of the new tokens, moved up over closed gaps."""
        new, position_ids = state.real.shape[1], inputs.get("position_ids")
        if position_ids is None:
            if has_3d_positions(self.parts):
                raise UnsupportedModel(
                    "with a plan at layer 0, pass the position_ids of the new tokens with the cache"
                )
            position_ids = torch.arange(seen, seen + new, device=state.real.device)[None]
        first = state.held.get(0)
        return {**inputs, "position_ids": position_ids - (0 if first is None else first.moved)}

    def note(self, segment: int, state: Pass) -> None:
        """Describe what the cache rows of a segment stand for after this pass.

        Args:
            segment: A layer of the plan, whose compressors have run.
            state: The pass; the description goes to its ``cached``.

        Raises:
            UnsupportedModel: The cache of this layer has another length than the last pass left.
        """
        length = state.real.shape[1]
        past = state.held.get(segment)
        held, expected = (
            state.cache.get_seq_length(segment),
            state.past if past is None else past.valid.shape[1],
        )
        if held != expected:
            raise UnsupportedModel(
                f"the cache holds {held} tokens at layer {segment}, not the {expected} that "
                "compress left there; one that was cropped, copied, or filled under another "
                "compress() cannot be continued"
            )
        if past is None and state.rows is None:
            return
        if past is None:  # no earlier pass was compressed, so the cache contains every token
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
        """Values per key, (B, n + T) each for n cached rows and T rows of this pass.

        They are named as in _OF_KEYS. One that no row has is missing; rows without it have the
        value of text.
        """
        rows, found, (batch, new) = state.rows, {}, state.real.shape
        new = new if rows is None else rows.index.shape[1]
        held = state.past if past is None else past.valid.shape[1]
        for name, rest in _OF_KEYS.items():
            before = None if past is None else getattr(past, name)
            now = None if rows is None else getattr(rows, name, None)
            if name == "positions":  # needed for the calibration alone
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
                "attention is calibrated by the distance of two tokens, which this model's 3-D "
                "positions do not give; use restore with calibration=0, which corrects for the "
                "size of merged tokens alone"
            )
        return positions[..., 0].float()

    def _bias(self, past: CachedRows | None, state: Pass, dtype: torch.dtype) -> Tensor | None:
        """The bias (B, 1 or Q, K) on attention logits, or None if no key has one.

        Q are the rows of this pass, and K the cached rows and those. The bias of a key is ``log s``
        for its size s (ToMe, arXiv 2210.09461, eq. 1), plus ``log(c - D(distance))`` where its
        calibration c is above 0 (RESTORE, ICML 2026).
        """
        found = self._of_keys(past, state)
        if not found:
            return None
        size, calibration = found.get("size"), found.get("calibration")
        bias = (torch.zeros_like(calibration) if size is None else size.log())[:, None]
        if calibration is not None:
            frequency = getattr(self.parts.rotary, "inv_freq", None)
            if frequency is None:
                raise UnsupportedModel(
                    f"{type(self.parts.rotary).__name__} has no single inv_freq to calibrate "
                    "attention by; use restore with calibration=0"
                )
            places = found["positions"]
            distance = (self._places(state)[..., None] - places[:, None]).abs().long()  # (B, Q, K)
            # D of every distance that occurs: the mean cosine over the frequencies of the rotation.
            away = torch.arange(int(distance.max()) + 1, device=distance.device)
            alike = (away[:, None] * frequency.to(away.device)).cos().mean(1)  # (max + 1,)
            calibration = calibration[:, None]  # (B, K) -> (B, 1, K)
            more = (calibration - alike[distance]).clamp(min=1e-6).log()
            bias = bias + torch.where(calibration > 0, more, 0)
        return bias.to(dtype)

    def mask(self, mask, segment: int, number: int, state: Pass, dtype: torch.dtype):
        """The attention mask of a layer, for its rows and its cached rows.

        Args:
            mask: The stock mask of the layer, for all tokens; see ``masks.look_up_mask``.
            segment: The segment of the layer.
            number: The layer.
            state: The pass. Its ``masks`` save the result for the other layers of the segment.
            dtype: The type of an additive mask, for keys with a bias.

        Returns:
            The mask of Q rows of this pass on K keys, the cached rows and then those of this pass,
            in the form of ``mask``: (B, 1, Q, K), (B, K) for flash attention, a BlockMask, or None
            for plain causal attention. If keys have a bias, it is additive (B, 1, Q, K).

        Raises:
            UnsupportedModel: The mask's form is unknown, or takes no bias; the calibration needs
                positions or frequencies that the model does not have; or a sliding-window cache has
                lost rows that the mask still lets through.
        """
        if (segment, id(mask)) not in state.masks:
            rows = state.rows
            past = state.held.get(segment)
            query = columns(state.real.shape[1], state.real) if rows is None else rows.index
            valid = torch.ones_like(query, dtype=torch.bool) if rows is None else rows.valid
            # The stock mask's column of each cached row. A mask for a whole cache has a column per
            # token (``original``), any other has one per row that layer 0 has cached (``later``).
            before = columns(state.past, state.real)
            if past is not None:
                before = past.original if state.whole else past.later
            before_valid = torch.ones_like(before, dtype=torch.bool) if past is None else past.valid
            key = torch.cat([before, query + state.past], dim=1)  # (B, n), (B, Q) -> (B, K)
            key_valid = torch.cat([before_valid, valid], dim=1)
            bias = self._bias(past, state, dtype)
            key, key_valid, first = _sliding_cache(
                state.cache, number, mask, key, key_valid, valid.shape[1], state
            )
            offset, flat = state.past - first, is_flat(self.parts.decoder)
            found = look_up_mask(mask, query, key - first, key_valid, offset, flat)
            if bias is not None:
                # A sliding-window cache has dropped its first keys: (B, 1 or Q, n + Q) -> (.., K)
                bias = bias[..., bias.shape[-1] - key.shape[1] :]
                found = add_to_mask(found, bias, query, key - first, key_valid, offset, flat)
            state.masks[segment, id(mask)] = found
        return state.masks[segment, id(mask)]

    def close(self, state: Pass) -> None:
        """Save what a finished pass has noted.

        Args:
            state: The pass, after the decoder.
        """
        if state.cache is None or not state.cached:
            return
        self._held[state.cache] = state.held | state.cached
        if (keys := _last_keys(state.cache)) is not None:
            # A clone, because a view would keep all keys in memory: (B, heads, n, D) -> (B, n)
            self._left[state.cache] = weakref.ref(keys), keys[:, 0, :, 0].clone()


def _last_keys(cache) -> Tensor | None:
    """(B, heads, n, D) keys of the last layer that has a cache of its own; None if none has."""
    found = (getattr(layer, "keys", None) for layer in reversed(cache.layers))
    return next((keys for keys in found if keys is not None), None)


def _rows_of_before(keys: Tensor, same: weakref.ref, before: Tensor) -> Tensor | None:
    """Find where the batch rows of a cache were after the last pass.

    Batch rows are recognised by one channel of the last layer's keys, which depends on all tokens
    up to each row; this takes B' * B * n comparisons. Batch rows that agree in this channel at all
    their tokens are taken to be equal, as the beams of one prompt are.

    Args:
        keys: (B', heads, n', D) keys of the last layer now.
        same: The keys tensor that the last pass left. If it is ``keys``, nothing was changed.
        before: (B, n) the first channel of the first head then.

    Returns:
        (B',) index into the B batch rows of then; None if they are in place.

    Raises:
        UnsupportedModel: A batch row is none of those that the last pass left.
    """
    if same() is keys:
        return None
    now = keys[:, 0, :, 0]  # (B', heads, n', D) -> (B', n')
    length = min(now.shape[1], before.shape[1])
    # NaN does not equal itself, so it is replaced.
    now, before = (values[:, :length].nan_to_num() for values in (now, before))
    alike = (now[:, None] == before[None]).all(-1)  # (B', 1, n), (1, B, n) -> (B', B)
    if not bool(alike.any(1).all()):
        raise UnsupportedModel(
            "the cache holds other keys than compress left there; continue it as it is, or begin "
            "anew"
        )
    if len(now) == len(before) and bool(alike.diagonal().all()):
        return None
    return alike.long().argmax(1)


def _sliding_cache(cache, number: int, mask, key: Tensor, key_valid: Tensor, new: int, state: Pass):
    """Cut the keys to what a sliding-window cache of a layer still contains.

    Args:
        cache: The cache, or None.
        number: The layer.
        mask: The stock mask of the layer.
        key: (B, K) columns of all cached rows and the new ones.
        key_valid: (B, K) bool, False at padding.
        new: Number of rows of this pass.
        state: The pass.

    Returns:
        ``key`` and ``key_valid`` (B, K'), and the column of the stock mask's first entry.
    """
    layer = cache.layers[number] if cache is not None and number < len(cache.layers) else None
    if not getattr(layer, "is_sliding", False):
        return key, key_valid, 0
    # The last rows stay in the cache, whether they are real or padding.
    held = (layer.keys.shape[-2] if layer.get_seq_length() else 0) + new
    # The stock mask ends at the last token of this pass.
    first = state.past + state.real.shape[1] - mask.shape[-1] if isinstance(mask, Tensor) else 0
    gone, gone_valid = key[:, :-held], key_valid[:, :-held]
    if bool((gone_valid & (gone >= first)).any()):
        raise UnsupportedModel(
            "rows of this batch that compress made unequally long crowd each other out of a "
            "sliding-window cache; pass past_key_values=DynamicCache(), which keeps every token, "
            "or one row at a time"
        )
    key, key_valid = key[:, -held:], key_valid[:, -held:]  # (B, K) -> (B, K')
    return key.clamp(min=first), key_valid & (key >= first), first
