"""The plan's "vision" entry: a compressor before the projector, whose gaps layer 0 closes."""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from llavolta.compression.compressors import CompressedTokens, Compressor, VisualTokens, keep_tokens
from llavolta.compression.compressors.base import check_output
from llavolta.compression.families import (
    Parts,
    tower_attentions,
    tower_heads,
    towers,
    without_class_token,
)
from llavolta.compression.plan import VISION
from llavolta.compression.probe import TowerLayer, TowerProbe
from llavolta.errors import UnsupportedModel

BLENDED = "this model blends neighbouring tokens behind the projector, so 'vision' cannot drop any before it; use layer 0"
DROPPED = torch.nan  # marks the features of tokens that a compressor before the projector removed


@dataclass(frozen=True)
class DropMarked(Compressor):
    """Drops the tokens that the compressor before the projector removed; ``close``: and closes the gaps."""

    close: bool

    @property
    def contiguous(self) -> bool:
        return self.close

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        left = keep_tokens(tokens, ~tokens.hidden[..., 0].isnan())
        if not left.mask.any(1).all():
            raise UnsupportedModel(BLENDED)
        return left

    def num_tokens(self, num_tokens: int) -> int:
        return num_tokens


class _Noted(threading.local):
    """What the last tower gave in this thread, until it is taken."""

    def __init__(self):
        self.layers: dict[tuple, list] = {}  # call by call of the tower: images, then clips
        self.sizes: list[Tensor] = []  # (I, 3) where the tower is told them
        self.features: list | None = None  # what became of it, once it was asked about

    def renew(self) -> None:
        """Forget what was asked about: the tower works again."""
        if self.features is not None:
            self.__init__()


class TowerWatch:
    """Notes queries and keys in the tower layers that a compressor lists, and makes a TowerProbe of them."""

    def __init__(self, compressor: Compressor, parts: Parts):
        self.compressor, self.towers, self.base = (
            compressor,
            list(towers(parts).values()),
            parts.base,
        )
        self.attentions = tower_attentions(parts, compressor.tower_layers)
        lacking = without_class_token(parts)
        self.class_token = not lacking
        if "class_token" in compressor.needs and lacking:
            raise UnsupportedModel(
                f"{', '.join(lacking)} has no class token whose attention could rank patches; use a compressor that "
                "needs none, such as cls, visionzip or kmeans"
            )
        self._noted = _Noted()

    def hooks(self, add: Callable) -> None:
        for layer, attentions in self.attentions.items():
            for attention in attentions:
                if hasattr(attention, "qkv"):
                    add(
                        attention.register_forward_pre_hook(
                            partial(self._note, (layer, "call")), with_kwargs=True
                        )
                    )
                    add(attention.qkv.register_forward_hook(partial(self._note, (layer, "qkv"))))
                else:
                    for name in ("query", "key"):
                        note = partial(self._note, (layer, name))
                        add(getattr(attention, f"{name[0]}_proj").register_forward_hook(note))
        for tower in self.towers:
            if hasattr(tower, "spatial_merge_size"):
                add(tower.register_forward_pre_hook(self._note_sizes, with_kwargs=True))

    def _note(self, where: tuple, module, *given) -> None:
        self._noted.renew()
        noted = given[-1].detach() if isinstance(given[-1], Tensor) else given[-1]
        self._noted.layers.setdefault(where, []).append(noted)

    def _note_sizes(self, tower, args, kwargs) -> None:
        self._noted.renew()
        self._noted.sizes.append(kwargs.get("grid_thw", args[1] if len(args) > 1 else None))

    def probe(
        self,
        features: list,
        length: int = 0,
        images: int | None = None,
        spread: Tensor | None = None,
        kinds: list[Tensor] | None = None,
        rows: Tensor | None = None,
        image_sizes: Tensor | None = None,
        times: int = 1,
    ) -> TowerProbe:
        """Of ``images`` pictures of ``length`` tokens at the projector; or at layer 0 of all whose tokens are where
        ``spread`` (I, L) is True: rows (I, L) of the B * T of the batch, and where those of each modality, in the
        tower's order, ``kinds`` (B, T) are. features: what the model made of the pictures, by which they are known
        again where ``generate`` hands them over anew. image_sizes: as the model takes them. times:
        how often each row of a prompt stands in the batch, as for beams. Raises UnsupportedModel if
        it is unknown which patches became which tokens."""
        if self._noted.features is None:
            self._noted.features = features
        known = len(features) == len(self._noted.features)
        known = known and all(a is b for a, b in zip(features, self._noted.features, strict=True))
        # The tower is called once for each modality; what is before that, an interrupted pass has left.
        calls = len(features)
        noted = (
            {where: held[-calls:] for where, held in self._noted.layers.items()} if known else {}
        )
        sizes = self._noted.sizes[-calls:]
        asked = self.attentions.items()
        if all((layer, "call") in noted for layer, _ in asked):
            layers = {
                layer: _packed(noted[layer, "call"], noted[layer, "qkv"], of[0])
                for layer, of in asked
            }
            unit, order = _merging(self.towers[0], torch.cat(sizes))
            probe = TowerProbe(layers, length, False, unit, order, spread)
        elif all((layer, "key") in noted for layer, _ in asked):
            calls = [call.shape[1:] for layer, _ in asked for call in noted[layer, "key"]]
            if len(set(calls)) > 1:
                raise UnsupportedModel(
                    f"images and clips of this batch have unlike numbers of patches, so {self.compressor} cannot rank "
                    "them together; give one kind a batch, or use a compressor that needs no attention of the tower"
                )
            layers = {
                layer: TowerLayer(
                    torch.cat(noted[layer, "query"]),
                    torch.cat(noted[layer, "key"]),
                    tower_heads(of[0]),
                )
                for layer, of in asked
            }
            key = next(iter(layers.values())).key
            tiled = spread is not None and getattr(self.base, "image_newline", None) is not None
            if tiled:
                length = key.shape[1] - self.class_token
            elif spread is not None:
                length = _length(features, len(key), times)
            probe = TowerProbe(layers, length, self.class_token, spread=spread)
            if tiled and image_sizes is not None and len(features) == 1:
                probe.pack = _packing(self.base, image_sizes, len(key))
            if tiled:
                probe.made = (
                    0 if probe.pack is None else len(probe.pack(key.new_zeros(len(key), length, 1)))
                )
        else:
            raise UnsupportedModel(
                f"{self.compressor} reads the vision tower, which did not work in this pass; give pixels, not features"
            )
        given = next(iter(layers.values())).key.shape[:2]
        if kinds is not None:
            source = _sources(kinds, times)
            places = (
                torch.cat([where.reshape(-1) for where in kinds])
                .view(len(kinds), -1)
                .any(0)
                .nonzero()[:, 0]
            )
            at = torch.searchsorted(
                places, rows[spread].cpu()
            )  # a newline behind a picture is no part of it
            probe.source = (source[at] if len(source) == len(places) else source).to(spread.device)
        if (images is not None and given[0] != images) or not probe.fits:
            reach, other = f"{images} x {length} reach the projector", "layer 0"
            if spread is not None:
                beams = f", each row {times} times (num_beams, num_return_sequences)" * (times > 1)
                reach, other = f"{int(spread.sum())} reach layer 0{beams}", repr(VISION)
            raise UnsupportedModel(
                f"the vision tower made {given[0]} x {given[1]} tokens, but {reach}: it is unknown which became which, "
                f"so {self.compressor} cannot rank them; use it at {other}, or a compressor that needs no attention of "
                "the tower, such as downsample or kmeans"
            )
        return probe


def _packed(calls: list[dict], outputs: list[Tensor], attention) -> TowerLayer:
    """Of a tower that takes the patches of all pictures in one row (Qwen's)."""
    query, key, _ = (
        torch.cat(outputs).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    )  # (S, heads, d)
    plain = key
    if calls[0].get("position_embeddings") is not None:
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        rotation = zip(*(call["position_embeddings"] for call in calls), strict=True)
        query, key = rotate(query, key, *map(torch.cat, rotation))
    count = torch.cat([call["cu_seqlens"].diff() for call in calls])
    mask = torch.arange(int(count.max()), device=key.device) < count.to(key.device)[:, None]

    def padded(values: Tensor) -> Tensor:
        out = values.new_zeros(*mask.shape, values[0].numel())
        out[mask] = values.flatten(1)
        return out

    return TowerLayer(padded(query), padded(key), attention.num_heads, mask, padded(plain))


def _merging(tower, sizes: Tensor) -> tuple[int, Tensor | None]:
    """How many patches become one token, and the order of these where the tower works in windows."""
    unit = tower.spatial_merge_size**2
    if not hasattr(tower, "window_size"):
        return unit, None
    options = dict(window_size=tower.window_size, patch_size=tower.patch_size)
    index, _ = get_vision_window_index(
        sizes, spatial_merge_size=tower.spatial_merge_size, **options
    )
    return unit, index.argsort()


def _tiles_of(base, image_sizes: Tensor, tiles: int) -> list[int] | None:
    """How many of the tower's ``tiles`` each image became; None if that is unknown."""
    patches = vars(sys.modules[type(base).__module__]).get("image_size_to_num_patches")
    if patches is None or not hasattr(base, "pack_image_features"):
        return None
    grid = dict(
        grid_pinpoints=base.config.image_grid_pinpoints,
        patch_size=base.config.vision_config.image_size,
    )
    for counts in (
        [patches(image_size=each, **grid) for each in image_sizes],
        [1] * len(image_sizes),  # of several images in a sample some models cut none
    ):
        if sum(counts) == tiles:
            return counts
    return None


def _packing(base, image_sizes: Tensor, tiles: int) -> Callable[[Tensor], Tensor] | None:
    """What makes values (tiles, L, D) of tiled images one row of tokens (n, D), by the model's own code; newlines, that
    no patch became, have 0. None if it is unknown which tiles are of one image."""
    counts = _tiles_of(base, image_sizes, tiles)
    if counts is None:
        return None
    options = inspect.signature(base.pack_image_features).parameters
    aspect = getattr(base.config, "vision_aspect_ratio", None)
    given = {"vision_feature_select_strategy": "full", "vision_aspect_ratio": aspect}
    given = {name: value for name, value in given.items() if name in options and value is not None}

    def pack(values: Tensor) -> Tensor:
        newline = values.new_zeros(values.shape[-1])
        return torch.cat(
            base.pack_image_features(
                values.split(counts), image_sizes, image_newline=newline, **given
            )[0]
        )

    return pack


def _length(features: list, pictures: int, times: int) -> int:
    """How many tokens each of the tower's ``pictures`` became, 0 if that is unknown. features: by
    modality, for each image its (n, C), ``times`` over; fewer than pictures where they are tiles."""
    total = sum(len(feature) for of_kind in features for feature in of_kind)
    shares = times * pictures
    return total // shares if total % shares == 0 else 0


def _sources(kinds: list[Tensor], times: int) -> Tensor:
    """(n,) for each visual token of the batch, in the order of the text, which of the tower's it
    is. kinds, times: see TowerWatch.probe."""
    kinds = [where[::times] for where in kinds]
    source = torch.cat([where.reshape(-1).nonzero()[:, 0] for where in kinds]).argsort()
    count = torch.stack(kinds).sum((0, 2)).tolist()
    return torch.cat([of_row for of_row in source.split(count) for _ in range(times)])


class _Now(threading.local):
    """Between the tower and what is behind the projector, in this thread."""

    kept: tuple[CompressedTokens, int] | None = (
        None  # what the projector works on, and how many tokens it was
    )


class VisionStep:
    """What happens around the projector; tower: watched, if ``compressor`` asks."""

    def __init__(self, compressor: Compressor, parts: Parts, plan: str, observe: Callable | None):
        if parts.projector is None:
            raise UnsupportedModel(
                f"plan {plan!r}: the projector of {type(parts.base).__name__} merges tokens "
                "itself, so nothing can be compressed before it; use layer 0, which is behind it"
            )
        self.compressor, self.observe = compressor, observe
        self.tower = TowerWatch(compressor, parts) if "tower" in compressor.needs else None
        self._now = _Now()

    def hooks(self, add: Callable) -> None:
        if self.tower is not None:
            self.tower.hooks(add)

    def shorten(self, hidden: Tensor, training: bool) -> Tensor:
        """hidden (I, L, D) of the tower -> (I, M, D), which the projector works on."""
        if hidden.dim() != 3:
            raise UnsupportedModel(
                f"'vision' needs the projector to get (pictures, tokens, width), not {hidden.shape}"
            )
        images, length, _ = hidden.shape
        mask = torch.ones(images, length, dtype=torch.bool, device=hidden.device)
        positions = torch.arange(length, device=hidden.device)[None, :, None].expand(images, -1, -1)
        side = round(length**0.5)
        grid = torch.tensor(
            (side, side) if side * side == length else (1, length), device=hidden.device
        )
        probe = None if self.tower is None else self.tower.probe([hidden], length, images)
        tokens = VisualTokens(hidden, mask, positions, grid.expand(images, -1), training, probe)
        where = f"compressor {self.compressor} at 'vision'"
        out, _ = check_output(self.compressor(tokens), tokens, where)
        if out.size is not None or out.calibration is not None:
            raise UnsupportedModel(
                f"{self.compressor} weighs tokens by what they stand for: use it from layer 0 on"
            )
        if self.observe is not None:
            self.observe(VISION, tokens, out)
        self._now.kept = out, length
        return out.hidden

    def spread(self, output: Tensor) -> Tensor:
        """The projector's output (I, M, C) -> (I, L, C) with each token at its anchor, DROPPED elsewhere."""
        (out, length), self._now.kept = self._now.kept, None  # pyright: ignore[reportGeneralTypeIssues]
        if output.shape[:2] != out.mask.shape:
            raise UnsupportedModel(
                "'vision' needs a projector that maps token by token; use layer 0, behind it"
            )
        if (output.isnan() & out.mask[..., None]).any():  # else taken for DROPPED
            raise FloatingPointError(
                "the projector gave NaN; check its weights and the learning rate"
            )
        # Padding goes to a row to spare.
        index = out.anchor.masked_fill(~out.mask, length)[..., None].expand_as(output)
        rows = output.new_full((output.shape[0], length + 1, output.shape[2]), DROPPED)
        return rows.scatter(1, index, output)[:, :length]
