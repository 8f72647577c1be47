"""Where the parts are that compression needs, in any Hugging Face vision-language model: the adapter layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llavolta.errors import UserError


class UnsupportedModel(UserError, TypeError):
    """A model, or a way of calling one, that cannot be compressed; the message says why."""


@dataclass(frozen=True)
class Parts:
    """The modules of a vision-language model.

    top: takes labels and returns the loss (None if the model has no head). base: joins pictures and text.
    decoder: the language model; its ``layers`` and ``rotary_emb``. visual_ids: the placeholder tokens.
    """

    top: nn.Module | None
    base: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    rotary: nn.Module
    visual_ids: tuple[int, ...]


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside DistributedDataParallel, DeepSpeed, torch.compile and PEFT wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model


def find_parts(model: nn.Module) -> Parts:
    """The parts of ``model``, wrapped or not. Raises UnsupportedModel if it has no visual tokens or no decoder."""
    model = unwrap(model)
    name = type(model).__name__
    config = getattr(model, "config", None)
    ids = [getattr(config, f"{kind}_token_{suffix}", None) for kind in ("image", "video") for suffix in ("id", "index")]
    visual_ids = tuple(dict.fromkeys(token for token in ids if isinstance(token, int)))
    if not visual_ids:
        raise UnsupportedModel(f"{name} has no visual tokens: its config names no image_token_id or video_token_id")
    decoder = model.get_decoder()
    layers, rotary = getattr(decoder, "layers", None), getattr(decoder, "rotary_emb", None)
    if not isinstance(layers, nn.ModuleList) or rotary is None:
        raise UnsupportedModel(f"{name}: its decoder {type(decoder).__name__} has no .layers or no .rotary_emb")
    base = model.base_model
    return Parts(model if base is not model else None, base, decoder, layers, rotary, visual_ids)


def has_pictures(inputs: dict) -> bool:
    """Whether the model's forward was given pictures, as pixels or encoded ahead (as ``generate`` does)."""
    return bool(inputs.get("mm_encoder_outputs")) or inputs.get("pixel_values") is not None


def image_rows(visual: Tensor, inputs: dict) -> tuple[Tensor, Tensor]:
    """Which tokens belong to which image.

    visual: (B, T) True at placeholder tokens. inputs: what the model's forward was given.
    Returns rows (I, L), indices into the flat (B * T) sequence, and mask (I, L), False at padding.
    """
    flat = visual.reshape(-1).nonzero().squeeze(1)
    encoded = (inputs.get("mm_encoder_outputs") or {}).get("image")
    pixels = inputs.get("pixel_values")
    if encoded is not None:
        lengths = torch.tensor([len(features) for features in encoded.pooler_output], device=flat.device)
    elif pixels is not None and len(flat) % pixels.shape[0] == 0:
        lengths = flat.new_full((pixels.shape[0],), len(flat) // pixels.shape[0])
    else:
        raise UnsupportedModel(
            f"cannot tell the {len(flat)} visual tokens of this batch apart by image: pass pixel_values with them"
        )
    if lengths.sum() != len(flat):
        raise UnsupportedModel(f"the batch holds {len(flat)} visual tokens, but its images fill {int(lengths.sum())}")
    mask = torch.arange(int(lengths.max()), device=flat.device) < lengths[:, None]
    rows = flat.new_zeros(mask.shape)
    rows[mask] = flat
    return rows, mask
