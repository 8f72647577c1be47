"""Count the floating-point operations and the memory of a model, from its configuration alone.

A multiply-add counts as two operations, and attention as if each token attended to all tokens, as
``torch.utils.flop_counter`` counts. The matrix products of the compressors are included: see
``products``. Norms, activations and the optimizer are left out; they are below 1%.

The decoder is counted in closed form, since its length changes with the plan. Vision towers and
projectors differ too much between families, so they are run once under torch's counter. Every
matrix product is replaced by zeros of its shape, so a tower of any size takes a moment and no
memory.
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
    """FLOPs by pass.

    Attributes:
        forward: Of the forward pass.
        backward: Of the backward pass.
        recomputed: Of what gradient checkpointing computes a second time.
    """

    forward: float
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all passes."""
        return self.forward + self.backward + self.recomputed


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one training step, per example.

    Attributes:
        tower: The vision tower.
        projector: The projector.
        linear: The linear maps of the decoder's layers.
        attention: The attention products of the decoder's layers.
        head: The logits.
        compressor: The matrix products of the plan's compressors.
    """

    tower: Passes
    projector: Passes
    linear: Passes
    attention: Passes
    head: Passes
    compressor: Passes = Passes(0.0)

    @property
    def total(self) -> float:
        """The sum of all parts and passes."""
        return sum(getattr(self, part).total for part in PARTS)


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one decoder layer.

    Attributes:
        linear: Number of weights of its linear maps.
        sides: Input and output widths of its linear maps, summed.
        queries: Width of all query heads.
        keys: Width of all key heads.
        heads: Number of query heads.
        inner: Width of the MLP.
    """

    linear: int
    sides: int
    queries: int
    keys: int
    heads: int
    inner: int


def step_cost(
    config, plan="none", text_tokens: float = 64, images: float = 1, **options
) -> StepCost:
    """Return the cost of one training step per example, for the model that ``config`` describes.

    Args:
        config: A Hugging Face config.
        plan: As a text or dict.
        text_tokens: Text tokens per example.
        images: Images per example.
        **options: Others of ``CostModel.step``.
    """
    return cost_model(config).step(plan, text_tokens, images, **options)


def cost_model(config) -> CostModel:
    """Return the CostModel of a Hugging Face config, the same object for equal configs."""
    return _cost_model(type(config), config.to_json_string(use_diff=False))


@lru_cache(32)
def _cost_model(kind: type, text: str) -> CostModel:
    return CostModel(kind.from_dict(json.loads(text)))


class CostModel:
    """The cost of a model of a supported family, from its Hugging Face config.

    The constructor raises UnsupportedModel for a config of no supported vision-language model, or
    of a decoder with experts.

    Attributes:
        config: The Hugging Face config.
        width: Hidden size of the decoder.
        layers: LayerSizes of each decoder layer.
        parameters: Number of parameters of "tower", "projector" and "decoder" (with embeddings and
            head).
    """

    def __init__(self, config):
        self.config = config
        try:
            # Weights have shapes but no memory. Buffers are real, since their values are needed.
            # Eager attention consists of matrix products, which can be counted.
            with init_empty_weights(include_buffers=False):
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
        # The head may share its weights with the embeddings, which are part of the decoder.
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
        """Return the cost of one training step per example.

        Args:
            plan: As a text or dict.
            text_tokens: Text tokens per example; may be a mean.
            images: Images per example; may be a mean.
            labelled: Rows whose logits are computed. Default: a quarter of the text tokens.
            phase: "instruct" trains projector and decoder; "align" trains the projector alone, with
                gradients passing through the decoder; "forward" trains nothing.
            visual: Visual tokens of one image, as a list with one number for each part (tile,
                frame) that no pooling window crosses. Default: all in one part.
            pictures: The processor's output for one image (``pixel_values`` and so on). Default: a
                square of the tower's size. Families that cut images into tiles or patches need it.
            checkpointing: Decoder layers are computed again in the backward pass.
            train_tower: The tower is trained too, in phase "instruct".
            lora_rank: Rank of adapters that are trained in place of the decoder's weights; 0: none.

        Raises:
            ValueError: Unknown phase.
            UnsupportedModel: The family needs ``pictures``, or they hold no pixels.
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
        reaching = images  # a compressor at "vision" leaves the projector fewer tokens
        if VISION in plan and seen.projector:
            reaching *= plan[VISION].num_tokens(seen.projector[1]) / seen.projector[1]
        return StepCost(
            compressor=self._own(plan, text_tokens, images, visual, seen, trained),
            tower=Passes(images * tower.forward, images * tower.backward),
            projector=Passes(reaching * projector.forward, reaching * projector.backward),
            linear=linear,
            attention=attention,
            # LoRA does not train the head.
            head=_passes(2 * self._head * rows, phase, trains=not lora_rank),
        )

    def stage(
        self,
        stage: Stage,
        text_tokens: float = 64,
        images: float = 1,
        labelled: float | None = None,
        **options,
    ) -> list[tuple[float, StepCost]]:
        """Return the cost of each kind of pass that the steps of a stage compute.

        Args:
            stage: A stage of a scheme.
            text_tokens: See ``step``.
            images: See ``step``.
            labelled: See ``step``.
            **options: Others of ``step``.

        Returns:
            Pairs of the share of the stage's steps that compute the pass, and its StepCost per
            example.
        """
        rows = text_tokens / 4 if labelled is None else labelled
        # DualSpeed's prefix, before each part of an image, counts as text.
        pictures = images * len(options.get("visual") or [0])
        return [
            (
                p.share,
                self.step(
                    p.plan, text_tokens + p.prefix * pictures, images, rows, **(options | phase)
                ),
            )
            for p in stage.passes
            # A slow step's answers in fast mode are computed without gradients.
            for phase in [{} if p.trains else {"phase": "forward"}]
        ]

    def lengths(
        self,
        plan="none",
        text_tokens: float = 64,
        images: float = 1,
        visual: list[int] | None = None,
    ) -> list[float]:
        """Return the tokens of one example at each decoder layer: see ``step``."""
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
        """Return the cost of the decoder's layers.

        Args:
            lengths: Tokens at each layer.
            phase: See ``step``.
            checkpointing: See ``step``.
            lora_rank: See ``step``.

        Returns:
            The cost of linear maps, and of attention.
        """
        sized = list(zip(self.layers, lengths, strict=True))
        # A multiply-add per weight and token.
        linear = sum(2 * layer.linear * length for layer, length in sized)
        # Two products, q k^T and their weights times v, of 2 * queries * length^2 each.
        attention = sum(4 * layer.queries * length**2 for layer, length in sized)
        again = checkpointing and phase != "forward"
        first = _passes(linear, phase, trains=not lora_rank)
        if phase == "instruct":
            adapters = sum(2 * lora_rank * layer.sides * length for layer, length in sized)
            # Adapters train, so their backward pass costs twice the forward pass.
            first = Passes(linear + adapters, first.backward + 2 * adapters)
        # The backward pass of a product of activations is two products of the same size.
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
        """Return the cost of the compressors' own products.

        ``trained`` says whether the projector and the tower train.
        """
        # Products are counted for whole images and words, and scaled to the mean number of images.
        number, total = max(1, round(images)), [0.0, 0.0]
        counts = [tokens_per_layer(plan, len(self.layers), count) for count in visual]
        for layer, compressor in plan.items() if images else ():
            # Tokens of each part of an image that reach the compressor.
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
        """Return the visual tokens of one image.

        Args:
            pictures: The processor's output for it. None: a square of the tower's size.
        """
        return self.visual if pictures is None else self._encoder(pictures, False, False)[2]

    @property
    def visual(self) -> int:
        """Visual tokens of one image, for a tower that takes images of one size."""
        return self._square(False, False)[2]

    @lru_cache(8)  # noqa: B019  CostModels are cached for the life of the process, too
    def _square(self, train_projector: bool, train_tower: bool) -> tuple[Passes, Passes, int, Seen]:
        """Return the result of ``_encoder`` for a square of the tower's size."""
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
        """Return the cost of tower and projector, the visual tokens, and the shapes on the way.

        Counted once for each shape and grid of ``pictures``.
        """
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
            if train_tower:  # then the projector's backward pass also has its input's gradient
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
        """Count the encoder's FLOPs.

        Returns:
            FLOPs forward, those of them in the projector, FLOPs backward, the number of visual
            tokens, and the shapes on the way. With ``passes_on`` the projector's input needs a
            gradient.
        """
        how = pictures, train_projector, train_tower, passes_on
        try:  # on shapes alone, unless the tower's control flow depends on values
            return self._run_on("meta", *how)
        except (NotImplementedError, RuntimeError):
            return self._run_on("cpu", *how)

    def _run_on(
        self, device: str, pictures: dict, train_projector: bool, train_tower: bool, passes_on: bool
    ):
        """Count the encoder's FLOPs on ``device``: see ``_run``."""
        base = copy.deepcopy(self._encoder_alone)  # hooks and gradients stay out of the original
        projector = _projector(base)
        for parameter in base.parameters():
            parameter.requires_grad_(train_tower)
        for parameter in projector.parameters() if projector is not None else ():
            parameter.requires_grad_(train_projector)
        if device == "cpu":  # zeros for weights; buffers keep their values
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
        marks: list[int] = []  # the counter, negative before the projector and positive after it
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module, before in self._watched(base, projector):
            module.register_forward_hook(partial(_note_shape, shapes, name, before))
        # The counter is the inner mode: it sees each product before NoProducts replaces it.
        with NoProducts(), FlopCounterMode(display=False) as counter:
            if projector is not None:
                projector.register_forward_pre_hook(
                    lambda *_: marks.append(-counter.get_total_flops())
                )
                projector.register_forward_hook(lambda *_: marks.append(counter.get_total_flops()))
                if passes_on:  # stands for a tower that trains
                    projector.register_forward_pre_hook(
                        lambda _, args: (args[0].detach().requires_grad_(), *args[1:])
                    )
            with torch.set_grad_enabled(train_projector or train_tower or passes_on):
                encoded = encode_pictures(base, (), inputs).get("mm_encoder_outputs", {})
            forward = counter.get_total_flops()
            features = [feature for output in encoded.values() for feature in output.pooler_output]
            if not features:
                raise UnsupportedModel("the pictures hold no pixel_values or pixel_values_videos")
            # The decoder gets these features, and others for its later layers (deep-stack).
            deep = tree_leaves(
                [getattr(output, "deepstack_features", None) for output in encoded.values()]
            )
            reaching = [
                feature
                for feature in [*features, *deep]
                if feature is not None and feature.requires_grad
            ]
            # The values of the gradients do not matter, only which products they take.
            if reaching:
                sum(feature.sum() for feature in reaching).backward()
        tokens = sum(len(feature) for feature in features)
        seen = Seen(shapes.get("tower", ())[:2], shapes.get("projector", ()))
        return forward, sum(marks), counter.get_total_flops() - forward, tokens, seen

    def _watched(
        self, base: nn.Module, projector: nn.Module | None
    ) -> list[tuple[str, nn.Module, bool]]:
        """Return the modules whose shapes ``Seen`` records.

        Each is a name, a module, and True for its input or False for its output.
        """
        # Input of the projector, and output of the key projection in the tower's last layer.
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
        # A shallow copy shares all modules but the decoder.
        base = copy.copy(self._parts.base)
        base._modules = {n: m for n, m in base._modules.items() if m is not self._parts.decoder}
        return base

    # --- memory ---

    def activation_bytes(
        self, lengths: list[float], element: int = 2, checkpointing: bool = False
    ) -> float:
        """Return the bytes that the decoder stores for the backward pass of one example.

        It holds for layers like Llama's (two norms, gated MLP) with attention that stores no map
        (sdpa, flash). With checkpointing each layer stores its input, and the largest layer is
        stored in full while it is computed again.

        Args:
            lengths: Tokens at each layer.
            element: Bytes of an activation. Norms compute in 4.
            checkpointing: Whether decoder layers are computed again in the backward pass.
        """
        # Bytes per channel: the input in float32, and the result before and after the weight.
        norm = 4 + 2 * element
        # Per token: two norms and their two float32 scales, attention and MLP, and a float32
        # log-sum-exp per head.
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
        """Return the bytes of one example's key-value cache.

        Args:
            lengths: Tokens at each layer.
            element: Bytes of an activation.
        """
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
        """Return the bytes of model and training state.

        Args:
            phase: See ``step``.
            train_tower: See ``step``.
            lora_rank: See ``step``.
            element: Bytes of a weight.

        Returns:
            Bytes of "weights", "gradients" and "optimizer": AdamW's two moments in float32, and a
            float32 copy of the trained weights if ``element`` is below 4.
        """
        # Two matrices per linear map: width in x rank and rank x width out.
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
    """Record the shape of a module's input or output, as three dimensions."""
    shape = tuple((args[0] if before else output).shape)
    shapes[name] = shape if len(shape) == 3 else (1, *shape)


class NoProducts(TorchDispatchMode):
    """Replace matrix products, convolutions and softmax by zeros of the right shape.

    Nothing is computed, and memory is taken only where a later operation writes to it.
    """

    NAMES = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_softmax")
    COSTLY = frozenset(getattr(torch.ops.aten, name) for name in NAMES)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket not in self.COSTLY:
            return func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.is_meta for x in args):  # costs nothing as it is
            return func(*args, **(kwargs or {}))
        # The product of meta tensors has the right shapes; zeros of these take its place.
        args, kwargs = tree_map(
            lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs or {})
        )
        return tree_map(lambda x: _zeros(x) if isinstance(x, Tensor) else x, func(*args, **kwargs))


def _zeros(like: Tensor) -> Tensor:
    """Return zeros of the shape of a meta tensor.

    numpy takes pages that the system zeroes when they are first touched, so untouched ones cost
    nothing.
    """
    size = like.numel() * like.element_size()
    return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(like.dtype).view(like.shape)


def of_tower(made: Mapping) -> dict:
    """Return the inputs of the vision tower in ``made``, on the CPU.

    Args:
        made: A batch, or the output of an image processor.
    """
    return {name: made[name].cpu() for name in TOWER_INPUTS if name in made}


def _shape(value: Tensor) -> tuple:
    """Return what the cost depends on: the shape of pixels, but the values of grids and sizes."""
    return tuple(value.shape) if value.is_floating_point() else tuple(value.flatten().tolist())


def _passes(forward: float, phase: str, trains: bool) -> Passes:
    """Return forward and backward FLOPs of linear maps.

    The backward pass costs the forward pass once for the gradients of activations, and once more
    for those of trained weights.
    """
    return Passes(forward, forward * {"forward": 0, "align": 1, "instruct": 1 + trains}[phase])


def _layer_sizes(layer: nn.Module, heads: int) -> LayerSizes:
    """Return the sizes of a decoder layer. Raises UnsupportedModel for one with experts."""
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
    """Return the projector of a base model, None if it is no module of its own."""
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
