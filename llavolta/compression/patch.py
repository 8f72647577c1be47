"""``compress``: fewer visual tokens inside a stock Hugging Face vision-language model, by forward hooks alone.

What happens in one forward pass, with a compressor at the input of decoder layer K:

1. The hook on the base model encodes the pictures (as ``generate`` does too) and notes which tokens are visual.
2. The hook on layer K hands each picture's hidden states to the compressor, and rebuilds the sequence from the text
   tokens (untouched) and what the compressor left. Padding goes too; rows of the batch that end up shorter are
   padded at their end.
3. The hooks on layers K, K+1, ... exchange the attention mask and the rotary embeddings for those of the shorter
   sequence: the mask is the stock one, looked up at the tokens that stay, so whatever pattern the model uses
   (causal, sliding window, padding, a cache) is kept. Text tokens keep their positions.
4. The hook on the decoder's output gives back one row per input token, so that the head, the loss and ``generate``
   see the shape they expect; in training with labels only the rows that predict a label (see ``compress``).

The plan's "vision" entry works at the projector instead: the hook before it shortens each picture, the hook behind it
puts what is left at its anchors among the placeholders' rows and marks the others, and layer 0 drops the marked ones.
A compressor that needs "tower" is handed what the projections of queries and keys in the tower's last layer gave.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from llavolta.compression.compressors import CompressedTokens, Compressor, VisualTokens, keep_tokens
from llavolta.compression.compressors.base import sum_groups
from llavolta.compression.compressors.prefix import Prefixed
from llavolta.compression.families import (
    Pictures,
    encode_pictures,
    find_parts,
    find_pictures,
    is_compiled,
    pools_frames,
    tower_attentions,
    visual_tokens,
)
from llavolta.compression.masks import look_up_mask, sliding_window, whole_cache
from llavolta.compression.plan import VISION, Layer, Plan, PlanError, check_layers, format_plan, parse_plan
from llavolta.compression.probe import LayerInput, LayerProbe, TowerProbe
from llavolta.errors import UnsupportedModel

IGNORED = -100  # the label of tokens without loss, as everywhere in transformers
BLENDED = (
    "this model blends neighbouring tokens behind the projector, so 'vision' cannot drop any before it; use layer 0"
)
DROPPED = torch.nan  # marks the features of tokens that a compressor before the projector removed

_active: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_plain = torch.compiler.disable  # these steps depend on data, so the graph would break in them anyway


def compress(
    model: nn.Module,
    plan: str | Mapping[Layer, Compressor] | None,
    *,
    labelled_only: bool | None = None,
    prefix: nn.Module | None = None,
    observe: Callable[[Layer, VisualTokens, CompressedTokens], None] | None = None,
) -> Compression:
    """Compress the visual tokens of ``model`` by ``plan`` until the returned handle is removed or its block ends.

    model: any supported vision-language model, also inside DDP or PEFT. plan: ``{layer: compressor}`` or its text,
    such as ``"2:avgpool:8"``; "none" leaves the model as it is.

    The loss is that of the same labelled tokens as without compression. ``logits`` hold one row per input token:
    the row of a token that was merged or dropped is that of the last remaining token at or before it. In training,
    when labels are given, ``logits`` are (1, M + 1, vocabulary) instead: the rows of the M labelled tokens of the
    batch in order, and one to spare; the loss and all gradients are the same, at a fraction of the memory.
    ``labelled_only=False`` keeps the full logits in training too, for trainers that compute metrics from them;
    ``True`` spares them also under a plan that removes nothing (which otherwise leaves the model untouched, bit for
    bit).

    torch.compile: pass the compiled model, not the one inside it; it is compiled anew when compression starts and
    when it ends, and the graph breaks where a compressor works.

    With ``output_hidden_states`` the last entry has the rows that ``logits`` have; the others have those that their
    layer worked on, and ``attentions`` likewise.

    A plan with "vision" leaves NaN in ``image_hidden_states``, at tokens that do not exist any more.

    prefix: gives, for I pictures, embeddings (I, P, C) to stand before each of them in the decoder, in place of tokens
    that the plan drops at "vision" or layer 0; later compressors count them among the visual tokens.

    observe: called as ``observe(layer, tokens, compressed)`` after each compressor of the plan, with the plan's key,
    what the compressor got and what it returned: once a forward pass, also under gradient checkpointing. Entries
    that remove nothing are not in force, so nothing is observed of them.

    Raises PlanError for a plan that does not fit, UnsupportedModel for a model without visual tokens or one that
    cannot do what the plan asks, RuntimeError if the model is being compressed already.
    """
    return Compression(model, plan, labelled_only, prefix, observe)


@dataclass
class _Rows:
    """What the rows (B, T) of the hidden states stand for, from one compressed layer to the next.

    index: the column of this pass's stock attention mask. later: the column that the same token will have in the
    stock masks of later passes on the same cache. valid: False at padding. positions: (B, T, A). pictures: the flat
    rows of each picture's tokens. deepstack: features (I, L, C) that are due after a layer. rotary: the rotary
    embeddings that replace a stock one.
    """

    index: Tensor
    later: Tensor
    valid: Tensor
    positions: Tensor
    pictures: Pictures
    deepstack: dict[int, Tensor] = field(default_factory=dict)
    rotary: dict[int, object] = field(default_factory=dict)


@dataclass
class _Pass:
    """The state of one forward pass."""

    by_kind: dict[str, Tensor]  # (B, T) bool on the CPU, where the pictures of each modality go
    encoded: dict  # their features
    real: Tensor  # (B, T) bool, False at padding
    unmasked: bool  # no attention mask was given
    cache: object | None = None
    past: int = 0  # tokens that the cache's first layer holds, as the stock masks count them
    seen: int = 0  # tokens that the cache was shown
    whole: bool = False  # whether the masks were made for a cache that holds every token
    deepstack: dict[int, Tensor] = field(default_factory=dict)  # (visual tokens, C), due after a layer
    rotary: list[tuple[tuple, dict, object]] = field(default_factory=list)
    previous: LayerInput | None = None
    rows: _Rows | None = None
    masks: dict[tuple[int, int], object] = field(default_factory=dict)  # by layer of the plan and stock mask
    cached: dict[int, _CachedRows] = field(default_factory=dict)  # what the cache will hold, by layer of the plan
    moved: Tensor | int = 0  # (B, 1) how far closing the gaps of this pass has moved its last token up

    @property
    def has_pictures(self) -> bool:
        return any(bool(where.any()) for where in self.by_kind.values())


class _Now(threading.local):
    """Where this thread is in a pass; other threads may be in passes of their own on the same model."""

    state: _Pass | None = None
    labels: Tensor | None = None
    labelled: tuple[Tensor, Tensor] | None = None  # rows and columns that predict a label
    kept: tuple[CompressedTokens, int] | None = None  # what the projector works on, and how many tokens it was
    due: tuple[str, ...] = ()  # which of "base" and "decoder" this pass has yet to reach; see _enter
    prompt: int | None = None  # tokens of the prompt, behind which generate may try out guesses

    def __init__(self):
        self.tower: dict[str, Tensor] = {}  # what the last tower gave, until the projector takes it


@dataclass
class _CachedRows:
    """What the rows (B, n) of a key-value cache stand for: see _Rows. original: the column without compression."""

    later: Tensor
    original: Tensor
    valid: Tensor
    seen: int  # how many tokens, compressed or not, this cache was shown
    moved: Tensor | int = 0  # (B, 1) how far the positions of later tokens move up


@dataclass(frozen=True)
class _DropMarked(Compressor):
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


class Compression:
    """The handle that ``compress`` returns: a context manager with ``remove()``. ``plan`` is the parsed plan."""

    def __init__(self, model: nn.Module, plan, labelled_only: bool | None, prefix=None, observe=None):
        self._observe = observe
        self.parts = find_parts(model)
        self._compiled = is_compiled(model)
        self.plan: Plan = check_layers(parse_plan(plan), len(self.parts.layers))
        working = {layer: c for layer, c in self.plan.items() if not c.is_identity}
        self._vision: Compressor | None = working.pop(VISION, None)
        if self._vision is not None and self.parts.projector is None:
            raise UnsupportedModel(
                f"plan {format_plan(self.plan)!r}: the projector of {type(self.parts.base).__name__} merges tokens "
                "itself, so nothing can be compressed before it; use layer 0, which is behind it"
            )
        self._steps: dict[int, list[Compressor]] = {layer: [c] for layer, c in working.items()}
        self._drop_marked: Compressor | None = None  # the second half of the entry "vision"
        if self._vision is not None:
            self._drop_marked = _DropMarked(self._vision.contiguous)
            self._steps[0] = [self._drop_marked, *self._steps.get(0, [])]
        if prefix is not None:
            if 0 not in self._steps:
                raise PlanError(f"plan {format_plan(self.plan)!r} makes no room for a prefix at 'vision' or layer 0")
            self._steps[0][-1] = Prefixed(self._steps[0][-1], prefix)
        self._towers = tower_attentions(self.parts) if self._vision and "tower" in self._vision.needs else []
        self._captured = {layer - 1 for layer, c in working.items() if "previous_layer" in c.needs}
        self.labelled_only = labelled_only if labelled_only is not None else bool(self._steps)
        self._now = _Now()
        self._caches: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._left: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # keys as they were, see _rows_of_before
        self._hooks: list = []
        self._replaced: dict[str, object] = {}  # methods of the model, by the model's own ones (None: the class's)
        if self.parts.decoder in _active:
            raise RuntimeError("this model is being compressed already; remove() the first handle or leave its block")
        if self._steps or self.labelled_only:
            self._install()

    def __repr__(self) -> str:
        return f"compress({format_plan(self.plan)!r}{'' if self._hooks else ', not in force'})"

    def __reduce__(self):
        raise UnsupportedModel("a model under compress() cannot be copied or pickled; remove() the handle first")

    def __enter__(self) -> Compression:
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def remove(self) -> None:
        """Take every hook off the model; calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks and self._compiled:
            torch.compiler.reset()
        if self._hooks and self.parts.top is not None:
            for name, own in self._replaced.items():
                vars(self.parts.top).pop(name, None)
                if own is not None:
                    vars(self.parts.top)[name] = own
            self._replaced.clear()
        self._hooks.clear()
        _active.discard(self.parts.decoder)

    def _install(self) -> None:
        parts, add = self.parts, self._hooks.append
        _active.add(parts.decoder)
        if self._compiled:
            torch.compiler.reset()  # compiled code does not notice that hooks come or go
        if parts.top is not None:
            add(parts.top.register_forward_pre_hook(self._before_top, with_kwargs=True))
            add(parts.top.register_forward_hook(self._after_top, with_kwargs=True, always_call=True))
        add(parts.base.register_forward_pre_hook(self._before_base, with_kwargs=True))
        add(parts.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        add(parts.decoder.register_forward_hook(self._after_decoder))
        if not self._steps:
            return
        if hasattr(parts.top, "_prefill"):
            self._replaced = {name: vars(parts.top).get(name) for name in ("_prefill", "generate")}
            parts.top._prefill = partial(_whole_prefill, parts.top._prefill)
            parts.top.generate = partial(self._generate, parts.top.generate)
        add(parts.base.register_forward_hook(self._after_base, always_call=True))
        add(parts.rotary.register_forward_hook(self._after_rotary, with_kwargs=True))
        for number in range(min(self._steps.keys() | self._captured), len(parts.layers)):
            segment = max((layer for layer in self._steps if layer <= number), default=None)
            hook = partial(self._before_layer, number, segment)
            add(parts.layers[number].register_forward_pre_hook(hook, with_kwargs=True))
        if self._vision is not None:
            for attention in self._towers:
                add(attention.q_proj.register_forward_hook(partial(self._after_tower, "query")))
                add(attention.k_proj.register_forward_hook(partial(self._after_tower, "key")))
            add(parts.projector.register_forward_pre_hook(self._before_projector))
            add(parts.projector.register_forward_hook(self._after_projector))

    # --- around the whole model: labels ---

    @_plain
    def _before_top(self, module, args, kwargs):
        self._forget()
        self._now.due = ("base", "decoder")
        self._now.labels = labels = kwargs.get("labels")
        if labels is None or not self.labelled_only or not module.training or kwargs.get("shift_labels") is not None:
            return None
        row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # column: of the token that predicts
        self._now.labelled = (row, column)
        # The head gets one row to spare, because the stock loss shifts labels by one.
        short = torch.cat([labels.new_full((1,), IGNORED), labels[row, column + 1]])[None]
        return args, {**kwargs, "labels": short}

    def _forget(self) -> None:
        self._now.state = self._now.labels = self._now.labelled = None

    def _enter(self, part: str, fits: bool = True) -> None:
        """Note that a pass reaches ``part``. If it does not come from the part before, it was called by itself, and
        what an interrupted pass left is stale: an interrupt is no Exception and skips the hooks that clean up."""
        if part not in self._now.due or not fits:
            self._forget()
        self._now.due = ("decoder",) if part == "base" else ()

    def _after_top(self, module=None, args=None, kwargs=None, output=None):
        labelled, self._now.labelled, self._now.labels = self._now.labelled, None, None
        return None if labelled is None or output is None else _marked(output)

    # --- around the base model: which tokens are visual ---

    @_plain
    def _before_base(self, module, args, kwargs):
        self._enter("base")
        if not self._steps:
            return None
        inputs = encode_pictures(self.parts.base, args, kwargs)
        by_kind = {kind: where.cpu() for kind, where in visual_tokens(self.parts, inputs).items()}
        if self._vision is not None and "video" in by_kind and pools_frames(self.parts.base):
            raise UnsupportedModel(BLENDED)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, -ids.shape[1] :].bool()
        self._now.state = state = _Pass(by_kind, inputs.get("mm_encoder_outputs") or {}, real, mask is None)
        state.cache = inputs.get("past_key_values")
        if state.cache is not None:
            inputs = self._continue(state, inputs)
        return (), inputs

    def _after_base(self, module, args, output):
        self._now.state = None

    def _generate(self, stock, *args, **kwargs):
        """``generate``, noting where the prompt ends: by speculation, its first pass holds guesses behind it."""
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        self._now.prompt = None if ids is None else ids.shape[1]
        try:
            return stock(*args, **kwargs)
        finally:
            self._now.prompt = None

    def _continue(self, state: _Pass, inputs: dict) -> dict:
        """``inputs`` for a cache whose first layer is a compressed one: stock code takes lengths from that layer."""
        if getattr(state.cache, "is_compileable", False):
            raise UnsupportedModel(
                f"compress cannot fill a {type(state.cache).__name__} of fixed size; use a DynamicCache (the default)"
            )
        state.past = state.cache.get_seq_length()
        if state.past == 0:
            self._caches.pop(state.cache, None)  # new, or emptied by reset()
        held = self._as_it_is_now(state)
        if held and len(set(getattr(self.parts.decoder.config, "layer_types", None) or ())) > 1:
            return self._with_whole_masks(state, inputs, max(rows.seen for rows in held.values()))
        first = held.get(0)
        state.seen = seen = state.past if first is None else first.seen
        new, mask, positions = state.real.shape[1], inputs.get("attention_mask"), inputs.get("position_ids")
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

    def _as_it_is_now(self, state: _Pass) -> dict[int, _CachedRows]:
        """What the rows of the cache stand for, by layer of the plan; also where since the last pass its samples were
        moved, left out or repeated (beams), or its end was cropped, if that is text alone."""
        held = self._caches.get(state.cache, {})
        if not held:
            return held
        of_before = _rows_of_before(_last_keys(state.cache), *self._left[state.cache])  # held, so not empty
        if of_before is not None:
            for segment, rows in held.items():
                names = [
                    name for name in ("later", "original", "valid", "moved") if isinstance(getattr(rows, name), Tensor)
                ]
                held[segment] = replace(rows, **{name: getattr(rows, name)[of_before] for name in names})
        gone = {rows.valid.shape[1] - state.cache.get_seq_length(segment) for segment, rows in held.items()}
        seen = max(rows.seen for rows in held.values())
        if 0 not in held and not state.whole:
            gone.add(seen - state.past)
        count = gone.pop()
        if gone or count <= 0:
            return held  # as it was, or cropped in a way that _note_cache will name
        last = torch.arange(seen - count, seen, device=state.real.device)
        if not all((rows.original[:, -count:] == last).all() & rows.valid[:, -count:].all() for rows in held.values()):
            return held
        for segment, rows in held.items():
            cut = {name: getattr(rows, name)[:, :-count] for name in ("later", "original", "valid")}
            held[segment] = replace(rows, seen=rows.seen - count, **cut)
        return held

    def _with_whole_masks(self, state: _Pass, inputs: dict, seen: int) -> dict:
        """``inputs`` with masks as if the cache held every token it was shown.

        Models with several kinds of layers take each kind's mask sizes from its first layer, compressed or not.
        """
        state.past, state.seen, state.whole = seen, seen, True
        like = torch.empty(*state.real.shape, 1, dtype=self.parts.decoder.dtype, device=state.real.device)
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

    def _with_positions(self, inputs: dict, seen: int, state: _Pass) -> dict:
        new, position_ids = state.real.shape[1], inputs.get("position_ids")
        if position_ids is None:
            if hasattr(self.parts.base, "rope_deltas"):
                raise UnsupportedModel("with a plan at layer 0, pass the position_ids of the new tokens with the cache")
            position_ids = torch.arange(seen, seen + new, device=state.real.device)[None]
        first = self._caches.get(state.cache, {}).get(0)
        return {**inputs, "position_ids": position_ids - (0 if first is None else first.moved)}

    # --- around the projector ---

    def _after_tower(self, name: str, module, args, output):
        self._now.tower[name] = (output[:, 0].clone() if name == "query" else output).detach()

    def _tower_probe(self, images: int, length: int) -> TowerProbe | None:
        if not self._towers:
            return None
        probe, self._now.tower = TowerProbe(**self._now.tower, length=length), {}
        given = probe.key.shape[:2]
        if given not in ((images, length), (images, length + 1)):
            raise UnsupportedModel(
                f"the vision tower made {given[0]} x {given[1]} tokens, but {images} x {length} reach the projector: "
                f"merged before it, they cannot be ranked by {self._vision}; use a compressor that needs no attention "
                "of the tower, such as downsample or kmeans"
            )
        return probe

    def _before_projector(self, module, args):
        hidden = args[0]
        if hidden.dim() != 3:
            raise UnsupportedModel(f"'vision' needs the projector to get (pictures, tokens, width), not {hidden.shape}")
        images, length, width = hidden.shape
        mask = torch.ones(images, length, dtype=torch.bool, device=hidden.device)
        positions = torch.arange(length, device=hidden.device)[None, :, None].expand(images, -1, -1)
        side = round(length**0.5)
        grid = torch.tensor((side, side) if side * side == length else (1, length), device=hidden.device)
        probe = self._tower_probe(images, length)
        tokens = VisualTokens(hidden, mask, positions, grid.expand(images, -1), module.training, probe)
        out, _ = _check(self._vision(tokens), tokens, f"compressor {self._vision} at 'vision'")
        if self._observe is not None:
            self._observe(VISION, tokens, out)
        self._now.kept = out, length
        return (out.hidden, *args[1:])

    def _after_projector(self, module, args, output):
        (out, length), self._now.kept = self._now.kept, None
        if output.shape[:2] != out.mask.shape:
            raise UnsupportedModel("'vision' needs a projector that maps token by token; use layer 0, behind it")
        if (output.isnan() & out.mask[..., None]).any():  # else taken for DROPPED
            raise FloatingPointError("the projector gave NaN; check its weights and the learning rate")
        # Padding goes to a row to spare.
        index = out.anchor.masked_fill(~out.mask, length)[..., None].expand_as(output)
        rows = output.new_full((output.shape[0], length + 1, output.shape[2]), DROPPED)
        return rows.scatter(1, index, output)[:, :length]

    # --- around the decoder ---

    @_plain
    def _before_decoder(self, module, args, kwargs):
        given, now = kwargs.get("inputs_embeds"), self._now
        like = now.labels if now.state is None else now.state.real
        self._enter("decoder", fits=given is not None and (like is None or given.shape[:2] == like.shape))
        state, first = self._now.state, min(self._steps, default=0)
        deepstack = kwargs.get("deepstack_visual_embeds")
        if state is None or deepstack is None or len(deepstack) <= first:
            return None
        # The model adds these to the visual tokens after each early layer; from layer ``first`` on we must.
        state.deepstack = dict(list(enumerate(deepstack))[first:])
        return args, {**kwargs, "deepstack_visual_embeds": deepstack[:first]}

    def _after_rotary(self, module, args, kwargs, output):
        if self._now.state is not None:
            self._now.state.rotary.append((args, kwargs, output))

    @_plain
    def _after_decoder(self, module, args, output):
        state = self._now.state
        if state is not None and state.cache is not None and state.cached:
            self._caches.setdefault(state.cache, {}).update(state.cached)
            if (keys := _last_keys(state.cache)) is not None:
                self._left[state.cache] = weakref.ref(keys), keys[:, 0, :, 0].clone()
        rows = state.rows if state is not None else None
        hidden = last = output[0]
        if rows is None and self._now.labelled is None:
            return None
        back = None if rows is None else _rows_of_inputs(rows, state.real.shape)
        if self._now.labelled is not None:
            row, column = self._now.labelled
            picked = hidden[row, column if back is None else back[row, column]]
            hidden = torch.cat([picked, picked.new_zeros(1, picked.shape[-1])])[None]
        else:
            hidden = hidden.gather(1, back[..., None].expand(-1, -1, hidden.shape[-1]))

        def ends(states) -> bool:  # the hidden states of all layers, whose last entry is the one given back
            return isinstance(states, tuple) and len(states) > 0 and states[-1] is last

        if isinstance(output, tuple):
            return (hidden, *((*part[:-1], hidden) if ends(part) else part for part in output[1:]))
        output.last_hidden_state = hidden
        if ends(output.get("hidden_states")):
            output.hidden_states = (*output.hidden_states[:-1], hidden)
        return output

    # --- at a decoder layer ---

    @_plain
    def _before_layer(self, number: int, segment: int | None, module, args, kwargs):
        """The pre-forward hook of layer ``number``, whose rows the compressors at layer ``segment`` made."""
        state = self._now.state
        if state is None:
            return None
        kwargs = dict(kwargs)
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        state.cache = kwargs.get("past_key_values")
        stock_rotary, stock_mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
        if state.rows is not None and number - 1 in state.rows.deepstack:
            hidden = _add_deepstack(hidden, state.rows, number - 1)
        if number in self._steps:
            if state.has_pictures:
                for compressor in self._steps[number]:
                    at = LayerInput(module, hidden, self._rotary(stock_rotary, state))
                    hidden = self._shrink(compressor, number, at, state)
            if state.cache is not None:
                self._note_cache(number, state)
        if state.rows is not None:
            kwargs["position_embeddings"] = self._rotary(stock_rotary, state)
            kwargs["position_ids"] = None  # the attention code takes gaps in them for packed sequences
        if state.rows is not None or segment in state.cached:
            kwargs["attention_mask"] = self._mask(stock_mask, segment, number, state)
        if number in self._captured:
            state.previous = LayerInput(module, hidden, kwargs.get("position_embeddings"))
        return (hidden, *args[1:]), kwargs

    def _shrink(self, compressor: Compressor, number: int, at: LayerInput, state: _Pass) -> Tensor:
        """hidden (B, T, C) -> (B, T', C) after ``compressor``; state.rows then describes the new rows."""
        rows = state.rows or self._first_rows(state)
        batch, length, width = at.hidden.shape
        if compressor.over_clips and rows.pictures.has_clips:
            deepstack = {layer: rows.pictures.merge(features) for layer, features in rows.deepstack.items()}
            rows = replace(rows, pictures=rows.pictures.by_clip(), deepstack=deepstack)
        pictures, flat = rows.pictures, at.hidden.reshape(batch * length, width)
        positions = rows.positions.reshape(batch * length, -1)
        tokens = VisualTokens(
            flat[pictures.rows],
            pictures.mask,
            positions[pictures.rows],
            pictures.grid,
            self.parts.decoder.training,
            self._probe(at, rows, state),
            pictures.frames,
        )
        out, whole = _check(compressor(tokens), tokens, f"compressor {compressor} at layer {number}")
        if self._observe is not None and number in self.plan and compressor is not self._drop_marked:
            self._observe(number, tokens, out)

        # The token that an anchor stands for is the only visual token that stays. Padding goes to a row to spare.
        anchor_rows = pictures.rows.gather(1, out.anchor)  # (I, M) flat
        keep = torch.nn.functional.pad(rows.valid.reshape(-1), (0, 1))
        keep = keep.index_fill(0, pictures.rows.where(pictures.mask, batch * length).view(-1), False)
        keep = keep.index_fill(0, anchor_rows.where(out.mask, batch * length).view(-1), True)
        keep = keep[:-1].view(batch, length)

        count = keep.sum(1)
        new_length = int(count.max())
        take = torch.argsort(~keep, dim=1, stable=True)[:, :new_length]  # kept columns first, in their order
        valid = torch.arange(new_length, device=keep.device) < count[:, None]
        take = torch.where(valid, take, take[:, :1])
        start = torch.arange(batch, device=keep.device)[:, None]
        source = (take + start * length).view(-1)
        target = (keep.cumsum(1) - 1 + start * new_length).view(-1)[anchor_rows]  # (I, M) flat, new rows

        out_positions = out.positions if out.positions is not None else positions[anchor_rows]

        def real(values: Tensor) -> Tensor:  # without padding; where there is none, without asking the device
            return values.flatten(0, 1) if whole else values[out.mask]

        new = flat.index_select(0, source).index_copy(0, real(target), real(out.hidden))
        new_positions = positions.index_select(0, source).index_copy(0, real(target), real(out_positions))
        if compressor.contiguous:
            gone = (rows.valid & ~keep).cumsum(1)
            state.moved = state.moved + gone[:, -1:]
            new_positions = new_positions - gone.gather(1, take).view(-1, 1)
        later = rows.later.gather(1, take)
        if number == 0:  # later stock masks have the columns that are left here
            later = _columns(new_length, state)
        left = out.mask.sum(1)
        grid = out.grid if out.grid is not None else torch.stack([torch.ones_like(left), left], dim=1)
        state.rows = _Rows(
            rows.index.gather(1, take),
            later,
            valid,
            new_positions.view(batch, new_length, -1),
            Pictures(
                target,
                out.mask,
                grid,
                pictures.clip,
                torch.ones_like(left) if out.frames is None else out.frames,
                pictures.has_clips,
            ),
            {layer: _merge_like(out, features, pictures.mask) for layer, features in rows.deepstack.items()},
        )
        return new.view(batch, new_length, width)

    def _first_rows(self, state: _Pass) -> _Rows:
        batch, length = state.real.shape
        index = _columns(length, state)
        position_ids = _position_ids(*state.rotary[0][:2])
        if position_ids.dim() == 2:
            if self._flat and state.unmasked and bool((position_ids.diff(dim=1) < 0).any()):
                raise UnsupportedModel(
                    "flash attention tells packed samples apart by position_ids, which have gaps under compress(); use "
                    "sdpa or eager attention, or one sample a row"
                )
            positions = position_ids.expand(batch, -1)[..., None]
        else:  # (A, B, T)
            positions = position_ids.expand(-1, batch, -1).permute(1, 2, 0)
        pictures = find_pictures(self.parts.base, state.by_kind, state.encoded, positions)
        rows = _Rows(index, index, state.real, positions, pictures)
        for layer, features in state.deepstack.items():
            rows.deepstack[layer] = features.new_zeros(*pictures.mask.shape, features.shape[-1])
            rows.deepstack[layer][pictures.mask] = features
        return rows

    def _probe(self, at: LayerInput, rows: _Rows, state: _Pass) -> LayerProbe:
        answers = labelled = None
        if self._now.labels is not None:
            labelled = torch.nn.functional.pad(self._now.labels != IGNORED, (0, 1), value=False)
            answers = (labelled[:, 1:] & ~labelled[:, :-1]).gather(1, rows.index)
            labelled = labelled[:, :-1].gather(1, rows.index)
        pictures, positions = rows.pictures, _position_ids(*state.rotary[0][:2])
        if positions.dim() > 2:  # (A, B, T): of tokens with three, the first, time, never falls
            positions = positions[0]
        sample = torch.nn.functional.pad((positions.diff(dim=1) < 0).long().cumsum(1), (1, 0))  # where they restart
        sample = sample.expand(len(rows.index), -1).gather(1, rows.index)
        valid = rows.valid
        if self._now.prompt is not None:
            valid = valid & (rows.index + state.seen < self._now.prompt)
        return LayerProbe(at, state.previous, valid, pictures.rows, pictures.mask, sample, answers, labelled)

    def _note_cache(self, segment: int, state: _Pass) -> None:
        """Describe the rows of the cache that layers from ``segment`` on will hold after this pass."""
        length = state.real.shape[1]
        past = self._caches.get(state.cache, {}).get(segment)
        held, expected = state.cache.get_seq_length(segment), state.past if past is None else past.valid.shape[1]
        if held != expected:
            raise UnsupportedModel(
                f"the cache holds {held} tokens at layer {segment}, not the {expected} that compress left there; "
                "one that was cropped, copied, or filled under another compress() cannot be continued"
            )
        if past is None and state.rows is None:
            return
        if past is None:  # so far the cache holds every token
            before = _columns(state.past, state)
            past = _CachedRows(before, before, torch.ones_like(before, dtype=torch.bool), state.past)
        rows = state.rows
        index = later = _columns(length, state)
        valid = state.real
        if rows is not None:
            index, later, valid = rows.index, rows.later, rows.valid
        state.cached[segment] = _CachedRows(
            torch.cat([past.later, later + state.past], dim=1),
            torch.cat([past.original, index + past.seen], dim=1),
            torch.cat([past.valid, valid], dim=1),
            past.seen + length,
            past.moved + state.moved,
        )

    def _mask(self, mask, segment: int, number: int, state: _Pass):
        """The stock attention ``mask`` of layer ``number`` for its rows and cached rows; see look_up_mask."""
        if (segment, id(mask)) not in state.masks:
            rows = state.rows
            past = self._caches.get(state.cache, {}).get(segment) if state.cache is not None else None
            query = _columns(state.real.shape[1], state) if rows is None else rows.index
            valid = torch.ones_like(query, dtype=torch.bool) if rows is None else rows.valid
            before = _columns(state.past, state)
            if past is not None:
                before = past.original if state.whole else past.later
            before_valid = torch.ones_like(before, dtype=torch.bool) if past is None else past.valid
            key = torch.cat([before, query + state.past], dim=1)
            key_valid = torch.cat([before_valid, valid], dim=1)
            key, key_valid, first = _sliding_cache(state.cache, number, mask, key, key_valid, valid.shape[1], state)
            offset = state.past - first
            state.masks[segment, id(mask)] = look_up_mask(mask, query, key - first, key_valid, offset, self._flat)
        return state.masks[segment, id(mask)]

    @property
    def _flat(self) -> bool:
        """Whether the attention backend takes masks as (B, S) only."""
        return "flash" in (self.parts.decoder.config._attn_implementation or "")

    def _rotary(self, stock, state: _Pass):
        """The rotary embeddings of the present rows in place of the model's."""
        rows = state.rows
        if rows is None:
            return stock
        if id(stock) not in rows.rotary:
            call = next((call for call in state.rotary if call[2] is stock), None)
            if call is None:
                raise UnsupportedModel("a decoder layer got rotary embeddings that its rotary_emb did not make")
            args, kwargs, _ = call
            positions = rows.positions.permute(2, 0, 1)
            like = _position_ids(args, kwargs)
            args, kwargs = _with_position_ids(args, kwargs, positions if like.dim() == 3 else positions[0])
            rows.rotary[id(stock)] = self.parts.rotary.forward(*args, **kwargs)
        return rows.rotary[id(stock)]


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


class LabelledLogits(Tensor):
    """Logits of the labelled rows alone. Used as if they were all, the error gets a note that says what to do."""

    NOTE = (
        "under compress(), a model in training gives the logits of the labelled tokens alone, (1, M + 1, vocabulary); "
        "compress(..., labelled_only=False) gives one row per input token, which metrics on logits need"
    )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        try:
            return super().__torch_function__(func, types, args, kwargs or {})
        except (RuntimeError, IndexError, ValueError) as error:
            error.add_note(cls.NOTE)
            raise


@_plain
def _marked(output):
    """``output`` of the top model with its logits as LabelledLogits."""
    if isinstance(output, tuple):  # of loss, logits, ...
        return (output[0], output[1].as_subclass(LabelledLogits), *output[2:])
    output.logits = output.logits.as_subclass(LabelledLogits)
    return output


def _whole_prefill(stock, input_ids, generation_config, *args, **kwargs):
    """``generate``'s first pass, refused in chunks: a compressor must see a picture, and its question, whole."""
    if generation_config.prefill_chunk_size is not None:
        raise UnsupportedModel("a prompt under compress() cannot be split into chunks; leave prefill_chunk_size out")
    return stock(input_ids, generation_config, *args, **kwargs)


def _columns(count: int, state: _Pass) -> Tensor:
    """(B, count) 0, 1, 2, ... in every row."""
    return torch.arange(count, device=state.real.device).expand(state.real.shape[0], -1)


def _position_ids(args: tuple, kwargs: dict) -> Tensor:
    return kwargs["position_ids"] if "position_ids" in kwargs else args[1]


def _with_position_ids(args: tuple, kwargs: dict, positions: Tensor) -> tuple[tuple, dict]:
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": positions}
    return (args[0], positions, *args[2:]), kwargs


def _check(out: CompressedTokens, tokens: VisualTokens, where: str) -> tuple[CompressedTokens, bool]:
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
        ((anchor.diff(dim=1) > 0) | ~out.mask[:, 1:]).all() & (tokens.mask.gather(1, anchor) | ~out.mask).all(),
        (torch.isfinite(out.hidden) | ~out.mask[..., None]).all(),
        out.mask.all(),
    )
    some_left, sound, finite, whole = torch.stack(found).tolist()  # the host waits for the device once
    if not some_left:
        raise ValueError(f"{where} left an image with no token; every image must keep at least one")
    if not sound:
        raise ValueError(f"{where} returned anchors that do not rise, or that stand at padding")
    if not finite:
        raise FloatingPointError(f"{where} returned NaN or infinite values; check the compressor and the learning rate")
    return replace(out, anchor=anchor), whole


def _merge_like(out: CompressedTokens, features: Tensor, mask: Tensor) -> Tensor:
    """features (I, L, C) of the tokens before a compressor -> (I, M, C), merged or dropped as the tokens were."""
    if out.group is None:
        return features.gather(1, out.anchor[..., None].expand(-1, -1, features.shape[-1]))
    windows = out.mask.shape[1]
    group = out.group.masked_fill(~mask, windows)
    total, count = (sum_groups(values.float(), group, windows) for values in (features, mask[..., None]))
    return (total / count.clamp(min=1)).to(features.dtype)


def _add_deepstack(hidden: Tensor, rows: _Rows, layer: int) -> Tensor:
    """hidden (B, T, C) plus the features that the model adds to its visual tokens after ``layer``."""
    pictures, features = rows.pictures, rows.deepstack[layer].to(hidden.dtype)
    flat = hidden.reshape(-1, hidden.shape[-1])
    return flat.index_add(0, pictures.rows[pictures.mask], features[pictures.mask]).view_as(hidden)


def _rows_of_inputs(rows: _Rows, shape: tuple[int, int]) -> Tensor:
    """(B, T) for each input token the row that answers for it: the last remaining token at or before it."""
    batch, length = shape
    remaining = torch.zeros(batch, length + 1, dtype=torch.long, device=rows.index.device)
    remaining.scatter_(1, torch.where(rows.valid, rows.index, length), 1)
    return (remaining[:, :length].cumsum(1) - 1).clamp(min=0)


def _sliding_cache(cache, number: int, mask, key: Tensor, key_valid: Tensor, new: int, state: _Pass):
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
