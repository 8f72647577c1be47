"""Attention masks of a part of the tokens, and key-value caches that hold a part of them."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from llavolta.errors import UnsupportedModel


def cache_bytes(cache) -> int:
    """Bytes of the keys and values in a transformers cache, over all layers."""
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(
        part.numel() * part.element_size()
        for layer in layers
        for part in (layer.keys, layer.values)
    )


def is_flat(decoder) -> bool:
    """Whether its attention backend takes masks as (B, S) only."""
    return "flash" in (decoder.config._attn_implementation or "")


def look_up_mask(mask, query: Tensor, key: Tensor, key_valid: Tensor, past: int, flat: bool):
    """The attention mask of a part of the tokens, looked up in the mask of them all.

    mask: as the attention backend takes it: (B or 1, 1, T, S) bool or additive, a flex BlockMask, (B, S) for flash
    attention, or None for plain causal attention. query (B, Q) and key (B, K): their rows and columns in it.
    key_valid (B, K). past: the column of the first row's own token. flat: whether the backend takes (B, S) only.
    """
    everything = bool(key_valid.all())
    if mask is None:
        # Padding stands at the end of a row, where causal attention never looks, unless the rows came from a cache.
        if key.shape[1] == query.shape[1] or everything:
            return None
        if flat:
            return key_valid.long()
        return (key_valid[:, None] & (key[:, None] <= query[..., None] + past))[:, None]
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1:
        grid = mask.expand(query.shape[0], *mask.shape[1:])
        batch = torch.arange(len(query), device=query.device)[:, None, None]
        picked = grid[:, 0][batch, query[:, :, None], key[:, None, :]][:, None]
        if everything:
            return picked
        hidden = ~key_valid[:, None, None, :]
        if mask.dtype == torch.bool:
            return picked & ~hidden
        return picked.masked_fill(hidden, torch.finfo(mask.dtype).min)
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.gather(1, key) * key_valid.to(mask.dtype)
    if hasattr(mask, "mask_mod"):
        return _look_up_block_mask(mask, query, key, key_valid)
    raise UnsupportedModel(
        f"compress cannot shorten an attention mask of type {type(mask).__name__} {tuple(getattr(mask, 'shape', ()))}"
    )


def add_to_mask(
    mask, bias: Tensor, query: Tensor, key: Tensor, key_valid: Tensor, past: int, flat: bool
) -> Tensor:
    """The additive mask (B, 1, Q, K) of what ``mask`` (see look_up_mask) lets through, with ``bias`` (B, 1 or Q, K) on
    the logits. Raises UnsupportedModel for a backend that takes none."""
    if flat or hasattr(mask, "mask_mod"):
        raise UnsupportedModel(
            f"{'flash' if flat else 'flex'} attention takes no bias for single keys, which tokens that stand for "
            'several need; load the model with attn_implementation="sdpa", or use a plan without it (tome, divprune)'
        )
    least = torch.finfo(bias.dtype).min
    if mask is None:
        seen = (key_valid[:, None] & (key[:, None] <= query[..., None] + past))[:, None]
        return torch.where(seen, bias[:, None], least)
    if mask.dtype == torch.bool:
        return torch.where(mask, bias[:, None], least)
    return torch.where(mask > torch.finfo(mask.dtype).min / 2, mask + bias[:, None], mask).to(
        bias.dtype
    )


def _look_up_block_mask(mask, query: Tensor, key: Tensor, key_valid: Tensor):
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch, head, row, column):
        return (
            mask.mask_mod(batch, head, query[batch, row], key[batch, column])
            & key_valid[batch, column]
        )

    size = {"B": query.shape[0], "H": None, "Q_LEN": query.shape[1], "KV_LEN": key.shape[1]}
    return create_block_mask(seen, **size, device=query.device, BLOCK_SIZE=mask.BLOCK_SIZE)


def sliding_window(config) -> int | None:
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    return getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None


def whole_cache(cache, seen: int) -> Cache:
    """A cache of the same kinds of layers as if it held every token; good for the sizes of masks only."""
    layers = []
    for layer in cache.layers:
        if layer.is_sliding:
            layers.append(DynamicSlidingWindowLayer(layer.sliding_window))
            layers[-1].cumulative_length = seen
        else:
            layers.append(DynamicLayer())
            layers[-1].keys, layers[-1].is_initialized = (
                torch.empty(1, 1, seen, 1, device="meta"),
                True,
            )
    return Cache(layers=layers)
