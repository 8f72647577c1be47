"""Count the matrix products of a compressor: run it once on tokens of the right shapes.

All products give zeros (see ``flops.NoProducts``), and all weights are zeros without memory. So
costs that depend on the number of tokens are exact. Costs that depend on the image are not: all
words count as SparseVLM's raters, adaptive PruMerge keeps one token, and tower layers with windows
(VScan on Qwen2.5-VL) see whole images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from llavolta.compression.compressors import Compressor, VisualTokens
from llavolta.compression.families import (
    Parts,
    tower_attentions,
    tower_heads,
    without_class_token,
)
from llavolta.compression.plan import VISION, Layer
from llavolta.compression.probe import LayerInput, LayerProbe, TowerLayer, TowerProbe


@dataclass(frozen=True)
class Seen:
    """Shapes that a run of the encoder on one image has shown.

    Attributes:
        tower: (I, P), the rows of the vision tower's layers and the tokens of each. Empty if the
            tower has no such attention.
        projector: (I, L, D), the input of the projector. Empty if the model has none.
    """

    tower: tuple[int, ...] = ()
    projector: tuple[int, ...] = ()


class _Tower(TowerProbe):
    """A probe whose answers have the shape of the compressor's tokens, whatever the patches are."""

    shape: tuple[int, int]

    def _per_token(self, values: Tensor, mask: Tensor | None) -> Tensor:
        return values.new_zeros(*self.shape, values.shape[-1])


def count_products(
    compressor: Compressor,
    layer: Layer,
    parts: Parts,
    pictures: list[int],
    images: int,
    text: int,
    seen: Seen,
    trains: bool,
    mode: type,
) -> tuple[int, int]:
    """Count the FLOPs of ``compressor`` for one row of a batch.

    Args:
        compressor: The compressor.
        layer: Its layer in the plan.
        parts: The parts of a model whose weights are on the meta device.
        pictures: Tokens of each part of one image that reach the compressor.
        images: Number of images in the row.
        text: Number of text tokens after the images.
        seen: Shapes of one image in the encoder.
        trains: Whether gradients pass through the tokens.
        mode: The dispatch mode under which products give zeros.

    Returns:
        FLOPs of the forward and of the backward pass.
    """
    pictures = pictures * images  # one row of tokens for each part of each image
    mask = torch.arange(max(pictures)) < torch.tensor(pictures)[:, None]
    vision = layer == VISION
    width = seen.projector[-1] if vision else parts.decoder.config.hidden_size
    # Grids are squares where the number of tokens allows it, else one column.
    side = [round(n**0.5) if round(n**0.5) ** 2 == n else n for n in pictures]
    grid = torch.tensor([[high, n // high] for high, n in zip(side, pictures, strict=True)])

    def tokens(probe, needs_grad: bool = False) -> VisualTokens:
        """Return zeros as the visual tokens of the row."""
        hidden = torch.zeros(*mask.shape, width, requires_grad=needs_grad)
        places = torch.arange(mask.shape[1]).expand(mask.shape)[..., None]
        return VisualTokens(hidden, mask, places, grid, trains, probe)

    tower = None
    if "tower" in compressor.needs:
        tower = _tower(compressor, parts, images, seen)
        tower.shape = tuple(mask.shape)
    probe = tower
    if not vision:
        probe = _probe(parts, layer, pictures, mask, text)
        probe.tower = tower
        if "start" in compressor.needs:  # the state at layer 0, taken to have the same tokens
            probe.start = tokens(_probe(parts, layer, pictures, mask, text))
    # The counter is the inner mode: it sees each product before ``mode`` replaces it.
    with mode(), FlopCounterMode(display=False) as counter:
        out = compressor(tokens(probe, trains))
        forward = counter.get_total_flops()
        if out.hidden.requires_grad:
            out.hidden.sum().backward()
    return forward, counter.get_total_flops() - forward


def _probe(parts: Parts, layer: int, pictures: list[int], mask: Tensor, text: int) -> LayerProbe:
    """Return a probe of one row: the images, and ``text`` tokens after them."""
    width, length = parts.decoder.config.hidden_size, sum(pictures) + text
    rows = torch.zeros(mask.shape, dtype=torch.long)
    rows[mask] = torch.arange(sum(pictures))  # the images are the first tokens of the row
    head = getattr(getattr(parts.layers[layer], "self_attn", None), "head_dim", 1)
    rotary = torch.zeros(1, length, head), torch.zeros(1, length, head)
    here, before = (
        LayerInput(_weightless(parts.layers[max(number, 0)]), torch.zeros(1, length, width), rotary)
        for number in (layer, layer - 1)  # layer 0 has none before it and stands in for it
    )
    places, valid = torch.arange(length)[None], torch.ones(1, length, dtype=torch.bool)
    norm = _weightless(parts.decoder.norm) if hasattr(parts.decoder, "norm") else None
    return LayerProbe(
        here, before, valid, rows, mask, torch.zeros_like(places), norm=norm, index=places
    )


def _tower(compressor: Compressor, parts: Parts, images: int, seen: Seen) -> _Tower:
    """Return a probe of the tower with queries and keys of the right shapes."""
    layers, (pictures, patches) = {}, seen.tower
    for name, (attention, *_) in tower_attentions(parts, compressor.tower_layers).items():
        packed = getattr(attention, "qkv", None)
        width = attention.q_proj.out_features if packed is None else packed.out_features // 3
        given = torch.zeros(images * pictures, patches, width)
        layers[name] = TowerLayer(given, given, tower_heads(attention))
    return _Tower(layers, 1, not without_class_token(parts))


def _weightless(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` on the CPU. All its weights are views of a single zero."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                zeros = torch.zeros(1).expand(old.shape)
                part._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    return module
