"""Define the contract of compressors, and the helpers that several methods share.

A compressor receives ``VisualTokens`` and returns ``CompressedTokens``. ``Compressor`` is the base
class; its named subclasses are registered in ``COMPRESSORS``, which plan texts, sliders and tests
read. ``KeepRatio`` and ``KeepBudget`` are bases for methods that keep a share or a number of
tokens. The functions are tensor operations and checks of options.

Shapes: I images, tiles or frames (rows), L input tokens of the longest row, M output tokens, C
hidden size, A axes of a rotary position, B rows of the batch, T tokens of such a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from llavolta.compression.probe import LayerProbe, TowerProbe, matmul_float32
from llavolta.errors import ConfigError

COMPRESSORS: dict[str, type[Compressor]] = {}
Positions = Literal["contiguous", "original"]


@dataclass
class VisualTokens:
    """The visual tokens of a batch at one layer.

    Each row is an image, a tile of an image or a frame of a clip. For a compressor with
    ``over_clips`` a row may be a whole clip.

    Attributes:
        hidden: (I, L, C) hidden states in raster order, padded at the end.
        mask: (I, L) bool, False at padding.
        positions: (I, L, A) integer rotary positions. A is 1, or 3 for a model with 3-D positions
            (M-RoPE).
        grid: (I, 2) height and width in tokens of the image or of one frame, without a class token
            before its patches. (1, n) where the n tokens of a row are no known rectangle, which is
            also the default.
        training: Whether the model is in training mode.
        probe: Computes ``attention``, ``keys`` and ``rows`` on request: a LayerProbe at a decoder
            layer, a TowerProbe at "vision" for a compressor that needs "tower", else None. At layer
            0 the LayerProbe includes the tower for such a compressor.
        frames: (I,) number of frames in each row, one after the other, of equally many tokens. 1 by
            default.
        size: (I, L) number of tokens that each token represents as an attention key: see
            ``CompressedTokens``. 1 by default.
    """

    hidden: Tensor
    mask: Tensor
    positions: Tensor
    grid: Tensor | None = None
    training: bool = False
    probe: LayerProbe | TowerProbe | None = None
    frames: Tensor | None = None
    size: Tensor | None = None

    def __post_init__(self):
        if self.size is None:
            self.size = torch.ones_like(self.mask, dtype=torch.float)
        if self.frames is None:
            self.frames = torch.ones_like(self.mask[:, 0], dtype=torch.long)
        if self.grid is None:
            count = self.mask.sum(1)
            self.grid = torch.stack([torch.ones_like(count), count], dim=1)

    def attention(
        self,
        query: Literal["last", "instruction", "class", "received"] | Tensor = "last",
        previous: bool = False,
        layer: str | int = "last",
        per_head: bool = False,
    ) -> Tensor:
        """Return the attention that each visual token receives.

        At a decoder layer, attention is computed for the queries only, from the layer's own input
        norm, query and key projections and rotary embeddings. The softmax covers all earlier tokens
        of this forward pass and of the same sample of a packed row. It ignores a sliding window,
        and tokens that earlier passes left in the cache.

        In the vision tower, the softmax covers the class token and all patches of the image:
        ``softmax(q k^T / sqrt(d))``.

        Args:
            query: At a decoder layer "last", the last real token of each sample; "instruction", the
                tokens just before each answer if labels are given, else as "last"; or a (I, T) bool
                mask of tokens of each image's row. In the tower "class", the class token; or
                "received", all tokens of the image.
            previous: Read the decoder layer before this one. The compressor lists "previous_layer"
                in ``needs``.
            layer: Layer of the tower: "last", "selected" (the layer whose output the model
                selects), "early" (index 5 of 24) or a number. The compressor lists it in
                ``tower_layers``.
            per_head: In the tower, take a softmax per head and average over heads. False: one
                softmax over all heads as one head of width D, as in PruMerge (arXiv 2403.15388).

        Returns:
            (I, L) float32, the mean over queries (and over heads), without gradient.

        Raises:
            ValueError: The query or layer is not available here, or not listed by the compressor.
            UnsupportedModel: The model's attention cannot be computed, or the tower has no class
                token.
        """
        if isinstance(query, str) and (
            query in ("class", "received") or isinstance(self.probe, TowerProbe)
        ):
            return self._tower().attention(query, layer, per_head)
        return self._decoder().attention(query, previous)

    def own_attention(self) -> Tensor:
        """Return the attention that each visual token receives from the mean query of its image.

        The mean query is that of this layer over the image and all tokens before it in its row. The
        softmax covers the same tokens, per head, with queries and keys before rotation (PACT, arXiv
        2504.08966).

        Returns:
            (I, L) float32, the mean over heads, without gradient.
        """
        return self._decoder().own_attention()

    def salience(self, layer: str | int = "selected") -> Tensor:
        """Return the attention that ranks the patches of the vision tower.

        It is the attention of the class token, or, in a tower without one (SigLIP), the mean
        attention that a patch receives from all patches.

        Args:
            layer: Layer of the tower: see ``attention``.

        Returns:
            (I, L) float32, softmax per head and mean over heads, without gradient.
        """
        return self.attention(
            "class" if self._tower().class_token else "received", layer=layer, per_head=True
        )

    def keys(
        self, layer: str | int | None = None, per_head: bool = False, rotated: bool = False
    ) -> Tensor:
        """Return the attention keys of the visual tokens, without gradient.

        Args:
            layer: Layer of the tower: see ``attention``. None: this decoder layer, or the tower's
                last layer at "vision". Keys of the tower are those before rotation.
            per_head: In the tower, average over heads.
            rotated: At a decoder layer, apply the rotary embedding.

        Returns:
            (I, L, D) with all heads side by side, or (I, L, D / heads) float32 with ``per_head``.
        """
        if layer is not None or isinstance(self.probe, TowerProbe):
            return self._tower().keys("last" if layer is None else layer, per_head)
        return self._decoder().keys(rotated)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the row of the batch that each image stands in, and its question.

        Returns:
            The hidden states (I, T, C) of all T tokens of the row, and a (I, T) bool mask of its
            text after the last image, or of all its text if there is none after. Labelled tokens
            (answers) are no part of the question.

        Raises:
            UnsupportedModel: A row has no text but answers, or holds several packed samples.
            ValueError: At "vision", where the question is not known yet.
        """
        probe = self._decoder()
        return probe.here.hidden[probe.row()], probe.behind()

    def row_keys(self) -> Tensor:
        """Return the rotated keys of the layer before, of all tokens of each image's row.

        For a compressor that lists "previous_layer" in ``needs``.

        Returns:
            (I, T, D) with all heads side by side, without gradient.
        """
        probe = self._decoder()
        return probe.rotated_keys()[probe.row()]

    @property
    def start(self) -> VisualTokens:
        """The visual tokens at layer 0, for a compressor that lists "start" in ``needs``."""
        start = self._decoder().start
        if start is None:
            raise ValueError('the tokens of layer 0 need "start" in needs')
        return start  # pyright: ignore[reportReturnType]

    def from_start(self, marks: Tensor) -> Tensor:
        """Carry a mask of the tokens at layer 0 over to this layer.

        Args:
            marks: (I, T0) bool, over the T0 tokens that each image's row had at layer 0.

        Returns:
            (I, T) bool, over the tokens that the row has here.
        """
        return self._decoder().from_start(marks)

    @property
    def column(self) -> Tensor:
        """(I, L) index of each visual token among the T tokens of its row."""
        probe = self._decoder()
        return probe.images % probe.valid.shape[1]

    def final_norm(self, hidden: Tensor) -> Tensor:
        """Apply the language model's final norm to ``hidden`` (..., C)."""
        return self._decoder().norm(hidden)

    def _tower(self) -> TowerProbe:
        tower = (
            self.probe if isinstance(self.probe, TowerProbe) else getattr(self.probe, "tower", None)
        )
        if tower is None:
            raise ValueError(
                "attention and keys of the vision tower exist at 'vision' and layer 0, "
                'for a compressor that lists "tower" in needs'
            )
        return tower

    def _decoder(self) -> LayerProbe:
        if self.probe is None or isinstance(self.probe, TowerProbe):
            raise ValueError(
                "attention, keys and rows exist at decoder layers; at 'vision' there are "
                "attention('class') and keys for a compressor that lists \"tower\" in needs"
            )
        return self.probe


@dataclass
class CompressedTokens:
    """The output of a compressor.

    Attributes:
        hidden: (I, M, C) output tokens, padded at the end.
        mask: (I, M) bool, False at padding.
        anchor: (I, M) index of the input token whose place in the sequence each output token takes.
            It rises strictly over the real tokens of a row. A (1, M) or (M,) tensor holds for all
            rows.
        positions: (I, M, A) integer rotary positions. None: the positions of the anchors.
        group: (I, L) index of the output token that each input token was averaged into, M for none.
            Features that the model adds to visual tokens in later layers (deep-stack) are averaged
            in the same way. None: tokens were only kept or dropped.
        grid: (I, 2) height and width of the output. None: it is no rectangle.
        frames: (I,) number of such rectangles in each row. None: one.
        size: (I, M) number of tokens that each output token represents as an attention key. From
            this layer on, its log is added to the attention logits of the key (proportional
            attention: ToMe, arXiv 2210.09461, eq. 1). None: the size of the anchor. Not available
            at "vision" or with flash or flex attention.
        calibration: (I, M) constant c > 1, which adds ``log(c - D(distance))`` to the attention
            logits of the key, from this layer on. D is the mean cosine of the rotation by the
            distance from key to query (RESTORE, ICML 2026). 0: add nothing. None: the value of the
            anchor.
    """

    hidden: Tensor
    mask: Tensor
    anchor: Tensor
    positions: Tensor | None = None
    group: Tensor | None = None
    grid: Tensor | None = None
    frames: Tensor | None = None
    size: Tensor | None = None
    calibration: Tensor | None = None


@dataclass(frozen=True)
class Compressor(ABC):
    """Base class of compressors. A subclass with a ``name`` is registered in ``COMPRESSORS``.

    Write a frozen dataclass whose fields are the options, in the order of the plan text
    (``"2:avgpool:8"`` is ``AveragePool(8)``). Check them in ``__post_init__``, and implement
    ``__call__`` and ``num_tokens``.

    Attributes:
        name: The name in plan texts; empty: not registered.
        needs: What the compressor reads, which limits where it may stand. "previous_layer": the
            layer before, so from layer 1 on. "start": ``tokens.start``. "decoder": anything that
            exists at decoder layers only. "tower": attention or keys of the vision tower, so at
            "vision" or layer 0. "class_token", beside "tower": a class token in the tower, at
            "vision" only.
        tower_layers: The layers of the tower that it reads: see ``VisualTokens.attention``.
        over_clips: Whether a clip is one row at decoder layers, if no text stands between its
            frames. Else each frame is a row.
        may_empty: Whether an image may end up without any token.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    tower_layers: ClassVar[tuple[str | int, ...]] = ("last",)
    over_clips: ClassVar[bool] = False
    may_empty: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        name = vars(cls).get("name")  # an inherited name belongs to the base class
        if name:
            held = COMPRESSORS.get(name, cls)
            # The same module and name: the class is defined again, as in a notebook cell.
            if (held.__module__, held.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ConfigError(
                    f"compressor name {name!r} of {cls.__qualname__} is held by "
                    f"{held.__module__}.{held.__qualname__}; choose another"
                )
            COMPRESSORS[name] = cls

    @abstractmethod
    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        """Compress every image of the batch.

        Args:
            tokens: The visual tokens of the batch at the compressor's layer.

        Returns:
            The output tokens. Each image has at least one, unless the class sets ``may_empty``.
        """

    @abstractmethod
    def num_tokens(self, num_tokens: int) -> float:
        """Return the number of output tokens for an image of ``num_tokens`` tokens.

        If it depends on the image, it is an estimate.
        """

    @property
    def is_identity(self) -> bool:
        """Whether nothing is ever removed. The model is then left exactly as it is."""
        return False

    @property
    def contiguous(self) -> bool:
        """Whether positions close the gaps that dropped tokens leave.

        All tokens after a gap, text included, then move up, as if the shorter sequence had been
        fed. It applies at "vision" and layer 0, and to 1-D positions only.
        """
        return False

    def __str__(self) -> str:
        """Return the plan text, such as ``avgpool:8``.

        A boolean option that is False by default is left out unless it is True.
        """
        written = []
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, bool):
                written += [f"{option.name}={str(value).lower()}"] * (
                    value or option.default is True
                )
            else:
                written.append(str(value))
        return ":".join([self.name, *written])


@dataclass(frozen=True)
class KeepRatio(Compressor):
    """Base of compressors that keep the ``keep`` * n best-scored of n tokens, at least one.

    A subclass implements ``scores``. Each row keeps its own share, so each tile of an image does.

    Attributes:
        keep: Share of the tokens to keep, above 0 and at most 1.
    """

    keep: float = 0.5

    def __post_init__(self):
        require_share(self.name, "keep", self.keep)

    @property
    def is_identity(self) -> bool:
        return self.keep == 1

    def num_tokens(self, num_tokens: int) -> int:
        return max(1, round(num_tokens * self.keep))

    @abstractmethod
    def scores(self, tokens: VisualTokens) -> Tensor:
        """Return a score (I, L) per token. Higher ones are kept first; padding is ignored."""

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        scores = self.scores(tokens).masked_fill(~tokens.mask, -torch.inf)
        count = share_of(tokens.mask, self.keep)
        # The argsort of an argsort is the rank. A stable sort keeps the earlier of equal scores.
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return keep_tokens(tokens, rank < count[:, None])


@dataclass(frozen=True)
class KeepBudget(Compressor):
    """Base of compressors whose ``keep`` is a share or a number of tokens.

    Both count per row, so per tile of an image.

    Attributes:
        keep: A share up to 1, rounded to at least one token; or a whole number of tokens above 1,
            of which a shorter row keeps all.
        positions: "contiguous": positions close up, as if the shorter sequence had been fed; at
            "vision" and layer 0 only, since earlier decoder layers have rotated keys by the
            original positions. "original": positions stay. "auto": contiguous at "vision" and layer
            0, original at later layers. With 3-D positions (M-RoPE) an image takes as many
            positions as its longer side, so "auto" is original everywhere and "contiguous" raises
            UnsupportedModel.
    """

    keep: float | int = 0.25
    positions: Literal["auto"] | Positions = "auto"

    def __post_init__(self):
        if not 0 < _number(self.keep) <= 1:
            name = "keep, if not a share above 0 and at most 1,"
            require_int(self.name, name, self.keep, at_least=2)
        if self.positions != "auto":
            require_choice(self.name, "positions", self.positions, Positions)

    @property
    def is_identity(self) -> bool:
        return self.keep == 1

    @property
    def contiguous(self) -> bool:
        return self.positions != "original"

    def num_tokens(self, num_tokens: int) -> int:
        return (
            min(num_tokens, int(self.keep))
            if self.keep > 1
            else max(1, round(num_tokens * self.keep))
        )

    def budget(self, mask: Tensor) -> Tensor:
        """Return the (I,) number of tokens to keep, given the mask (I, L)."""
        return mask.sum(1).clamp(max=self.keep) if self.keep > 1 else share_of(mask, self.keep)


def choose_greedily(
    count: Tensor, mask: Tensor, gain: Tensor, update: Callable[[int, Tensor, Tensor], Tensor]
) -> Tensor:
    """Choose tokens one after the other, each time the one of the largest gain.

    Args:
        count: (I,) number of tokens to choose in each row.
        mask: (I, L) bool, the tokens that may be chosen.
        gain: (I, L) gain of the first choice.
        update: Called after each choice as ``update(step, chosen, gain)``, with the (I,) indices
            just chosen. Returns the gain (I, L) of the next choice.

    Returns:
        (I, L) bool, the chosen tokens.
    """
    kept = torch.zeros_like(mask)
    for step in range(int(count.max())):
        chosen = gain.masked_fill(kept | ~mask, -torch.inf).argmax(1)
        # A row that has its count already goes on choosing, without effect.
        kept |= torch.nn.functional.one_hot(chosen, mask.shape[1]).bool() & (step < count)[:, None]
        gain = update(step, chosen, gain)
    return kept


def take(values: Tensor, index: Tensor) -> Tensor:
    """Gather rows of ``values`` (I, L, D) at ``index`` (I, M) -> (I, M, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def first_of(chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the first ``count`` True of each row of ``chosen`` (I, L), in order.

    Returns:
        The indices (I, count), and a (I, count) bool mask, False where a row has fewer.
    """
    # A stable sort puts the True entries first and keeps their order.
    place = torch.argsort(chosen.long(), dim=1, descending=True, stable=True)[:, :count]
    return place, chosen.gather(1, place)


def largest_of(values: Tensor, count: Tensor, mask: Tensor) -> Tensor:
    """Mark the ``count`` (I,) largest of each row of ``values`` (I, L), within ``mask`` (I, L).

    Of equal values the earlier one is taken.

    Returns:
        (I, L) bool.
    """
    order = values.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return mask & (order.argsort(dim=1) < count[:, None])


def cosines(features: Tensor) -> Tensor:
    """Return the cosine similarities (I, L, L) of ``features`` (I, L, C), in float32.

    The matrix is symmetric to the last bit, so that rounding does not decide between two tokens
    that are nearest to each other.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    alike = matmul_float32(unit, unit.transpose(1, 2))
    return (alike + alike.transpose(1, 2)) / 2


def by_size(
    tokens: VisualTokens, work: Callable[..., CompressedTokens], *values: Tensor
) -> CompressedTokens:
    """Call ``work(tokens, *values)`` on rows of one size at a time, and join the results.

    Args:
        tokens: The visual tokens of the batch.
        work: Receives rows of equal length and grid, without padding. It must not use the probe.
        values: (I, L, ...) tensors per token, such as attention, sliced like the tokens.

    Returns:
        The output for all rows in their order, without ``grid`` and ``frames`` if sizes differ.
    """
    # The usual case: one size, so nothing to slice.
    if bool(tokens.mask.all()) and bool((tokens.grid == tokens.grid[:1]).all()):
        return work(tokens, *values)
    # sizes (S, 3): each height, width and token count that occurs; which (I,): index of each row.
    sizes, which = torch.cat([tokens.grid, tokens.mask.sum(1, keepdim=True)], 1).unique(
        dim=0, return_inverse=True
    )
    parts = []
    for number, count in enumerate(sizes[:, 2].tolist()):
        chosen = (which == number).nonzero()[:, 0]  # indices of the rows of this size
        names = ("hidden", "mask", "positions", "size")
        cut = {name: getattr(tokens, name)[chosen, :count] for name in names}
        alike = VisualTokens(
            **cut, grid=tokens.grid[chosen], frames=tokens.frames[chosen], training=tokens.training
        )
        parts.append((chosen, work(alike, *(value[chosen, :count] for value in values))))
    longest, length = max(part.mask.shape[1] for _, part in parts), tokens.mask.shape[1]
    images = len(tokens.mask)

    def joined(name: str, wide: int) -> Tensor | None:
        """Put a field of all parts into one tensor (I, wide, ...), 0 at padding."""
        if any(getattr(part, name) is None for _, part in parts):
            return None
        whole = None
        for chosen, part in parts:
            value = getattr(part, name).expand(len(chosen), *getattr(part, name).shape[1:])
            whole = value.new_zeros(images, wide, *value.shape[2:]) if whole is None else whole
            # Out of place, so that gradients pass.
            whole = whole.index_put(
                (chosen[:, None], torch.arange(value.shape[1], device=chosen.device)), value
            )
        return whole

    names = ("hidden", "mask", "anchor", "positions", "size", "calibration")
    return CompressedTokens(
        **{name: joined(name, longest) for name in names}, group=joined("group", length)
    )


def keep_tokens(tokens: VisualTokens, keep: Tensor) -> CompressedTokens:
    """Return the tokens where ``keep`` (I, L) is True, in their order, and drop all others."""
    keep = keep & tokens.mask
    count = keep.sum(1)
    longest = int(count.max())
    anchor = torch.argsort(~keep, dim=1, stable=True)[:, :longest]  # kept first, in order: (I, M)
    hidden = tokens.hidden.gather(1, anchor[..., None].expand(-1, -1, tokens.hidden.shape[-1]))
    return CompressedTokens(
        hidden, torch.arange(longest, device=keep.device) < count[:, None], anchor
    )


def check_output(
    out: CompressedTokens, tokens: VisualTokens, where: str, may_empty: bool = False
) -> tuple[CompressedTokens, bool]:
    """Check what a compressor returned.

    Args:
        out: The compressor's output.
        tokens: Its input.
        where: The compressor and its layer, for error messages.
        may_empty: Whether a row without any token is allowed.

    Returns:
        The output with anchors (I, M) clamped to valid indices at padding, and whether it has no
        padding.

    Raises:
        ValueError: Wrong shapes, a row without tokens, or anchors that do not rise or point at
            padding.
        FloatingPointError: NaN or infinite hidden states.
    """
    pictures, length, width = tokens.hidden.shape
    kept = tuple(out.mask.shape)
    fits = out.hidden.shape == (*kept, width) and kept[0] == pictures
    if not fits or tuple(out.anchor.shape) not in (kept, (1, *kept[1:]), kept[1:]):
        raise ValueError(
            f"{where} returned hidden {tuple(out.hidden.shape)}, mask {kept}, "
            f"anchor {tuple(out.anchor.shape)} for {pictures} pictures of width {width}; "
            f"expected ({pictures}, M, {width}), ({pictures}, M), ({pictures}, M)"
        )
    anchor = out.anchor.expand(kept).clamp(0, length - 1)
    found = (
        out.mask.any(1).all(),
        ((anchor.diff(dim=1) > 0) | ~out.mask[:, 1:]).all()
        & (tokens.mask.gather(1, anchor) | ~out.mask).all(),
        (torch.isfinite(out.hidden) | ~out.mask[..., None]).all(),
        out.mask.all(),
    )
    # One transfer for all four, so that the host waits for the device once.
    some_left, sound, finite, whole = torch.stack(found).tolist()
    if not (some_left or may_empty):
        raise ValueError(f"{where} left an image with no token; every image must keep at least one")
    if not sound:
        raise ValueError(f"{where} returned anchors that do not rise, or that stand at padding")
    if not finite:
        raise FloatingPointError(
            f"{where} returned NaN or infinite values; check the compressor and the learning rate"
        )
    return replace(out, anchor=anchor), whole


def share_of(mask: Tensor, keep: float) -> Tensor:
    """Return the (I,) number of tokens that the share ``keep`` of each row is, at least one.

    Args:
        mask: (I, L) bool, False at padding.
        keep: Share from 0 to 1. Halves are rounded to the even number.
    """
    return (mask.sum(1).double() * keep).round().clamp(min=1).long()


def sum_groups(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sum ``values`` (I, L, D) over the tokens of each group -> (I, groups, D).

    Args:
        values: (I, L, D).
        group: (I, L) index of each token's group. Tokens with index ``groups`` are left out.
        groups: Number of groups.
    """
    # One more group takes the tokens that are left out; it is cut off at the end.
    index = group[..., None].expand_as(values)
    return values.new_zeros(len(values), groups + 1, values.shape[-1]).scatter_add(
        1, index, values
    )[:, :-1]


_MOST = 2**32 - 1  # larger options would overflow in arithmetic on tensors


def _number(value) -> float:
    """Return ``value`` if it is a number, else NaN, which compares as False with any."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else torch.nan


def require_share(owner: str, name: str, value: float) -> None:
    """Raise ValueError unless ``value`` is a number above 0 and at most 1."""
    if not 0 < _number(value) <= 1:
        raise ValueError(f"{owner}: {name} must be above 0 and at most 1, not {value!r}")


def require_number(owner: str, name: str, value: float, at_most: float = 1e6) -> None:
    """Raise ValueError unless ``value`` is a number from 0 to ``at_most``."""
    if not 0 <= _number(value) <= at_most:
        raise ValueError(f"{owner}: {name} must be a number from 0 to {at_most:g}, not {value!r}")


def require_switch(owner: str, name: str, value: bool) -> None:
    """Raise ValueError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {name} must be true or false, not {value!r}")


def require_choice(owner: str, name: str, value: str, known) -> None:
    """Raise ValueError unless ``value`` is one of the options of the Literal type ``known``."""
    if value not in get_args(known):
        raise ValueError(
            f"{owner}: {name} must be one of {', '.join(get_args(known))}, not {value!r}"
        )


def require_int(owner: str, name: str, value: int, at_least: int, at_most: int = _MOST) -> None:
    """Raise ValueError unless ``value`` is an int from ``at_least`` to ``at_most``."""
    if not isinstance(value, int) or not at_least <= _number(value) <= at_most:
        limit = f"at most {at_most}" if _number(value) > at_most else f"at least {at_least}"
        raise ValueError(f"{owner}: {name} must be a whole number of {limit}, not {value!r}")
