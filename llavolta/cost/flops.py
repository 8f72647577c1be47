"""What training and inference cost, from a model's configuration alone: floating-point operations and memory by part.

A multiply-add counts as two operations, and attention as if it looked at every pair of tokens, which is how
``torch.utils.flop_counter`` counts. The matrix products of the compressors themselves are counted, too; see products.
Norms, activations and the optimizer are left out: they are below 1%.

The decoder is counted in closed form, as its length changes with the plan. Vision towers and projectors differ too much
between families for that: they are run once, with torch's own counter on and every matrix product replaced by zeros of
its shape, so that a tower of any size takes a moment and no memory.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from llavolta.compression.families import encode_pictures, find_parts, tower_attentions
from llavolta.compression.plan import VISION, Plan, parse_plan, tokens_per_layer
from llavolta.cost.products import Seen, count_products
from llavolta.errors import UnsupportedModel
from llavolta.train.schemes import Stage

PHASES = ("instruct", "align", "forward")
PARTS = ("tower", "projector", "linear", "attention", "compressor", "head")
TOWER_INPUTS = ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes")
TOWER_INPUTS += ("pixel_values_videos", "video_grid_thw")


@dataclass(frozen=True)
class Passes:
    """FLOPs of the forward pass, of the backward pass, and of what checkpointing computes a second time."""

    forward: float
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.recomputed


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one training step of one example. linear, attention: of the decoder's layers. head: of the logits.
    compressor: the matrix products of the plan's compressors themselves."""

    tower: Passes
    projector: Passes
    linear: Passes
    attention: Passes
    head: Passes
    compressor: Passes = Passes(0.0)

    @property
    def total(self) -> float:
        return sum(getattr(self, part).total for part in PARTS)


@dataclass(frozen=True)
class LayerSizes:
    """One decoder layer. linear: weights of its linear maps; sides: their widths in and out, summed; queries, keys: the
    width of all query heads, of all key heads; heads: query heads; inner: the width of the MLP."""

    linear: int
    sides: int
    queries: int
    keys: int
    heads: int
    inner: int


def step_cost(
    config, plan="none", text_tokens: float = 64, images: float = 1, **options
) -> StepCost:
    """The cost of one training step per example of the model that ``config`` describes: see CostModel.step."""
    return cost_model(config).step(plan, text_tokens, images, **options)


def cost_model(config) -> CostModel:
    """The CostModel of a Hugging Face config, the same one for equal configs."""
    return _cost_model(type(config), config.to_json_string(use_diff=False))


@lru_cache(32)
def _cost_model(kind: type, text: str) -> CostModel:
    return CostModel(kind.from_dict(json.loads(text)))


class CostModel:
    """What a model of a supported family costs, from its Hugging Face config. Raises UnsupportedModel.

    width: of the decoder. layers: its LayerSizes. parameters: how many "tower", "projector" and "decoder" (with
    embeddings and head) have.
    """

    def __init__(self, config):
        self.config = config
        try:
            with init_empty_weights(
                include_buffers=False
            ):  # shapes without memory; what buffers hold is needed
                # Eager attention consists of matrix products, which can be counted.
                self._model = AutoModelForImageTextToText.from_config(
                    config, attn_implementation="eager"
                )
        except ValueError as error:
            raise UnsupportedModel(
                f"no vision-language model for {type(config).__name__}: {error}"
            ) from None
        self._parts = parts = find_parts(self._model)
        text = config.get_text_config()
        self.width, heads = text.hidden_size, text.num_attention_heads
        self.layers = [_layer_sizes(layer, heads) for layer in parts.layers]
        head = self._model.get_output_embeddings().weight
        self._head = head.numel()
        self._encoded: dict[tuple, tuple[Passes, Passes, int, Seen]] = {}
        self._products: dict[tuple, tuple[int, int]] = {}
        joined = _projector(parts.base)
        projector = _count(joined) if joined is not None else 0
        decoder = _count(parts.decoder) + (0 if _is_inside(head, parts.decoder) else head.numel())
        tower = _count(self._model) - decoder - projector
        self.parameters = {"tower": tower, "projector": projector, "decoder": decoder}

    # --- floating-point operations ---

    def step(
        self,
        plan="none",
        text_tokens: float = 64,
        images: float = 1,
        labelled: float | None = None,
        phase: str = "instruct",
        *,
        visual: list[int] | None = None,
        pictures: dict | None = None,
        checkpointing: bool = False,
        train_tower: bool = False,
        lora_rank: int = 0,
    ) -> StepCost:
        """The cost of one training step per example.

        text_tokens, images: per example, may be means. labelled: rows whose logits are computed (default: a quarter of
        the text). phase: "instruct" trains projector and decoder (and the tower with ``train_tower``; adapters of
        ``lora_rank`` in place of the decoder's weights if above 0), "align" the projector alone (gradients still pass
        through the decoder), "forward" nothing. checkpointing: decoder layers are computed again in the backward pass.

        pictures: what the processor makes of one image (``pixel_values`` and so on); default: a square of the tower's
        size, but families that cut images into tiles or patches themselves need it. visual: the visual tokens of one
        image, a number for each part that no pooling window may leave (tiles, frames); default: all in one.
        """
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, not {phase!r}")
        trained = phase != "forward", phase == "instruct" and train_tower
        found = self._square(*trained) if pictures is None else self._encoder(pictures, *trained)
        tower, projector, tokens, seen = found
        plan, visual = parse_plan(plan), visual or [tokens]
        lengths = self.lengths(plan, text_tokens, images, visual)
        linear, attention = self.decoder(lengths, phase, checkpointing, lora_rank)
        rows = text_tokens / 4 if labelled is None else labelled
        reaching = images  # the projector works on what is left before it
        if VISION in plan and seen.projector:
            reaching *= plan[VISION].num_tokens(seen.projector[1]) / seen.projector[1]
        return StepCost(
            compressor=self._own(plan, text_tokens, images, visual, seen, trained),
            tower=Passes(images * tower.forward, images * tower.backward),
            projector=Passes(reaching * projector.forward, reaching * projector.backward),
            linear=linear,
            attention=attention,
            head=_passes(
                2 * self._head * rows, phase, trains=not lora_rank
            ),  # LoRA leaves the head as it is
        )

    def stage(
        self,
        stage: Stage,
        text_tokens: float = 64,
        images: float = 1,
        labelled: float | None = None,
        **options,
    ) -> list[tuple[float, StepCost]]:
        """(share of the steps, cost per example) of all that the steps of ``stage`` compute; options: of ``step``."""
        rows = text_tokens / 4 if labelled is None else labelled
        pictures = images * len(options.get("visual") or [0])
        return [
            (
                p.share,
                self.step(
                    p.plan, text_tokens + p.prefix * pictures, images, rows, **(options | phase)
                ),
            )
            for p in stage.passes
            for phase in [{} if p.trains else {"phase": "forward"}]
        ]

    def lengths(
        self,
        plan="none",
        text_tokens: float = 64,
        images: float = 1,
        visual: list[int] | None = None,
    ) -> list[float]:
        """Tokens of one example at each decoder layer; see ``step``."""
        counts = [
            tokens_per_layer(plan, len(self.layers), count) for count in visual or [self.visual]
        ]
        return [text_tokens + images * sum(pictures) for pictures in zip(*counts, strict=True)]

    def decoder(
        self,
        lengths: list[float],
        phase: str = "instruct",
        checkpointing: bool = False,
        lora_rank: int = 0,
    ) -> tuple[Passes, Passes]:
        """(linear, attention) of decoder layers that work on ``lengths`` tokens, a number a layer."""
        sized = list(zip(self.layers, lengths, strict=True))
        linear = sum(2 * layer.linear * length for layer, length in sized)
        attention = sum(4 * layer.queries * length**2 for layer, length in sized)
        again = checkpointing and phase != "forward"
        first = _passes(linear, phase, trains=not lora_rank)
        if phase == "instruct":
            adapters = sum(2 * lora_rank * layer.sides * length for layer, length in sized)
            first = Passes(linear + adapters, first.backward + 2 * adapters)
        second = Passes(attention, 0.0 if phase == "forward" else 2 * attention)
        return tuple(
            Passes(part.forward, part.backward, part.forward if again else 0.0)
            for part in (first, second)
        )

    def _own(
        self,
        plan: Plan,
        text_tokens: float,
        images: float,
        visual: list[int],
        seen: Seen,
        trained: tuple[bool, bool],
    ) -> Passes:
        """FLOPs of the compressors' own products; trained: the projector, the tower."""
        number, total = max(1, round(images)), [0.0, 0.0]
        counts = [tokens_per_layer(plan, len(self.layers), count) for count in visual]
        for layer, compressor in plan.items() if images else ():
            at = [each[layer - 1] for each in counts] if layer not in (VISION, 0) else visual
            if layer == 0 and VISION in plan:
                at = [plan[VISION].num_tokens(count) for count in visual]
            if layer == VISION:
                at = [seen.projector[1]] * seen.projector[0]
            if compressor.is_identity:
                continue
            words, trains = max(1, round(text_tokens)), trained[layer == VISION]
            at = [max(1, round(count)) for count in at]
            key = type(compressor), str(compressor), layer, *at, number, words, seen, trains
            if key not in self._products:
                given = compressor, layer, self._parts, at, number, words, seen, trains
                self._products[key] = count_products(*given, NoProducts)
            for place, flops in enumerate(self._products[key]):
                total[place] += flops * images / number
        return Passes(*total)

    def tokens_of(self, pictures: dict | None) -> int:
        """Visual tokens of what a processor made of one image; None: of a square of the tower's size."""
        return self.visual if pictures is None else self._encoder(pictures, False, False)[2]

    @property
    def visual(self) -> int:
        """Visual tokens of one image; for towers that take whole images of one size."""
        return self._square(False, False)[2]

    @lru_cache(8)  # noqa: B019  the models are cached themselves
    def _square(self, train_projector: bool, train_tower: bool) -> tuple[Passes, Passes, int, Seen]:
        vision = self.config.vision_config
        size = getattr(vision, "image_size", None)
        size = size[0] if isinstance(size, list | tuple) else size
        problem = f"{type(self.config).__name__} cuts its images into parts itself; give pictures"
        if not isinstance(size, int):
            raise UnsupportedModel(problem)
        square = {"pixel_values": torch.zeros(1, getattr(vision, "num_channels", 3), size, size)}
        try:
            return self._encoder(square, train_projector, train_tower)
        except (ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
            raise UnsupportedModel(f"{problem} ({type(error).__name__}: {error})") from None

    def _encoder(
        self, pictures: dict, train_projector: bool, train_tower: bool
    ) -> tuple[Passes, Passes, int, Seen]:
        """(tower, projector, visual tokens, shapes) of ``pictures``: counted once for each shape, and grid, of them."""
        key = (
            train_projector,
            train_tower,
            *((name, _shape(value)) for name, value in sorted(pictures.items())),
        )
        if key not in self._encoded:
            forward, inside, backward, tokens, seen = self._run(
                pictures, train_projector, train_tower
            )
            behind = backward
            if train_tower:  # then the projector passes a gradient on
                behind = self._run(pictures, train_projector, False, passes_on=True)[2]
            self._encoded[key] = (
                Passes(forward - inside, backward - behind),
                Passes(inside, behind),
                tokens,
                seen,
            )
        return self._encoded[key]

    def _run(
        self, pictures: dict, train_projector: bool, train_tower: bool, passes_on: bool = False
    ) -> tuple[int, int, int, int, Seen]:
        """FLOPs of the encoder: forward, of that in the projector, backward; the visual tokens that
        it makes; and the shapes on the way. passes_on: the projector's input needs a gradient."""
        how = pictures, train_projector, train_tower, passes_on
        try:  # without any numbers, if the tower's course does not depend on them
            return self._run_on("meta", *how)
        except (NotImplementedError, RuntimeError):
            return self._run_on("cpu", *how)

    def _run_on(
        self, device: str, pictures: dict, train_projector: bool, train_tower: bool, passes_on: bool
    ):
        base = copy.deepcopy(self._encoder_alone)
        projector = _projector(base)
        for parameter in base.parameters():
            parameter.requires_grad_(train_tower)
        for parameter in projector.parameters() if projector is not None else ():
            parameter.requires_grad_(train_projector)
        if device == "cpu":  # buffers stay as they are
            for module in base.modules():
                for name, old in module._parameters.items():
                    if old is not None:
                        module._parameters[name] = nn.Parameter(
                            torch.zeros(old.shape), old.requires_grad
                        )
        else:
            base.to(device)
        inputs = {
            name: value.to(device) if value.is_floating_point() else value
            for name, value in pictures.items()
        }
        marks: list[int] = []
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module, before in self._watched(base, projector):
            module.register_forward_hook(partial(_note_shape, shapes, name, before))
        with NoProducts(), FlopCounterMode(display=False) as counter:
            if projector is not None:
                projector.register_forward_pre_hook(
                    lambda *_: marks.append(-counter.get_total_flops())
                )
                projector.register_forward_hook(lambda *_: marks.append(counter.get_total_flops()))
                if passes_on:
                    projector.register_forward_pre_hook(
                        lambda _, args: (args[0].detach().requires_grad_(), *args[1:])
                    )
            with torch.set_grad_enabled(train_projector or train_tower or passes_on):
                encoded = encode_pictures(base, (), inputs).get("mm_encoder_outputs", {})
            forward = counter.get_total_flops()
            features = [feature for output in encoded.values() for feature in output.pooler_output]
            if not features:
                raise UnsupportedModel("the pictures hold no pixel_values or pixel_values_videos")
            # What reaches the decoder: the features, and those for its later layers (deep-stack).
            deep = tree_leaves(
                [getattr(output, "deepstack_features", None) for output in encoded.values()]
            )
            reaching = [
                feature
                for feature in [*features, *deep]
                if feature is not None and feature.requires_grad
            ]
            if reaching:
                sum(feature.sum() for feature in reaching).backward()
        tokens = sum(len(feature) for feature in features)
        seen = Seen(shapes.get("tower", ())[:2], shapes.get("projector", ()))
        return forward, sum(marks), counter.get_total_flops() - forward, tokens, seen

    def _watched(
        self, base: nn.Module, projector: nn.Module | None
    ) -> list[tuple[str, nn.Module, bool]]:
        """Modules of ``base`` whose input (True) or output shows the shapes of Seen."""
        watched = [] if projector is None else [("projector", projector, True)]
        try:
            parts = replace(self._parts, base=base, projector=projector)
            attention = tower_attentions(parts, ["last"])["last"][0]
        except (UnsupportedModel, IndexError):
            return watched
        return [*watched, ("tower", getattr(attention, "qkv", None) or attention.k_proj, False)]

    @cached_property
    def _encoder_alone(self) -> nn.Module:
        """The base model without its decoder."""
        base = copy.copy(self._parts.base)
        base._modules = {n: m for n, m in base._modules.items() if m is not self._parts.decoder}
        return base

    # --- memory ---

    def activation_bytes(
        self, lengths: list[float], element: int = 2, checkpointing: bool = False
    ) -> float:
        """Bytes that the decoder keeps for the backward pass of one example with ``lengths`` tokens, a number a layer.

        For layers of Llama's make (two norms, gated MLP) with attention that keeps no map (sdpa, flash). element: bytes
        of an activation; norms compute in 4. With checkpointing each layer keeps its input, and the largest layer is
        whole while it is computed again.
        """
        norm = 4 + 2 * element  # its input in float32, its result before and after the weight
        kept = [
            length
            * (
                2 * norm * self.width
                + 8
                + element * (3 * s.queries + 2 * s.keys + 4 * s.inner)
                + 4 * s.heads
            )
            for s, length in zip(self.layers, lengths, strict=True)
        ]
        return (
            sum(length * self.width * element for length in lengths) + max(kept)
            if checkpointing
            else sum(kept)
        )

    def cache_bytes(self, lengths: list[float], element: int = 2) -> float:
        """Bytes of the key-value cache of one example whose layers hold ``lengths`` tokens."""
        return sum(
            2 * layer.keys * length * element
            for layer, length in zip(self.layers, lengths, strict=True)
        )

    def state_bytes(
        self,
        phase: str = "instruct",
        train_tower: bool = False,
        lora_rank: int = 0,
        element: int = 2,
    ) -> dict[str, int]:
        """Bytes of "weights", "gradients" and "optimizer" (AdamW's moments, and a master copy where element < 4)."""
        adapters = (
            lora_rank * sum(layer.sides for layer in self.layers) if phase == "instruct" else 0
        )
        trained = 0 if phase == "forward" else self.parameters["projector"]
        if phase == "instruct":
            trained += (adapters or self.parameters["decoder"]) + train_tower * self.parameters[
                "tower"
            ]
        return {
            "weights": element * (sum(self.parameters.values()) + adapters),
            "gradients": element * trained,
            "optimizer": (8 if element >= 4 else 12) * trained,
        }


def _note_shape(
    shapes: dict, name: str, before: bool, module: nn.Module, args: tuple, output
) -> None:
    shape = tuple((args[0] if before else output).shape)
    shapes[name] = shape if len(shape) == 3 else (1, *shape)


class NoProducts(TorchDispatchMode):
    """Matrix products, convolutions and softmax give zeros of the right shape at once."""

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_softmax")
    COSTLY = frozenset(getattr(torch.ops.aten, name) for name in NAMES)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket not in self.COSTLY:
            return func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.is_meta for x in args):
            return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(
            lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs or {})
        )
        return tree_map(lambda x: _zeros(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))


def _zeros(like: Tensor) -> Tensor:
    """As ``torch.zeros_like`` of a meta tensor, from pages that the system zeroes when they are touched, if ever."""
    size = like.numel() * like.element_size()
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(like.dtype).view(like.shape)


def of_tower(made: Mapping) -> dict:
    """What of a batch, or of what an image processor made, goes to the tower, on the CPU."""
    return {name: made[name].cpu() for name in TOWER_INPUTS if name in made}


def _shape(value: Tensor) -> tuple:
    """Of pixels their shape, of grids and sizes what they say."""
    return tuple(value.shape) if value.is_floating_point() else tuple(value.flatten().tolist())


def _passes(forward: float, phase: str, trains: bool) -> Passes:
    """Backward costs the forward once for the gradients of activations, and once more for those of trained weights."""
    return Passes(forward, forward * {"forward": 0, "align": 1, "instruct": 1 + trains}[phase])


def _layer_sizes(layer: nn.Module, heads: int) -> LayerSizes:
    maps = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    if any(parameter.dim() > 2 for parameter in layer.parameters()):
        raise UnsupportedModel(
            f"{type(layer).__name__} holds experts; its cost depends on the tokens"
        )
    return LayerSizes(
        linear=sum(module.weight.numel() for module in maps),
        sides=sum(module.in_features + module.out_features for module in maps),
        queries=layer.self_attn.o_proj.in_features,
        keys=layer.self_attn.k_proj.out_features,
        heads=heads,
        inner=layer.mlp.down_proj.in_features,
    )


def _projector(base: nn.Module) -> nn.Module | None:
    found = dict(base.named_modules())
    return next(
        (
            found[name]
            for name in ("multi_modal_projector", "connector", "visual.merger")
            if name in found
        ),
        None,
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _is_inside(parameter: Tensor, module: nn.Module) -> bool:
    return any(parameter is other for other in module.parameters())
