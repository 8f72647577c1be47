"""The plan's "vision" entry, and what the vision tower's attention and keys tell a compressor.

``VisionStep`` compresses the tower's output (I, L, D) to (I, M, D) before the projector. After the
projector it writes the M tokens back to the places of their anchors and fills the other places with
NaN, because the stock model expects L tokens per image. ``DropMarked`` removes the NaN tokens at
layer 0. ``TowerWatch`` records queries and keys of tower layers, for compressors that rank tokens
by them at "vision" or layer 0.
"""

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

BLENDED = (
    "this model blends neighbouring tokens behind the projector, so 'vision' cannot drop any "
    "before it; use layer 0"
)
DROPPED = torch.nan  # marks tokens that a compressor before the projector removed


@dataclass(frozen=True)
class DropMarked(Compressor):
    """Drop the tokens that the compressor before the projector removed.

    Attributes:
        close: Whether positions close the gaps of the removed tokens.
    """

    close: bool

    @property
    def contiguous(self) -> bool:
        return self.close

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        left = keep_tokens(tokens, ~tokens.hidden[..., 0].isnan())
        # A model that interpolates between tokens after the projector spreads the NaN.
        if not left.mask.any(1).all():
            raise UnsupportedModel(BLENDED)
        return left

    def num_tokens(self, num_tokens: int) -> int:
        return num_tokens


class _Noted(threading.local):
    """What was recorded of the vision tower in this thread.

    Attributes:
        layers: By layer and "query", "key", "qkv" or "call", a list with one entry per call of the
            tower; images come before clips.
        sizes: (I, 3) time, height and width in patches, of the images of each call, if the tower
            takes them.
        features: The encoded images that the records belong to. None until a probe was made.
    """

    def __init__(self):
        self.layers: dict[tuple, list] = {}
        self.sizes: list[Tensor] = []
        self.features: list | None = None

    def renew(self) -> None:
        """Delete the records of a former pass when the tower runs again."""
        if self.features is not None:
            self.__init__()


class TowerWatch:
    """Records queries and keys of the tower layers that a compressor lists in ``tower_layers``.

    Creating one raises UnsupportedModel if a tower lacks such a layer, or a class token that the
    compressor needs.
    """

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
                f"{', '.join(lacking)} has no class token whose attention could rank patches; use "
                "a compressor that needs none, such as cls, visionzip or kmeans"
            )
        self._noted = _Noted()

    def hooks(self, add: Callable) -> None:
        """Register the recording hooks.

        Args:
            add: Called with the handle of each hook.
        """
        for layer, attentions in self.attentions.items():
            for attention in attentions:
                # One projection for query, key and value. The attention's arguments tell rotation
                # and lengths of the images, which are packed in one row.
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
        """A hook that records its last argument: a module's output, or its keyword arguments."""
        self._noted.renew()
        noted = given[-1].detach() if isinstance(given[-1], Tensor) else given[-1]
        self._noted.layers.setdefault(where, []).append(noted)

    def _note_sizes(self, tower, args, kwargs) -> None:
        """A hook that records ``grid_thw``, which the tower takes by name or in second place."""
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
        """Make the probe of the images that the tower has just encoded.

        It is called before the projector with ``length`` and ``images``, or at layer 0 with
        ``spread``, ``kinds`` and ``rows``.

        Args:
            features: The projector's input, or at layer 0 the encoder's output by modality. If
                ``generate`` passes the same ones again without running the tower, the records still
                apply.
            length: L, the tokens of an image at the projector.
            images: The number of images at the projector.
            spread: (I, L) bool at layer 0, True where an image has a token.
            kinds: At layer 0, (B, T) bool per modality, in the encoder's order, on the CPU: True at
                its placeholders.
            rows: (I, L) flat rows of the tokens at layer 0.
            image_sizes: (images, 2) heights and widths, for models that cut images into tiles.
            times: How often ``generate`` has repeated each batch row, as for beams.

        Returns:
            A probe that answers for the tokens (I, L) of the place where it is called.

        Raises:
            UnsupportedModel: The tower did not run, or it is unknown which patches became which
                tokens.
        """
        if self._noted.features is None:
            self._noted.features = features
        known = len(features) == len(self._noted.features)
        known = known and all(a is b for a, b in zip(features, self._noted.features, strict=True))
        # The tower runs once per modality. Any calls before these are from an interrupted pass, or
        # from a layer that gradient checkpointing has computed again.
        calls = len(features)
        noted = (
            {where: held[-calls:] for where, held in self._noted.layers.items()} if known else {}
        )
        sizes = self._noted.sizes[-calls:]
        asked = self.attentions.items()
        # A tower that packs the patches of all images in one row (Qwen).
        if all((layer, "call") in noted for layer, _ in asked):
            layers = {
                layer: _packed(noted[layer, "call"], noted[layer, "qkv"], of[0])
                for layer, of in asked
            }
            unit, order = _merging(self.towers[0], torch.cat(sizes))
            probe = TowerProbe(layers, length, False, unit, order, spread)
        # A tower that takes images or frames of one size as a batch (I, T, D).
        elif all((layer, "key") in noted for layer, _ in asked):
            calls = [call.shape[1:] for layer, _ in asked for call in noted[layer, "key"]]
            if len(set(calls)) > 1:
                raise UnsupportedModel(
                    "images and clips of this batch have unlike numbers of patches, so "
                    f"{self.compressor} cannot rank them together; give one kind a batch, or use a "
                    "compressor that needs no attention of the tower"
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
            # At layer 0 an image may be several tiles with newlines, as in LLaVA-NeXT.
            tiled = spread is not None and getattr(self.base, "image_newline", None) is not None
            if tiled:
                length = key.shape[1] - self.class_token
            elif spread is not None:
                length = _length(features, len(key), times)
            probe = TowerProbe(layers, length, self.class_token, spread=spread)
            if tiled and image_sizes is not None and len(features) == 1:
                probe.pack = _packing(self.base, image_sizes, len(key))
            # Packing zeros (tiles, L, 1) tells the number of tokens.
            if tiled:
                probe.made = (
                    0 if probe.pack is None else len(probe.pack(key.new_zeros(len(key), length, 1)))
                )
        else:
            raise UnsupportedModel(
                f"{self.compressor} reads the vision tower, which did not work in this pass; give "
                "pixels, not features"
            )
        given = next(iter(layers.values())).key.shape[:2]
        if kinds is not None:
            # Which of the tower's tokens stands at each placeholder, in text order.
            source = _sources(kinds, times)
            # (n,) flat rows of all placeholders, in text order.
            places = (
                torch.cat([where.reshape(-1) for where in kinds])
                .view(len(kinds), -1)
                .any(0)
                .nonzero()[:, 0]
            )
            # Images leave out a single newline, which is a placeholder too: (I, L) -> (n',)
            at = torch.searchsorted(places, rows[spread].cpu())
            probe.source = (source[at] if len(source) == len(places) else source).to(spread.device)
        if (images is not None and given[0] != images) or not probe.fits:
            reach, other = f"{images} x {length} reach the projector", "layer 0"
            if spread is not None:
                beams = f", each row {times} times (num_beams, num_return_sequences)" * (times > 1)
                reach, other = f"{int(spread.sum())} reach layer 0{beams}", repr(VISION)
            raise UnsupportedModel(
                f"the vision tower made {given[0]} x {given[1]} tokens, but {reach}: it is unknown "
                f"which became which, so {self.compressor} cannot rank them; use it at {other}, or "
                "a compressor that needs no attention of the tower, such as downsample or kmeans"
            )
        return probe


def _packed(calls: list[dict], outputs: list[Tensor], attention) -> TowerLayer:
    """Make the record of a tower that packs the patches of all images in one row (Qwen's).

    Args:
        calls: Keyword arguments of the attention in each call of the tower.
        outputs: (S, 3 * heads * d) output of its ``qkv`` in each call, for S patches.
        attention: The attention module.

    Returns:
        Queries and keys (I, T, heads * d). Each of the I rows is a segment of ``cu_seqlens``, whose
        patches attend to each other: an image, a frame, or a window of either.
    """
    # (S, 3 * heads * d) -> (S, heads, d) each
    query, key, _ = torch.cat(outputs).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    plain = key
    if calls[0].get("position_embeddings") is not None:
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        rotation = zip(*(call["position_embeddings"] for call in calls), strict=True)
        query, key = rotate(query, key, *map(torch.cat, rotation))
    # Split the packed row into its segments, padded to the longest one.
    count = torch.cat([call["cu_seqlens"].diff() for call in calls])
    mask = torch.arange(int(count.max()), device=key.device) < count.to(key.device)[:, None]

    # (S, heads, d) -> (I, T, heads * d)
    def padded(values: Tensor) -> Tensor:
        out = values.new_zeros(*mask.shape, values[0].numel())
        out[mask] = values.flatten(1)
        return out

    return TowerLayer(padded(query), padded(key), attention.num_heads, mask, padded(plain))


def _merging(tower, sizes: Tensor) -> tuple[int, Tensor | None]:
    """Tell how a packed tower merges patches.

    Args:
        tower: The vision tower.
        sizes: (I, 3) time, height and width of each image or clip, in patches.

    Returns:
        The number of patches per merged token; and (n,) indices that undo the order in which a
        tower with window attention processes its merged tokens, None for other towers.
    """
    unit = tower.spatial_merge_size**2
    if not hasattr(tower, "window_size"):
        return unit, None
    options = dict(window_size=tower.window_size, patch_size=tower.patch_size)
    index, _ = get_vision_window_index(
        sizes, spatial_merge_size=tower.spatial_merge_size, **options
    )
    return unit, index.argsort()  # the inverse of the permutation


def _tiles_of(base, image_sizes: Tensor, tiles: int) -> list[int] | None:
    """The number of tiles of each image, which sum to ``tiles``; None if it is unknown."""
    patches = vars(sys.modules[type(base).__module__]).get("image_size_to_num_patches")
    if patches is None or not hasattr(base, "pack_image_features"):
        return None
    grid = dict(
        grid_pinpoints=base.config.image_grid_pinpoints,
        patch_size=base.config.vision_config.image_size,
    )
    for counts in (
        [patches(image_size=each, **grid) for each in image_sizes],
        [1] * len(image_sizes),  # some models do not cut images if a sample has several
    ):
        if sum(counts) == tiles:
            return counts
    return None


def _packing(base, image_sizes: Tensor, tiles: int) -> Callable[[Tensor], Tensor] | None:
    """Make a function that arranges values of tiles as the model arranges their features.

    Args:
        base: The base model, whose ``pack_image_features`` is called.
        image_sizes: (images, 2) heights and widths.
        tiles: The number of tiles of all images.

    Returns:
        A function from values (tiles, L, D) to (n, D), one row per token of all images. Newline
        tokens have the value 0. None if it is unknown which tiles belong to one image.
    """
    counts = _tiles_of(base, image_sizes, tiles)
    if counts is None:
        return None
    options = inspect.signature(base.pack_image_features).parameters
    aspect = getattr(base.config, "vision_aspect_ratio", None)
    given = {"vision_feature_select_strategy": "full", "vision_aspect_ratio": aspect}
    # Families differ in the arguments of pack_image_features.
    given = {name: value for name, value in given.items() if name in options and value is not None}

    def pack(values: Tensor) -> Tensor:
        newline = values.new_zeros(values.shape[-1])
        # (tiles, L, D) -> per image (its tiles, L, D) -> per image (its tokens, D) -> (n, D)
        return torch.cat(
            base.pack_image_features(
                values.split(counts), image_sizes, image_newline=newline, **given
            )[0]
        )

    return pack


def _length(features: list, pictures: int, times: int) -> int:
    """The number of tokens of each image or tile of the tower, 0 if it is unknown.

    Args:
        features: By modality, the features (n, C) of each image, each image ``times`` times.
        pictures: The number of images or tiles that the tower encoded.
        times: How often each image is repeated.
    """
    total = sum(len(feature) for of_kind in features for feature in of_kind)
    shares = times * pictures
    return total // shares if total % shares == 0 else 0


def _sources(kinds: list[Tensor], times: int) -> Tensor:
    """Find which token of the tower stands at each placeholder.

    The tower's tokens are all those of images, then all those of clips, and the text mixes them.

    Args:
        kinds: By modality, (B, T) bool, True at its placeholders.
        times: How often each batch row is repeated.

    Returns:
        (n,) for the placeholders of the batch in text order, indices into the tower's tokens.
    """
    kinds = [where[::times] for where in kinds]  # (B, T) -> (B / times, T)
    # Flat rows in the tower's order. Their argsort lists the tower's tokens in text order.
    source = torch.cat([where.reshape(-1).nonzero()[:, 0] for where in kinds]).argsort()
    count = torch.stack(kinds).sum((0, 2)).tolist()
    # Beams repeat a batch row's placeholders, and the tower encodes its images only once.
    return torch.cat([of_row for of_row in source.split(count) for _ in range(times)])


class _Now(threading.local):
    """The state of this thread from the projector's input to its output.

    Attributes:
        kept: The compressor's output, and the number of tokens L before it.
    """

    kept: tuple[CompressedTokens, int] | None = None


class VisionStep:
    """Compresses images before the projector, and restores their number of tokens after it.

    Creating one raises UnsupportedModel if the model's projector merges tokens.

    Attributes:
        compressor: The compressor at "vision".
        observe: Called after the compressor, as ``compress`` describes; or None.
        tower: Records the vision tower, if the compressor needs it.
    """

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
        """Register the hooks on the vision tower.

        Args:
            add: Called with the handle of each hook.
        """
        if self.tower is not None:
            self.tower.hooks(add)

    def shorten(self, hidden: Tensor, training: bool) -> Tensor:
        """Compress the projector's input.

        Args:
            hidden: (I, L, D) output of the tower.
            training: Whether the model is in training mode.

        Returns:
            (I, M, D) input of the projector.

        Raises:
            UnsupportedModel: ``hidden`` has another number of dimensions; the compressor weighs
                tokens, which is possible from layer 0 on only; or it reads the tower, and it is
                unknown which patches became which tokens.
        """
        if hidden.dim() != 3:
            raise UnsupportedModel(
                f"'vision' needs the projector to get (pictures, tokens, width), not {hidden.shape}"
            )
        images, length, _ = hidden.shape
        mask = torch.ones(images, length, dtype=torch.bool, device=hidden.device)
        # (L,) -> (I, L, 1)
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
        """Write the projector's output back to the places of the anchors.

        Args:
            output: (I, M, C) output of the projector.

        Returns:
            (I, L, C), DROPPED at the other places.

        Raises:
            UnsupportedModel: The projector merged tokens.
            FloatingPointError: The projector gave NaN, which is the mark of dropped tokens.
        """
        (out, length), self._now.kept = (  # pyright: ignore[reportGeneralTypeIssues]
            self._now.kept,
            None,
        )
        if output.shape[:2] != out.mask.shape:
            raise UnsupportedModel(
                "'vision' needs a projector that maps token by token; use layer 0, behind it"
            )
        if (output.isnan() & out.mask[..., None]).any():
            raise FloatingPointError(
                "the projector gave NaN; check its weights and the learning rate"
            )
        # Padding goes to place L, which is cut off: (I, M, C) -> (I, L + 1, C) -> (I, L, C).
        index = out.anchor.masked_fill(~out.mask, length)[..., None].expand_as(output)
        rows = output.new_full((output.shape[0], length + 1, output.shape[2]), DROPPED)
        return rows.scatter(1, index, output)[:, :length]
