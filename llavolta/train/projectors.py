"""Projectors for LLaVA that fuse visual tokens, and the model class that has them.

Source: *Learning Compact Vision Tokens for Efficient Large Multimodal Models* (LLaVA-STF, arXiv
2506.07138). A projector is named by text. ``"stf:2"`` fuses windows of 2 x 2 tokens.
``"mbtf:-2,21,18"`` reads several blocks of the vision tower, and has LLaVA's MLP after them.
``"mbtf+stf:2"`` does both. ``"mlp"`` is the model's own. Options are written as in plans, in order
or as ``option=value``.

Blocks are numbered as in the tower's ``hidden_states``: 0 is the input of the first block, i the
output of the i-th of N blocks. From the end, -1 is block N, and -2 the block before it, which LLaVA
reads.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from llavolta.compression.plan import parse_options
from llavolta.errors import ConfigError

OWN = "mlp"  # the projector that the model comes with

NOTE = """# A LLaVA with fused visual tokens

The projector of this model is not LLaVA's: it fuses visual tokens \
(`llava_stf`; arXiv 2506.07138). transformers loads
it once the package llavolta is imported:

```python
import llavolta
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)
```
"""


def _mlp(*widths: int, bias: bool = True) -> nn.Sequential:
    """Return Linear, GELU, Linear with three ``widths``, which keeps the scale of its input."""
    layers = nn.Sequential(
        nn.Linear(*widths[:2], bias=bias), nn.GELU(), nn.Linear(*widths[1:], bias=bias)
    )
    for linear in layers[::2]:
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        if bias:
            nn.init.zeros_(linear.bias)
    return layers


class MultiBlockTokenFusion(nn.Module):
    """Fuses the outputs of n blocks of the vision tower per patch (MBTF), to C_v channels.

    It is Linear n C_v -> ceil(n/2) C_v, GELU, Linear -> C_v. For 8 blocks these are the published
    widths ``8 C_v -> 4 C_v -> C_v``.

    Args:
        width: Channels C_v of the vision tower.
        blocks: Number of blocks n.
        bias: Whether the linear layers have a bias.
    """

    def __init__(self, width: int, blocks: int = 8, bias: bool = True):
        super().__init__()
        self.mlp = _mlp(blocks * width, -(-blocks // 2) * width, width, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (I, L, n C_v) to (I, L, C_v)."""
        return self.mlp(features)


class SpatialTokenFusion(nn.Module):
    """Fuses each window x window tokens of a square grid into one (STF).

    The tokens of a window are joined along the channels, row by row. Linear, GELU and Linear
    follow: ``window² C_v -> expansion window² C_v -> C``. For window 2 these are the published
    widths ``4 C_v -> 16 C_v -> C``.

    Args:
        width: Channels C_v of a visual token.
        out: Channels C of the decoder.
        window: Tokens along the side of a window.
        expansion: Width of the hidden layer, in widths of its input.
        bias: Whether the linear layers have a bias.
    """

    def __init__(
        self, width: int, out: int, window: int = 2, expansion: int = 4, bias: bool = True
    ):
        super().__init__()
        self.window = window
        joined = window**2 * width
        self.mlp = _mlp(joined, expansion * joined, out, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (I, L, C_v) to (I, L / window², C).

        Raises:
            ConfigError: L is no square, or the window does not divide its side.
        """
        pictures, length, width = features.shape
        side, k = math.isqrt(length), self.window
        if side**2 != length:
            raise ConfigError(
                f"stf needs a square grid of tokens, not {length}; drop CLS and compress behind it"
            )
        n = _windows(side, k)
        grid = features.unflatten(1, (n, k, n, k))  # (I, L, C_v) -> (I, n, k, n, k, C_v)
        # -> (I, n, n, k, k, C_v) -> (I, L / k², k² C_v)
        return self.mlp(grid.transpose(2, 3).reshape(pictures, n * n, k * k * width))


def _windows(side: int, window: int) -> int:
    """Return the windows along a grid's side. Raise ConfigError if they do not fill it."""
    if side % window:
        fit = [k for k in range(1, side + 1) if side % k == 0]
        raise ConfigError(
            f"windows of {window} x {window} do not fill a grid of {side} x {side}; choose from "
            f"{fit}"
        )
    return side // window


@dataclass(frozen=True)
class ProjectorSpec:
    """What the text of a projector says.

    Attributes:
        window: Side of STF's windows; None: no STF.
        expansion: Width of STF's hidden layer, in widths of its input.
        blocks: Blocks that MBTF reads; None: no MBTF; (): those of ``usual_blocks``.
    """

    window: int | None = None
    expansion: int = 4
    blocks: tuple[int, ...] | None = None

    def num_tokens(self, side: int) -> int:
        """Return the visual tokens that remain of a ``side`` x ``side`` grid."""
        return _windows(side, self.window or 1) ** 2


# The options of each part in their order, with their defaults.
_PARTS = {"mbtf": {"blocks": ()}, "stf": {"window": 2, "expansion": 4}}


def parse_projector(text: str) -> ProjectorSpec | None:
    """Read the text of a projector.

    Args:
        text: For example "mbtf:-2,21,18+stf:2".

    Returns:
        What it says; None for "mlp", the projector that the model comes with.

    Raises:
        ConfigError: The text cannot be read.
    """
    if text == OWN:
        return None
    if not isinstance(text, str):
        raise ConfigError(f"a projector is text such as 'stf:2', not {text!r}")
    given, names = {}, []
    for part in text.split("+"):
        name, *options = (word.strip() for word in part.split(":"))
        # MBTF reads the tower's blocks, so it cannot come after STF.
        if name not in _PARTS or name in names or "stf" in names:
            raise ConfigError(
                f"cannot read projector {text!r}; write 'mlp', 'stf:WINDOW', "
                "'mbtf:BLOCK,BLOCK,...' or 'mbtf+stf'"
            )
        names.append(name)
        try:
            given |= _PARTS[name] | parse_options(name, options, list(_PARTS[name]))
            given["blocks"] = _block_numbers(given["blocks"]) if "blocks" in given else None
        except ValueError as error:
            raise ConfigError(f"projector {text!r}: {error}") from None
    for option in {"window", "expansion"} & given.keys():
        if (
            isinstance(given[option], bool)
            or not isinstance(given[option], int)
            or given[option] < 1
        ):
            raise ConfigError(f"projector {text!r}: {option} must be a whole number of at least 1")
    return ProjectorSpec(**given)


def _block_numbers(blocks) -> tuple[int, ...]:
    """Return the numbers in a text such as "-2,21,18". Raise ValueError if there are none."""
    if isinstance(blocks, tuple):
        return blocks
    try:
        return tuple(int(number) for number in str(blocks).split(","))
    except ValueError:
        raise ValueError(
            f"blocks must be whole numbers with commas between, not {blocks!r}"
        ) from None


def usual_blocks(depth: int) -> list[int]:
    """Return the published blocks for a tower of ``depth`` blocks: of 24, -2, 21, 18, ..., 3.

    They are an eighth of the depth apart.
    """
    step = max(1, depth // 8)
    return [-2, *reversed(range(step, depth - 1, step))]


class LlavaStfConfig(LlavaConfig):
    """LLaVA's configuration with a projector that fuses tokens.

    ``image_seq_length`` follows from the tower's grid and the window.

    Attributes:
        stf_window: Side of STF's windows; None: LLaVA's MLP.
        stf_expansion: Width of STF's hidden layer, in widths of its input.
        vision_feature_layer: A list of blocks means MBTF over these.

    Raises:
        ConfigError: The window or the blocks do not fit the tower.
    """

    model_type = "llava_stf"
    stf_window: int | None = 2
    stf_expansion: int = 4

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        vision, blocks = self.vision_config, self.vision_feature_layer
        spec = ProjectorSpec(self.stf_window)
        self.image_seq_length = spec.num_tokens(vision.image_size // vision.patch_size)
        depth = vision.num_hidden_layers
        # Hidden states are numbered 0..depth, or from the end -depth - 1..-1.
        beyond = [
            block
            for block in (blocks if isinstance(blocks, list) else [blocks])
            if not -depth - 1 <= block <= depth
        ]
        if beyond or blocks == []:
            raise ConfigError(
                f"the tower has hidden states {-depth - 1}..{depth}, not "
                f"{beyond or 'an empty list'}"
            )


class TokenFusionProjector(nn.Module):
    """The ``multi_modal_projector`` of a ``LlavaStfConfig``: MBTF or nothing, then STF or an MLP.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: LlavaStfConfig):
        super().__init__()
        width, out, bias = (
            config.vision_config.hidden_size,
            config.text_config.hidden_size,
            config.multimodal_projector_bias,
        )
        blocks, window = config.vision_feature_layer, config.stf_window
        self.blocks = (
            MultiBlockTokenFusion(width, len(blocks), bias)
            if isinstance(blocks, list)
            else nn.Identity()
        )
        if window is None:
            self.tokens = _mlp(width, out, out, bias=bias)
        else:
            self.tokens = SpatialTokenFusion(width, out, window, config.stf_expansion, bias)
        # Read by compression: "vision" in a plan needs a projector that maps tokens one by one.
        self.merges_tokens = (window or 1) > 1

    def forward(self, features: Tensor) -> Tensor:
        """Map features (I, L, C_v), or (I, L, n C_v) of n blocks, to (I, L', C)."""
        return self.tokens(self.blocks(features))


class LlavaStfForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with Spatial or Multi-Block Token Fusion. All else is transformers' own.

    Args:
        config: The model's configuration.
    """

    config_class = LlavaStfConfig

    def __init__(self, config: LlavaStfConfig):
        super().__init__(config)
        self.model.multi_modal_projector = TokenFusionProjector(config)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save the model, with a README.md on how to load it, unless the folder has one.

        The arguments are those of transformers.
        """
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})
        note = Path(save_directory) / "README.md"
        if not note.exists():
            note.write_text(NOTE)


AutoConfig.register(LlavaStfConfig.model_type, LlavaStfConfig)
AutoModelForImageTextToText.register(LlavaStfConfig, LlavaStfForConditionalGeneration)


def with_projector(config: LlavaConfig, projector: str) -> LlavaConfig:
    """Return the configuration of the same LLaVA with another projector.

    Args:
        config: The configuration of a LLaVA.
        projector: The projector's text; "mlp" returns ``config`` itself.

    Raises:
        ConfigError: The model is no LLaVA-1.5, or the projector does not fit it.
    """
    spec = parse_projector(projector)
    if spec is None:
        return config
    if not isinstance(config, LlavaConfig):
        raise ConfigError(
            f"projector {projector!r} is for LLaVA-1.5 and its like, not for {config.model_type!r}"
        )
    blocks = config.vision_feature_layer
    if spec.blocks is not None:
        blocks = list(spec.blocks) or usual_blocks(config.vision_config.num_hidden_layers)
    elif isinstance(blocks, list):
        blocks = blocks[0]  # a projector without MBTF reads one block
    kept = {
        name: value
        for name, value in config.to_dict().items()
        if name not in ("model_type", "architectures")
    }
    parts = {"vision_config": config.vision_config, "text_config": config.text_config}
    fused = dict(vision_feature_layer=blocks, stf_window=spec.window, stf_expansion=spec.expansion)
    return LlavaStfConfig(**{**kept, **parts, **fused})


def replace_projector(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, projector: str
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Give a model and its processor a new, untrained projector.

    The new model takes over the modules of ``model``, which must not be used any more. Its visual
    tokens start at the scale of the decoder's embeddings. The processor counts a window as one
    patch, which gives the right number of placeholders.

    Args:
        model: A LLaVA.
        processor: Its processor.
        projector: The projector's text; "mlp" returns both as they are.

    Returns:
        The new model and processor.

    Raises:
        ConfigError: The model is no LLaVA-1.5, or the projector does not fit it.
    """
    config = with_projector(model.config, projector)
    if config is model.config:
        return model, processor
    config._attn_implementation = model.config._attn_implementation
    # Without memory for weights: all modules are replaced below.
    with torch.device("meta"):
        new = LlavaStfForConditionalGeneration(config)
    for name in ("vision_tower", "language_model"):
        setattr(new.model, name, getattr(model.model, name))
    new.lm_head, new.generation_config = model.lm_head, model.generation_config
    new.model.multi_modal_projector = TokenFusionProjector(config).to(model.device, model.dtype)
    _scale(new)
    processor = copy.copy(processor)
    processor.patch_size = config.vision_config.patch_size * (config.stf_window or 1)
    return new.train(model.training), processor


@torch.no_grad()
def _scale(model: LlavaStfForConditionalGeneration) -> None:
    """Scale the projector's weights so that its layers keep the scale of an image of noise.

    Inner layers give values of unit scale, the last one those of the scale of the embeddings
    (layer-sequential unit variance, arXiv 1511.06422). The outputs of a tower's blocks have no
    common scale.
    """
    vision = model.config.vision_config
    linears = [
        part for part in model.model.multi_modal_projector.modules() if isinstance(part, nn.Linear)
    ]
    targets = {part: 1.0 for part in linears} | {
        linears[-1]: _rms(model.get_input_embeddings().weight)
    }

    def scale(part, args, output):
        # Layer by layer in one pass: the next one already gets the scaled output.
        factor = targets[part] / _rms(output)
        part.weight.mul_(factor)
        return output * factor  # biases are still zero

    hooks = [part.register_forward_hook(scale) for part in linears]
    # A generator of its own leaves the global random state as it is.
    noise = torch.randn(
        1, vision.num_channels, *[vision.image_size] * 2, generator=torch.Generator().manual_seed(0)
    )
    model.get_image_features(pixel_values=noise.to(model.device, model.dtype))
    for hook in hooks:
        hook.remove()


def _rms(values: Tensor) -> float:
    """Return the root mean square of ``values``."""
    return values.float().pow(2).mean().sqrt().item()
