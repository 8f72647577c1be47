"""What a compressor gets, what it returns, and the registry that plan texts, sliders and tests read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from llavolta.compression.probe import LayerProbe, TowerProbe, matmul_float32
from llavolta.errors import UserError

COMPRESSORS: dict[str, type[Compressor]] = {}
Positions = Literal["contiguous", "original"]


@dataclass
class VisualTokens:
    """The visual tokens of a batch at one layer, one row per picture: an image, a tile of one, a frame of a clip; or a
    clip, for a compressor that works ``over_clips``.

    hidden: (I, L, C) in raster order; rows of pictures with fewer than L tokens are padded at the end.
    mask: (I, L) True where a token is real.
    positions: (I, L, A) integer rotary positions; A is 1, or 3 where the model has 3-D positions.
    grid: (I, 2) height and width in tokens of the picture or frame, without a class token before its patches; (1, n)
    where the n tokens are not (or no longer) a known rectangle.
    frames: (I,) frames in the row, of equally many tokens, one after the other.
    size: (I, L) for how many tokens each stands as a key: see CompressedTokens; 1 at first.
    training: whether the model is in training mode.
    probe: what computes ``attention``, ``keys`` and ``rows`` when they are asked for. At "vision" there is no
    decoder layer yet: attention and keys of the tower are all, for a compressor that needs "tower"; at layer 0 it has
    both.
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
        """(I, L) attention that each visual token gets, the mean over heads (and queries), in float32, no gradient.

        query: "last", the last real token of each row of the batch; or "instruction", the tokens just before each
        answer where labels are given, else the last; or (I, T) bool, tokens of each picture's row. previous: in the
        layer before this one, as it computed it (a compressor that asks for it lists "previous_layer" in ``needs``);
        else in this layer, from its own input norm, query and key projections and rotary embeddings. The softmax is
        over all earlier tokens of this pass, also in layers with a sliding window, and not over an older part of a
        conversation in the cache.

        For a compressor that needs "tower", at "vision" and layer 0: "class", ``softmax(q_cls k^T / sqrt(D))`` of a
        tower's encoder layer over the class token and all patches; "received", the mean over the attention of all
        tokens of a picture. layer: "last", "selected" (the one whose output the model selects) or a number; a
        compressor lists those that it asks for in ``tower_layers``. per_head: the mean of each head's softmax, else
        all heads as one of width D, as in PruMerge (arXiv 2403.15388).
        """
        if isinstance(query, str) and (
            query in ("class", "received") or isinstance(self.probe, TowerProbe)
        ):
            return self._tower().attention(query, layer, per_head)
        return self._probe().attention(query, previous)

    def own_attention(self) -> Tensor:
        """(I, L) what the mean of this layer's queries, of each picture and of all tokens before it in its row, gives
        to the keys of these, before rotation: each head's softmax, their mean; no gradient (PACT, arXiv 2504.08966)."""
        return self._probe().own_attention()

    def salience(self, layer: str | int = "selected") -> Tensor:
        """(I, L) where a compressor may ask the tower: each head's attention of the class token, its mean over heads;
        if the tower has no class token (SigLIP), the attention that a patch receives, the mean over heads and patches.
        """
        return self.attention(
            "class" if self._tower().class_token else "received", layer=layer, per_head=True
        )

    def keys(
        self, layer: str | int | None = None, per_head: bool = False, rotated: bool = False
    ) -> Tensor:
        """(I, L, D) keys of this decoder layer, all heads side by side, before rotation or ``rotated``; no gradient.

        layer: of the tower's ("last" where there is none else, at "vision"), before rotation; per_head: their mean over
        heads (I, L, D / heads), in float32.
        """
        if layer is not None or isinstance(self.probe, TowerProbe):
            return self._tower().keys(layer or "last", per_head)
        return self._probe().keys(rotated)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Of the row of the batch that each picture stands in: hidden states (I, T, C) of all T tokens, and
        (I, T) bool, the text behind its last picture (all text where none is behind), without answers where labels are
        given. Raises UnsupportedModel for a row without text."""
        probe = self._probe()
        behind = probe.behind()
        return probe.here.hidden[probe.row()], behind

    def row_keys(self) -> Tensor:
        """(I, T, D) keys in the layer before, with their rotation, of all T tokens of each picture's row, heads side by
        side; no gradient. For a compressor that lists "previous_layer" in ``needs``."""
        probe = self._probe()
        return probe.rotated_keys()[probe.row()]

    @property
    def start(self) -> VisualTokens:
        """The visual tokens as they were at layer 0, for a compressor that lists "start" in ``needs``."""
        start = self._probe().start
        if start is None:
            raise ValueError('the tokens of layer 0 need "start" in needs')
        return start  # pyright: ignore[reportReturnType]

    def from_start(self, marks: Tensor) -> Tensor:
        """marks (I, T0) of the tokens of each picture's row at layer 0 -> (I, T) of those that are still there."""
        return self._probe().from_start(marks)

    @property
    def column(self) -> Tensor:
        """(I, L) where each token stands among the T of its row."""
        probe = self._probe()
        return probe.images % probe.valid.shape[1]

    def final_norm(self, hidden: Tensor) -> Tensor:
        """``hidden`` (..., C) under the language model's final norm."""
        return self._probe().norm(hidden)

    def _tower(self) -> TowerProbe:
        tower = (
            self.probe if isinstance(self.probe, TowerProbe) else getattr(self.probe, "tower", None)
        )
        if tower is None:
            raise ValueError(
                "attention and keys of the vision tower exist at 'vision' and layer 0, for a compressor that lists "
                '"tower" in needs'
            )
        return tower

    def _probe(self) -> LayerProbe | TowerProbe:
        if self.probe is None:
            raise ValueError(
                "attention, keys and rows exist at decoder layers; at 'vision' there are attention('class') "
                'and keys for a compressor that lists "tower" in needs'
            )
        return self.probe


@dataclass
class CompressedTokens:
    """What a compressor leaves of each picture.

    hidden: (I, M, C). mask: (I, M) True where a token is real; padding stands at the end.
    anchor: (I, M) which of the L input tokens each one takes the place of; strictly rising over the real ones.
    positions: (I, M, A) integer rotary positions, or None for those of the anchors.
    group: (I, L) the output token into which each input token was averaged, or None where tokens were only kept or
    dropped. Features that the model adds to visual tokens in later layers (deep-stack) are merged in the same way.
    grid: (I, 2) height and width of what is left, or None if that is no rectangle; frames: (I,) how many of these, or
    None for one.
    size: (I, M) for how many tokens each stands as a key: the layers behind add its log to the logits of attention
    (proportional attention: ToMe, arXiv 2210.09461, eq. 1); None: as before. Not where attention is "flash" or "flex",
    nor at "vision". calibration: (I, M) c > 1 adds ``log(c - D(distance))`` to the logits of a key, where D is the mean
    cosine of the rotation by its distance to the query (RESTORE, ICML 2026); 0: nothing; None: as before.
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


class NameTaken(UserError, ValueError):
    """A compressor's name that another class holds."""


@dataclass(frozen=True)
class Compressor(ABC):
    """Base class. A subclass with a ``name`` of its own is known to plans, sliders and the test matrix at once.

    Write a frozen dataclass whose fields are the options in the order of the plan text
    (``"2:avgpool:8"`` -> ``AveragePool(8)``), check them in ``__post_init__``, and write ``__call__``.
    ``needs``: "previous_layer" for ``tokens.attention(previous=True)``, so from layer 1; "start" for
    ``tokens.start``; "decoder" for what exists at
    decoder layers only; "tower" for attention and keys of the vision tower (of its ``tower_layers``), so at "vision"
    or layer 0, and with it "class_token" if the tower must have one, at "vision" only. ``over_clips``: at
    decoder layers the frames of a clip that no text parts are one row. ``may_empty``: whether it may leave a picture
    without any token.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    tower_layers: ClassVar[tuple[str | int, ...]] = ("last",)
    over_clips: ClassVar[bool] = False
    may_empty: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        name = vars(cls).get("name")  # an inherited one stays its owner's
        if name:
            held = COMPRESSORS.get(name, cls)
            if (held.__module__, held.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):  # the same: defined anew
                raise NameTaken(
                    f"compressor name {name!r} of {cls.__qualname__} is held by {held.__module__}.{held.__qualname__}; "
                    "choose another"
                )
            COMPRESSORS[name] = cls

    @abstractmethod
    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        """Compress every picture of the batch; at least one token of each must stay, unless the class ``may_empty``."""

    @abstractmethod
    def num_tokens(self, num_tokens: int) -> float:
        """How many tokens (their mean, if it depends on the picture) are left of ``num_tokens``."""

    @property
    def is_identity(self) -> bool:
        """True when nothing is ever removed; the model is then left exactly as it is."""
        return False

    @property
    def contiguous(self) -> bool:
        """At "vision" and layer 0, where positions have one dimension: whether all tokens behind
        a gap, text too, move up, as if the shorter sequence had been fed."""
        return False

    def __str__(self) -> str:
        """The plan text, such as ``avgpool:8``; switches that are off by default and in fact are left out."""
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
    """Base of the compressors that keep the ``keep`` * n best-scored of a picture's n tokens, at least one.

    A subclass writes ``scores(tokens) -> (I, L)``. Each picture keeps its own share, also each tile of one image.
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
        """(I, L), higher is kept first; entries at padding are ignored."""

    def __call__(self, tokens: VisualTokens) -> CompressedTokens:
        scores = self.scores(tokens).masked_fill(~tokens.mask, -torch.inf)
        count = share_of(tokens.mask, self.keep)
        rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return keep_tokens(tokens, rank < count[:, None])


@dataclass(frozen=True)
class KeepBudget(Compressor):
    """Base of the compressors that leave ``keep`` of a picture's n tokens: a share of them up to 1, or a whole number
    above 1 (all, where there are fewer), counted by picture, also by tile of one image.

    positions: "contiguous", as if the shorter sequence had been fed: what follows moves up; "original"; or "auto":
    contiguous at "vision" and layer 0, original from layer 1 on, where contiguous cannot be, as the layers before have
    rotated keys by the original ones. With 3-D positions (M-RoPE, Qwen-VL) "auto" is original
    everywhere, and "contiguous" is refused: an image takes as many positions as its longer side,
    however many tokens are left of it.
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
        """(I,) how many of the tokens mask (I, L) of each picture are left."""
        return mask.sum(1).clamp(max=self.keep) if self.keep > 1 else share_of(mask, self.keep)


def choose_greedily(
    count: Tensor, mask: Tensor, gain: Tensor, update: Callable[[int, Tensor, Tensor], Tensor]
) -> Tensor:
    """(I, L) bool: count (I,) tokens of each picture, one after the other the one of the largest ``gain`` (I, L).

    update: called as ``update(step, chosen, gain)`` with what each picture has just chosen (I,), gives the next gain.
    """
    kept = torch.zeros_like(mask)
    for step in range(int(count.max())):
        chosen = gain.masked_fill(kept | ~mask, -torch.inf).argmax(1)
        kept |= torch.nn.functional.one_hot(chosen, mask.shape[1]).bool() & (step < count)[:, None]
        gain = update(step, chosen, gain)
    return kept


def take(values: Tensor, index: Tensor) -> Tensor:
    """values (I, L, D) at index (I, M) -> (I, M, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def first_of(chosen: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(I, count) the places of the first ``count`` True of each row of chosen (I, L), in order; and (I, count) bool,
    False where there are fewer."""
    place = torch.argsort(chosen.long(), dim=1, descending=True, stable=True)[:, :count]
    return place, chosen.gather(1, place)


def largest_of(values: Tensor, count: Tensor, mask: Tensor) -> Tensor:
    """(I, L) bool, the ``count`` (I,) largest of each row of values (I, L), the earlier of equal ones; mask (I, L)."""
    order = values.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return mask & (order.argsort(dim=1) < count[:, None])


def cosines(features: Tensor) -> Tensor:
    """(I, L, L) cosine similarity of features (I, L, C), in float32; of a pair the same both ways, to the last bit, so
    that rounding does not choose between two tokens that are nearest to each other."""
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    alike = matmul_float32(unit, unit.transpose(1, 2))
    return (alike + alike.transpose(1, 2)) / 2


def by_size(
    tokens: VisualTokens, work: Callable[..., CompressedTokens], *values: Tensor
) -> CompressedTokens:
    """``work(tokens, *values)``, called with pictures of one size at a time, which have no padding and no probe.

    values: (I, L, ...) what was asked of the probe, cut as the tokens are.
    """
    if bool(tokens.mask.all()) and bool((tokens.grid == tokens.grid[:1]).all()):
        return work(tokens, *values)
    sizes, which = torch.cat([tokens.grid, tokens.mask.sum(1, keepdim=True)], 1).unique(
        dim=0, return_inverse=True
    )
    parts = []
    for number, count in enumerate(sizes[:, 2].tolist()):
        chosen = (which == number).nonzero()[:, 0]
        names = ("hidden", "mask", "positions", "size")
        cut = {name: getattr(tokens, name)[chosen, :count] for name in names}
        alike = VisualTokens(
            **cut, grid=tokens.grid[chosen], frames=tokens.frames[chosen], training=tokens.training
        )
        parts.append((chosen, work(alike, *(value[chosen, :count] for value in values))))
    longest, length = max(part.mask.shape[1] for _, part in parts), tokens.mask.shape[1]
    images = len(tokens.mask)

    def joined(name: str, wide: int) -> Tensor | None:
        if any(getattr(part, name) is None for _, part in parts):
            return None
        whole = None
        for chosen, part in parts:
            value = getattr(part, name).expand(len(chosen), *getattr(part, name).shape[1:])
            whole = value.new_zeros(images, wide, *value.shape[2:]) if whole is None else whole
            whole = whole.index_put(
                (chosen[:, None], torch.arange(value.shape[1], device=chosen.device)), value
            )
        return whole

    names = ("hidden", "mask", "anchor", "positions", "size", "calibration")
    return CompressedTokens(
        **{name: joined(name, longest) for name in names}, group=joined("group", length)
    )


def keep_tokens(tokens: VisualTokens, keep: Tensor) -> CompressedTokens:
    """The tokens where ``keep`` (I, L) is True, in their order, and nothing else."""
    keep = keep & tokens.mask
    count = keep.sum(1)
    longest = int(count.max())
    anchor = torch.argsort(~keep, dim=1, stable=True)[:, :longest]
    hidden = tokens.hidden.gather(1, anchor[..., None].expand(-1, -1, tokens.hidden.shape[-1]))
    return CompressedTokens(
        hidden, torch.arange(longest, device=keep.device) < count[:, None], anchor
    )


def check_output(
    out: CompressedTokens, tokens: VisualTokens, where: str, may_empty: bool = False
) -> tuple[CompressedTokens, bool]:
    """A compressor's output that has been found sound, its anchors clamped at padding; and whether none is padding."""
    pictures, length, width = tokens.hidden.shape
    kept = tuple(out.mask.shape)
    fits = out.hidden.shape == (*kept, width) and kept[0] == pictures
    if not fits or tuple(out.anchor.shape) not in (kept, (1, *kept[1:]), kept[1:]):
        raise ValueError(
            f"{where} returned hidden {tuple(out.hidden.shape)}, mask {kept}, anchor {tuple(out.anchor.shape)} for "
            f"{pictures} pictures of width {width}; expected ({pictures}, M, {width}), ({pictures}, M), ({pictures}, M)"
        )
    anchor = out.anchor.expand(kept).clamp(0, length - 1)
    found = (
        out.mask.any(1).all(),
        ((anchor.diff(dim=1) > 0) | ~out.mask[:, 1:]).all()
        & (tokens.mask.gather(1, anchor) | ~out.mask).all(),
        (torch.isfinite(out.hidden) | ~out.mask[..., None]).all(),
        out.mask.all(),
    )
    some_left, sound, finite, whole = torch.stack(
        found
    ).tolist()  # the host waits for the device once
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
    """(I,) how many tokens the share ``keep`` of each picture's are, at least one; mask (I, L)."""
    return (mask.sum(1).double() * keep).round().clamp(min=1).long()


def sum_groups(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """values (I, L, D) -> (I, groups, D), the sum of those of each group; group (I, L), ``groups`` at padding."""
    index = group[..., None].expand_as(values)
    return values.new_zeros(len(values), groups + 1, values.shape[-1]).scatter_add(
        1, index, values
    )[:, :-1]


_MOST = 2**32 - 1  # beyond it, arithmetic on tensors overflows


def _number(value) -> float:
    """``value`` if it is a number, else NaN, which compares as False with any."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else torch.nan


def require_share(owner: str, name: str, value: float) -> None:
    if not 0 < _number(value) <= 1:
        raise ValueError(f"{owner}: {name} must be above 0 and at most 1, not {value!r}")


def require_number(owner: str, name: str, value: float, at_most: float = 1e6) -> None:
    if not 0 <= _number(value) <= at_most:
        raise ValueError(f"{owner}: {name} must be a number from 0 to {at_most:g}, not {value!r}")


def require_switch(owner: str, name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {name} must be true or false, not {value!r}")


def require_choice(owner: str, name: str, value: str, known) -> None:
    if value not in get_args(known):
        raise ValueError(
            f"{owner}: {name} must be one of {', '.join(get_args(known))}, not {value!r}"
        )


def require_int(owner: str, name: str, value: int, at_least: int, at_most: int = _MOST) -> None:
    if not isinstance(value, int) or not at_least <= _number(value) <= at_most:
        limit = f"at most {at_most}" if _number(value) > at_most else f"at least {at_least}"
        raise ValueError(f"{owner}: {name} must be a whole number of {limit}, not {value!r}")
