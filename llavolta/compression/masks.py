"""Attention masks for a part of the tokens, and properties of attention and caches.

The mask of the tokens that remain is looked up in the stock mask of all tokens. So any pattern is
preserved: causal, sliding window, padding, packed samples.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from llavolta.errors import UnsupportedModel


def cache_bytes(cache) -> int:
    """Measure the size of a key-value cache.

    Args:
        cache: A transformers cache.

    Returns:
        Bytes of the keys and values of all layers.
    """
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    return sum(
        part.numel() * part.element_size()
        for layer in layers
        for part in (layer.keys, layer.values)
    )


def is_flat(decoder) -> bool:
    """Whether the decoder's attention backend takes masks (B, S) only, as flash attention does."""
    return "flash" in (decoder.config._attn_implementation or "")


def look_up_mask(mask, query: Tensor, key: Tensor, key_valid: Tensor, past: int, flat: bool):
    """Look up the attention mask of a part of the tokens in the mask of all tokens.

    Args:
        mask: The stock mask, as the attention backend takes it: (B or 1, 1, T, S) bool or additive,
            a flex BlockMask, (B, S) for flash attention, or None for plain causal attention.
        query: (B, Q) row of each query token in ``mask``.
        key: (B, K) column of each key token in ``mask``.
        key_valid: (B, K) bool, False at padding.
        past: The column of the token that stands in row 0 of ``mask``.
        flat: Whether the backend takes masks (B, S) only.

    Returns:
        The mask in the same form: (B, 1, Q, K), a BlockMask, (B, K), or None. None becomes a mask
        (B, 1, Q, K) or (B, K) if there are cached keys and some keys are padding.

    Raises:
        UnsupportedModel: The mask has another form.
    """
    everything = bool(key_valid.all())
    if mask is None:
        # Padding stands at the end of the rows of a pass, where causal attention never looks. With
        # a cache it may stand before the rows of this pass.
        if key.shape[1] == query.shape[1] or everything:
            return None
        if flat:
            return key_valid.long()
        return (key_valid[:, None] & (key[:, None] <= query[..., None] + past))[:, None]
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] == 1:
        # (B or 1, 1, T, S) -> (B, 1, T, S)
        grid = mask.expand(query.shape[0], *mask.shape[1:])
        batch = torch.arange(len(query), device=query.device)[:, None, None]
        # (B, T, S) at (B, Q, 1) and (B, 1, K) -> (B, Q, K) -> (B, 1, Q, K)
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
        f"compress cannot shorten an attention mask of type {type(mask).__name__} "
        f"{tuple(getattr(mask, 'shape', ()))}"
    )


def add_to_mask(
    mask, bias: Tensor, query: Tensor, key: Tensor, key_valid: Tensor, past: int, flat: bool
) -> Tensor:
    """Add a bias on attention logits to a mask.

    Args:
        mask: (B, 1, Q, K) bool or additive, or None, from ``look_up_mask``.
        bias: (B, 1 or Q, K) bias on the logits.
        query: See ``look_up_mask``; used if ``mask`` is None.
        key: See ``look_up_mask``; used if ``mask`` is None.
        key_valid: See ``look_up_mask``; used if ``mask`` is None.
        past: See ``look_up_mask``; used if ``mask`` is None.
        flat: Whether the backend takes masks (B, S) only.

    Returns:
        (B, 1, Q, K) additive mask in the type of ``bias``.

    Raises:
        UnsupportedModel: The backend takes no bias (flash and flex attention).
    """
    if flat or hasattr(mask, "mask_mod"):
        raise UnsupportedModel(
            f"{'flash' if flat else 'flex'} attention takes no bias for single keys, which tokens "
            'that stand for several need; load the model with attn_implementation="sdpa", or use '
            "a plan without it (tome, divprune)"
        )
    least = torch.finfo(bias.dtype).min
    if mask is None:
        seen = (key_valid[:, None] & (key[:, None] <= query[..., None] + past))[:, None]
        return torch.where(seen, bias[:, None], least)
    if mask.dtype == torch.bool:
        return torch.where(mask, bias[:, None], least)
    # A key is hidden by the least number of the mask's type, by one near it, or by -inf.
    return torch.where(mask > torch.finfo(mask.dtype).min / 2, mask + bias[:, None], mask).to(
        bias.dtype
    )


def _look_up_block_mask(mask, query: Tensor, key: Tensor, key_valid: Tensor):
    """See look_up_mask; for a flex BlockMask."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch, head, row, column):
        return (
            mask.mask_mod(batch, head, query[batch, row], key[batch, column])
            & key_valid[batch, column]
        )

    size = {"B": query.shape[0], "H": None, "Q_LEN": query.shape[1], "KV_LEN": key.shape[1]}
    return create_block_mask(seen, **size, device=query.device, BLOCK_SIZE=mask.BLOCK_SIZE)


def sliding_window(config) -> int | None:
    """Tell the size of a decoder's sliding window.

    Args:
        config: The decoder's config.

    Returns:
        The window in tokens; None if no layer has one.
    """
    # Without layer_types, all layers use ``sliding_window`` if it is set.
    kinds = getattr(config, "layer_types", None) or ("sliding_attention",)
    return getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None


def whole_cache(cache, seen: int) -> Cache:
    """Make a cache without data as if it contained every token, from which masks get their sizes.

    Args:
        cache: The compressed cache, whose kinds of layers (full or sliding) are copied.
        seen: The number of tokens.

    Returns:
        The cache. Its keys are on the meta device.
    """
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
