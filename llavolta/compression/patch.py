"""``compress``: fewer visual tokens inside a stock Hugging Face vision-language model, by hooks.

What happens in one forward pass, with a compressor at the input of decoder layer K:

1. The hook on the base model encodes the images (``generate`` does this too) and notes which tokens
   are visual.
2. The hook on layer K passes the hidden states of each image to the compressor. It rebuilds the
   sequence from the text tokens, which do not change, and the compressor's output. Padding is
   removed, and shorter batch rows are padded at the end.
3. The hooks on layers K, K + 1, ... replace the attention mask and the rotary embeddings by those
   of the shorter sequence. The mask is looked up in the stock mask at the remaining tokens, so any
   pattern is preserved (causal, sliding window, padding, cache). Text tokens keep their positions,
   unless a compressor at layer 0 or "vision" closes gaps.
4. The hook on the decoder's output restores one row per input token, so that the head, the loss and
   ``generate`` get the shape that they expect. In training with labels it returns only the rows
   that predict a label (see ``compress``).

The plan's "vision" entry works at the projector. The hook before it compresses each image. The hook
after it writes the remaining tokens to the places of their anchors and fills the others with NaN.
Layer 0 removes the NaN tokens. Compressors that need "tower" read the queries and keys of the
vision tower, which hooks on its projections record.

Two methods are replaced as well, ``generate`` and ``_prefill``; see ``generation``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from llavolta.compression import labelled
from llavolta.compression.cache import CacheBook
from llavolta.compression.compressors import CompressedTokens, Compressor, VisualTokens
from llavolta.compression.compressors.base import check_output
from llavolta.compression.compressors.prefix import Prefixed
from llavolta.compression.families import (
    PIXELS,
    encode_pictures,
    find_parts,
    has_3d_positions,
    holds_state,
    is_compiled,
    pools_frames,
    visual_tokens,
)
from llavolta.compression.generation import WatchedGeneration
from llavolta.compression.plan import (
    VISION,
    Layer,
    Plan,
    PlanError,
    check_layers,
    format_plan,
    parse_plan,
)
from llavolta.compression.probe import LayerInput
from llavolta.compression.state import Now, Pass
from llavolta.compression.vision import BLENDED, DropMarked, TowerWatch, VisionStep
from llavolta.errors import UnsupportedModel

Observer = Callable[[Layer, VisualTokens, CompressedTokens], None]

# Decoders of the models that are being compressed.
_active: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# The decorated hooks depend on data, so the graph of torch.compile would break in them anyway.
_plain = torch.compiler.disable


def compress(
    model: nn.Module,
    plan: str | Mapping[Layer, Compressor] | None,
    *,
    labelled_only: bool | None = None,
    prefix: nn.Module | None = None,
    observe: Observer | None = None,
) -> Compression:
    """Compress the visual tokens of a model, until the handle is removed or its block ends.

    The loss is that of the same labelled tokens as without compression. ``logits`` have one row per
    input token: a token that was merged or dropped has the row of the last remaining token at or
    before it. In training with labels, ``logits`` are (1, M + 1, vocabulary) instead: the rows that
    predict the M labelled tokens of the batch, in order, and an extra one. The loss and all
    gradients are the same, at a fraction of the memory.

    With ``output_hidden_states`` the last entry has the rows that ``logits`` have. The other
    entries and ``attentions`` have the rows that their layer processed. A plan with "vision" leaves
    NaN in ``image_hidden_states``, at tokens that no longer exist.

    torch.compile: pass the compiled model, not the one inside it. It is compiled again when
    compression starts and when it ends, and the graph breaks where a compressor works.

    Args:
        model: A supported vision-language model, also inside DDP or PEFT.
        plan: ``{layer: compressor}`` or its text, such as ``"2:avgpool:8"``. "none" leaves the
            model as it is.
        labelled_only: Whether ``logits`` have only the rows of labelled tokens in training. False
            is for trainers that compute metrics from logits. True applies also to a plan that
            removes nothing, which otherwise leaves the model untouched. None: True if the plan
            removes tokens.
        prefix: A module that returns, for I images, embeddings (I, P, C) to place before each of
            them in the decoder. They replace tokens that the plan drops at "vision" or layer 0.
            Later compressors count them among the visual tokens.
        observe: Called as ``observe(layer, tokens, compressed)`` after each compressor, with the
            layer as in the plan, layer by layer, in every pass with images. Under gradient
            checkpointing, too, it is called once a pass. Entries that remove nothing are not
            observed. The tensors are those that the model continues with, so they must not be
            changed. An error ends the pass.

    Returns:
        The handle, a context manager with ``remove()``.

    Raises:
        PlanError: The plan cannot be read or does not fit the model.
        UnsupportedModel: The model has no visual tokens, or cannot do what the plan needs.
        RuntimeError: The model is being compressed already.
    """
    return Compression(model, plan, labelled_only, prefix, observe)


class Compression:
    """The handle that ``compress`` returns.

    Attributes:
        plan: The parsed plan.
        parts: The parts of the model.
        labelled_only: Whether logits have only the rows of labelled tokens in training.
    """

    def __init__(
        self, model: nn.Module, plan, labelled_only: bool | None, prefix: nn.Module | None, observe
    ):
        self.parts = find_parts(model)
        self._compiled = is_compiled(model)
        self.plan: Plan = check_layers(parse_plan(plan), len(self.parts.layers))
        written = format_plan(self.plan)
        # Entries that remove nothing are left out, so that they cannot change a single bit.
        working = {layer: c for layer, c in self.plan.items() if not c.is_identity}
        before = working.pop(VISION, None)
        self._vision = None if before is None else VisionStep(before, self.parts, written, observe)
        self._steps: dict[int, list[Compressor]] = {layer: [c] for layer, c in working.items()}
        self._tower = (
            TowerWatch(working[0], self.parts)
            if 0 in working and "tower" in working[0].needs
            else None
        )
        if before is not None:  # layer 0 first removes what was dropped before the projector
            self._steps[0] = [DropMarked(before.contiguous), *self._steps.get(0, [])]
        if self._steps and (state := holds_state(self.parts)):
            raise UnsupportedModel(
                f"{type(self.parts.base).__name__} has decoder layers of type {state}, which hold "
                "a running state in place of keys and values; only models whose decoder layers are "
                "all attention over a key-value cache can be compressed"
            )
        if has_3d_positions(self.parts):
            self._check_3d(prefix)
        if prefix is not None:
            if 0 not in self._steps:
                raise PlanError(
                    f"plan {written!r} makes no room for a prefix at 'vision' or layer 0"
                )
            # The last step at layer 0 adds the prefix to its output.
            self._steps[0][-1] = Prefixed(self._steps[0][-1], prefix)
        self._captured = {layer - 1 for layer, c in working.items() if "previous_layer" in c.needs}
        self._keeps_start = any("start" in c.needs for c in working.values())
        self._observe, self._observed = observe, set(working)
        self.labelled_only = labelled_only if labelled_only is not None else bool(self._steps)
        self._now = Now()
        self._book = CacheBook(self.parts)
        self._hooks: list = []
        if self.parts.decoder in _active:
            raise RuntimeError(
                "this model is being compressed already; remove() the first handle or leave its "
                "block"
            )
        if self._steps or self.labelled_only:
            try:
                self._install()
            except BaseException:  # also Ctrl-C, with some hooks on the model
                self.remove()
                raise

    def _check_3d(self, prefix: nn.Module | None) -> None:
        """Raise UnsupportedModel for a prefix and for closed gaps, which M-RoPE cannot have."""
        name = type(self.parts.base).__name__
        if prefix is not None:
            raise UnsupportedModel(
                f"{name} has 3-D positions, in which tokens of another kind before an image have "
                "no place: it cannot be compressed with a prefix (DualSpeed's mode isolator)"
            )
        for layer, compressor in self.plan.items():
            if getattr(compressor, "positions", None) == "contiguous":
                raise UnsupportedModel(
                    f"{name} has 3-D positions, of which an image takes as many as its longer "
                    "side, however many tokens are left of it, so nothing can close up; write "
                    f"positions=original for {compressor.name} at {layer}"
                )

    def __repr__(self) -> str:
        return f"compress({format_plan(self.plan)!r}{'' if self._hooks else ', not in force'})"

    def __reduce__(self):
        raise UnsupportedModel(
            "a model under compress() cannot be copied or pickled; remove() the handle first"
        )

    def __enter__(self) -> Compression:
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove every hook from the model. Calling it again does nothing."""
        for hook in self._hooks:
            hook.remove()
        if self._hooks and self._compiled:
            torch.compiler.reset()
        self._hooks.clear()
        _active.discard(self.parts.decoder)

    def _install(self) -> None:
        """Register the hooks."""
        parts, add = self.parts, self._hooks.append
        _active.add(parts.decoder)
        if self._compiled:
            torch.compiler.reset()  # compiled code does not notice that hooks come or go
        if parts.top is not None:
            add(parts.top.register_forward_pre_hook(self._before_top, with_kwargs=True))
            add(
                parts.top.register_forward_hook(self._after_top, with_kwargs=True, always_call=True)
            )
        add(parts.base.register_forward_pre_hook(self._before_base, with_kwargs=True))
        add(parts.decoder.register_forward_pre_hook(self._before_decoder, with_kwargs=True))
        add(parts.decoder.register_forward_hook(self._after_decoder))
        if not self._steps:  # only ``labelled_only``, which needs no more hooks
            return
        if hasattr(parts.top, "_prefill"):
            add(WatchedGeneration(parts.top, self._now))
        add(parts.base.register_forward_hook(self._after_base, always_call=True))
        add(parts.rotary.register_forward_hook(self._after_rotary, with_kwargs=True))
        # Layers before the first one that is compressed or recorded stay without a hook.
        first = 0 if self._keeps_start else min(self._steps.keys() | self._captured)
        for number in range(first, len(parts.layers)):
            segment = max((layer for layer in self._steps if layer <= number), default=None)
            hook = partial(self._before_layer, number, segment)
            add(parts.layers[number].register_forward_pre_hook(hook, with_kwargs=True))
        if self._tower is not None:
            self._tower.hooks(add)
        if self._vision is not None:
            self._vision.hooks(add)
            add(parts.projector.register_forward_pre_hook(self._before_projector))
            add(parts.projector.register_forward_hook(self._after_projector))

    @_plain
    def _before_top(self, module, args, kwargs):
        """Start a pass, and shorten the labels to those of the rows that the head will get."""
        self._now.forget()
        self._now.due = ("base", "decoder")
        self._now.labels = labels = kwargs.get("labels")
        if (
            labels is None
            or not self.labelled_only
            or not module.training
            or kwargs.get("shift_labels") is not None
        ):
            return None
        self._now.labelled, short = labelled.shorten_labels(labels)
        return args, {**kwargs, "labels": short}

    def _after_top(self, module=None, args=None, kwargs=None, output=None):
        """End a pass, and mark its logits if they are those of labelled tokens only."""
        rows, self._now.labelled, self._now.labels = self._now.labelled, None, None
        return None if rows is None or output is None else labelled.mark_logits(output)

    @_plain
    def _before_base(self, module, args, kwargs):
        """Encode the images and create the state of the pass."""
        self._now.enter("base")
        if not self._steps:
            return None
        inputs = encode_pictures(self.parts.base, args, kwargs)
        # On the CPU, for the many small steps of find_pictures.
        by_kind = {kind: where.cpu() for kind, where in visual_tokens(self.parts, inputs).items()}
        if self._vision is not None and "video" in by_kind and pools_frames(self.parts.base):
            raise UnsupportedModel(BLENDED)
        self._now.state = state = Pass.of_inputs(inputs, by_kind)
        return (), inputs if state.cache is None else self._book.begin(state, inputs)

    def _after_base(self, module, args, output):
        self._now.state = None

    def _before_projector(self, module, args):
        return (self._vision.shorten(args[0], module.training), *args[1:])

    def _after_projector(self, module, args, output):
        return self._vision.spread(output)

    @_plain
    def _before_decoder(self, module, args, kwargs):
        """Note that a pass reaches the decoder, and take over deep-stack features."""
        given, now = kwargs.get("inputs_embeds"), self._now
        like = now.labels if now.state is None else now.state.real
        self._now.enter(
            "decoder", fits=given is not None and (like is None or given.shape[:2] == like.shape)
        )
        state, first = self._now.state, min(self._steps, default=0)
        deepstack = kwargs.get("deepstack_visual_embeds")
        if state is None or deepstack is None or len(deepstack) <= first:
            return None
        # The model adds one of these to the visual tokens after each early layer. From the first
        # compressed layer on they do not fit, so Rows.add_deepstack adds merged ones.
        state.deepstack = dict(list(enumerate(deepstack))[first:])
        return args, {**kwargs, "deepstack_visual_embeds": deepstack[:first]}

    def _after_rotary(self, module, args, kwargs, output):
        """Record the call, which Pass.rotary_of_rows repeats with other positions."""
        if self._now.state is not None:
            self._now.state.rotary.append((args, kwargs, output))

    @_plain
    def _after_decoder(self, module, args, output):
        """Save the state of the cache, and give the output the rows that its caller expects."""
        now, state = self._now, self._now.state
        if state is not None:
            self._book.close(state)
        rows = state.rows if state is not None else None
        if rows is None and now.labelled is None:
            return None
        back = None if rows is None else rows.answering(state.real.shape[1])
        return labelled.give_back(output, back, now.labelled)

    @_plain
    def _before_layer(self, number: int, segment: int | None, module, args, kwargs):
        """Prepare the inputs of a layer, and run its compressors.

        Args:
            number: The layer.
            segment: The last layer of the plan at or before it, which made its rows; or None.
            module: The layer's module.
            args: Its positional arguments.
            kwargs: Its keyword arguments.

        Returns:
            The arguments with the hidden states (B, T', C) of the present rows, and the mask,
            positions and rotary embeddings that fit them.
        """
        state = self._now.state
        if state is None:
            return None
        kwargs = dict(kwargs)
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        state.cache = kwargs.get("past_key_values")
        stock_rotary, stock_mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")
        if state.rows is not None:
            hidden = state.rows.add_deepstack(hidden, number - 1)
        if number in self._steps:
            if state.has_pictures:
                for compressor in self._steps[number]:
                    at = LayerInput(
                        module, hidden, state.rotary_of_rows(stock_rotary, self.parts.rotary)
                    )
                    hidden = self._shrink(compressor, number, at, state)
            if state.cache is not None:
                self._book.note(number, state)
        if state.rows is not None:
            kwargs["position_embeddings"] = state.rotary_of_rows(stock_rotary, self.parts.rotary)
            kwargs["position_ids"] = None  # attention code may read gaps in them as packed samples
        if state.rows is not None or segment in state.cached:
            kwargs["attention_mask"] = self._book.mask(
                stock_mask, segment, number, state, hidden.dtype
            )
        if number == 0 and self._keeps_start and state.has_pictures:
            at = LayerInput(module, hidden, kwargs.get("position_embeddings"))
            state.start = at, state.rows or state.first_rows(self.parts)
        if number in self._captured:
            state.previous = LayerInput(module, hidden, kwargs.get("position_embeddings"))
        return (hidden, *args[1:]), kwargs

    def _shrink(self, compressor: Compressor, number: int, at: LayerInput, state: Pass) -> Tensor:
        """Run a compressor at a layer; ``state.rows`` then describes the new rows.

        Returns:
            The hidden states: (B, T, C) of ``at`` -> (B, T', C).
        """
        rows = state.rows or state.first_rows(self.parts)
        if compressor.over_clips and rows.pictures.has_clips:
            rows = rows.by_clip()
        decoder = self.parts.decoder
        probe = self._now.probe(at, rows, getattr(decoder, "norm", None))
        if "tower" in compressor.needs:
            kinds = [state.by_kind[kind] for kind in PIXELS if kind in state.by_kind]
            features = [output.pooler_output for output in state.encoded.values()]
            at_rows = dict(
                spread=rows.pictures.mask, rows=rows.pictures.rows, image_sizes=state.image_sizes
            )
            # In ``generate``, image sizes come from its own call, and beams repeat batch rows.
            if self._now.rows is not None:
                at_rows["image_sizes"] = self._now.image_sizes
                at_rows["times"] = len(state.real) // self._now.rows
            probe.tower = self._tower.probe(features, kinds=kinds, **at_rows)
        if "start" in compressor.needs:
            first, start = state.start or (at, rows)  # this is layer 0
            probe.start = start.tokens(
                first.hidden, decoder.training, self._now.probe(first, start, probe.norm)
            )
        tokens = rows.tokens(at.hidden, decoder.training, probe)
        where = f"compressor {compressor} at layer {number}"
        out, whole = check_output(compressor(tokens), tokens, where, compressor.may_empty)
        if compressor.may_empty and not bool(rows.text().any(1).all()):
            raise UnsupportedModel(
                f"{where} would leave a row of pictures alone without any token; put text beside it"
            )
        if (
            self._observe is not None
            and number in self._observed
            and not isinstance(compressor, DropMarked)
        ):
            self._observe(number, tokens, out)
        # After layer 0, earlier layers have rotated keys by the original positions, so gaps stay.
        contiguous = compressor.contiguous and number == 0
        hidden, state.rows, moved = rows.compressed(at.hidden, out, whole, number == 0, contiguous)
        state.moved = state.moved + moved
        return hidden
