"""Find the parts and the images of any Hugging Face vision-language model.

What differs between model families is read from the model's structure, not from its name. The
placeholder ids come from the config, the number of tokens of each image from the encoder's output.
Tiles are found by newline tokens and by text between them, frames of a clip by 3-D positions. So a
new family usually needs no change here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from llavolta.errors import UnsupportedModel

# By modality, the model's argument with the pixels.
PIXELS = {
    "image": "pixel_values",
    "video": "pixel_values_videos",
}


@dataclass(frozen=True)
class Parts:
    """The modules of a vision-language model.

    Attributes:
        top: The model with its head, which takes labels and returns the loss. None if the model has
            no head.
        base: The model that inserts encoded images into the text.
        decoder: The language model.
        layers: The decoder's layers.
        rotary: The decoder's rotary embedding.
        visual_ids: By modality ("image", "video"), the id of the placeholder token.
        projector: Maps each token of the vision tower to the decoder's width. None if the model's
            projector merges tokens, or has another name than ``multi_modal_projector``.
    """

    top: nn.Module | None
    base: nn.Module
    decoder: nn.Module
    layers: nn.ModuleList
    rotary: nn.Module
    visual_ids: dict[str, int]
    projector: nn.Module | None


@dataclass
class Pictures:
    """Which tokens belong to which image.

    Each of the I images is an image, a tile of one, a frame of a clip, or, after ``by_clip``, a
    clip. L is the largest number of tokens of one image.

    Attributes:
        rows: (I, L) flat rows: indices into the B * T rows of the batch.
        mask: (I, L) bool, False at padding.
        grid: (I, 2) height and width in tokens, without a class token. (1, n) where the n tokens
            are no known rectangle.
        clip: (I,) rising numbers, equal for the frames of a clip without text between them.
        frames: (I,) number of frames in each row.
        has_clips: Whether some images are frames of one clip. It is stored as a Python bool, so
            that the host need not wait for the device.
    """

    rows: Tensor
    mask: Tensor
    grid: Tensor
    clip: Tensor
    frames: Tensor
    has_clips: bool

    def by_clip(self) -> Pictures:
        """Merge the frames of each clip into one row.

        Returns:
            Images with one row per clip, in which the frames follow each other. If the frames of a
            clip differ in size, its grid is (1, n), and it counts as one frame.
        """
        frames = self.clip.bincount()  # (I,) -> (clips,)
        first = frames.cumsum(0) - frames  # the index of each clip's first frame
        # Compare grid and number of tokens (I, 3) of each frame with those of its clip's first one.
        sizes = torch.cat([self.grid, self.mask.sum(1, keepdim=True)], dim=1)
        alike = (sizes == sizes[first][self.clip]).all(1)
        # (I,) -> (clips,): whether all frames of the clip are equal in size
        alike = torch.ones_like(frames).scatter_reduce(0, self.clip, alike.long(), "amin").bool()
        mask = self.merge(self.mask[..., None].long())[..., 0].bool()
        count = mask.sum(1)
        row = torch.stack([torch.ones_like(count), count], dim=1)
        grid, frames = (
            torch.where(alike[:, None], self.grid[first], row),
            torch.where(alike, frames, 1),
        )
        rows, clip = (
            self.merge(self.rows[..., None])[..., 0],
            torch.arange(len(count), device=count.device),
        )
        return Pictures(rows, mask, grid, clip, frames, has_clips=False)

    def merge(self, values: Tensor) -> Tensor:
        """Merge values of the frames' tokens as ``by_clip`` merges the frames.

        Args:
            values: (I, L, D) values of the tokens of these images.

        Returns:
            (clips, L', D), 0 at padding.
        """
        count = torch.zeros_like(self.clip.bincount()).index_add(0, self.clip, self.mask.sum(1))
        mask = torch.arange(int(count.max()), device=count.device) < count[:, None]
        merged = values.new_zeros(*mask.shape, values.shape[-1])
        merged[mask] = values[self.mask]  # clips are in the order of their frames
        return merged


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside DDP, DeepSpeed, torch.compile and PEFT wrappers.

    Args:
        model: A model, wrapped any number of times or not at all.

    Returns:
        The innermost model.
    """
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module  # pyright: ignore[reportAssignmentType]
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Whether torch.compile wraps ``model`` or a part of it, as a new module or in place."""
    return any(
        "_orig_mod" in m._modules or m._compiled_call_impl is not None for m in model.modules()
    )


def find_parts(model: nn.Module) -> Parts:
    """Find the parts of a model.

    Args:
        model: A vision-language model, wrapped or not.

    Returns:
        Its parts.

    Raises:
        UnsupportedModel: The config names no placeholder token, the decoder has no ``layers`` or no
            ``rotary_emb``, or the base model takes no ``mm_encoder_outputs``.
    """
    model = unwrap(model)
    name = type(model).__name__
    config = getattr(model, "config", None)
    ids = {
        kind: token
        for kind in PIXELS
        for suffix in ("index", "id")
        if isinstance(token := getattr(config, f"{kind}_token_{suffix}", None), int)
    }
    if not ids:
        raise UnsupportedModel(
            f"{name} has no visual tokens: its config names no image_token_id or video_token_id"
        )
    decoder = model.get_decoder()
    layers, rotary = getattr(decoder, "layers", None), getattr(decoder, "rotary_emb", None)
    if not isinstance(layers, nn.ModuleList) or rotary is None:
        raise UnsupportedModel(
            f"{name}: its decoder {type(decoder).__name__} has no .layers or no .rotary_emb"
        )
    base = model.base_model
    if "mm_encoder_outputs" not in inspect.signature(base.forward).parameters:
        raise UnsupportedModel(
            f"{name} takes no mm_encoder_outputs: its pictures do not enter as tokens of the text"
        )
    return Parts(
        model if base is not model else None, base, decoder, layers, rotary, ids, _projector(base)
    )


def _projector(base: nn.Module) -> nn.Module | None:
    """The projector, if it works token by token.

    A projector with parameters of its own, outside its submodules, pools tokens (Gemma 3), and so
    do those of other names.
    """
    projector = getattr(base, "multi_modal_projector", None)
    if projector is None or any(True for _ in projector.parameters(recurse=False)):
        return None
    # The projectors of this package that merge, and that of Aya Vision.
    if getattr(projector, "merges_tokens", False) or hasattr(projector, "pixel_shuffle"):
        return None
    return projector


def towers(parts: Parts) -> dict[str, nn.Module]:
    """The vision towers, by their names in the base model.

    A tower is a child of the base model that contains a stack of layers, and is neither the decoder
    nor ``parts.projector``.
    """
    others = (parts.decoder, parts.projector)
    children = parts.base.named_children()
    return {name: _running(part) for name, part in children if part not in others and _stacks(part)}


def _running(part: nn.Module) -> nn.Module:
    """The module that runs: PEFT's trained copy (``modules_to_save``), or the part itself."""
    if not hasattr(part, "original_module"):
        return part
    running = (
        part.original_module
        if part.disable_adapters
        else part.modules_to_save[part.active_adapters[0]]
    )
    return running  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class Roles:
    """Which parameters of a model belong to the projector and which to the vision tower.

    All other parameters belong to the language model.

    Attributes:
        projector: Names, in the unwrapped model, of modules and single parameters that lead from
            the tower's width to the decoder's; also Qwen's mergers and newline embeddings.
        tower: Names of the vision towers.
    """

    projector: tuple[str, ...]
    tower: tuple[str, ...]

    def of(self, parameter: str) -> str:
        """The role of a parameter.

        Args:
            parameter: Its name in the unwrapped model.

        Returns:
            "projector", "tower" or "language".
        """
        parameter = parameter.replace(".modules_to_save.default", "")  # PEFT's copy of a part
        # The projector first, because a merger is a part of its tower.
        for role in ("projector", "tower"):
            if any(
                parameter == name or parameter.startswith(f"{name}.")
                for name in getattr(self, role)
            ):
                return role
        return "language"


def roles(model: nn.Module) -> Roles:
    """Find the roles of a model's parameters from its structure.

    A tower has a stack of layers and a convolution over pixels. A projector is a child of the base
    model beside the tower. If there is none, it is the part of the tower after the layers that ends
    at the decoder's width.

    Args:
        model: A vision-language model, wrapped or not.

    Returns:
        The roles, by names in the unwrapped model.

    Raises:
        UnsupportedModel: See ``find_parts``.
    """
    top = unwrap(model)
    parts = find_parts(top)
    names = {module: name for name, module in top.named_modules()}
    base = f"{names[parts.base]}." if names[parts.base] else ""
    beside = [
        (name, _running(part))
        for name, part in parts.base.named_children()
        if part is not parts.decoder and any(True for _ in part.parameters())
    ]
    seeing = [
        name
        for name, part in beside
        if _stacks(part) and any(isinstance(m, _ConvNd) for m in part.modules())
    ]
    # Without a convolution (linear patch embedding), any stack of layers is taken for a tower.
    seeing = seeing or [name for name, part in beside if _stacks(part)]
    projector = [name for name, _ in beside if name not in seeing]
    if not projector:
        width = parts.decoder.config.hidden_size
        for name in seeing:
            projector += [f"{name}.{inner}" for inner in _mergers(dict(beside)[name], width)]
    projector += [name for name, _ in parts.base.named_parameters(recurse=False)]  # newlines
    return Roles(tuple(base + name for name in projector), tuple(base + name for name in seeing))


def _mergers(tower: nn.Module, width: int) -> list[str]:
    """Names of the tower's children after its layers with a linear layer of ``width`` outputs."""
    stack = max(_stacks(tower), key=len)
    children = list(tower.named_children())
    at = next(place for place, (_, part) in enumerate(children) if stack in list(part.modules()))
    found = []
    for name, part in children[at + 1 :]:
        if any(isinstance(m, nn.Linear) and m.out_features == width for m in part.modules()):
            found.append(name)
    return found


def _stacks(module: nn.Module) -> list[nn.ModuleList]:
    """All lists of layers in a module."""
    return [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part)]


def tower_attentions(parts: Parts, layers: Iterable[str | int]) -> dict[str | int, list[nn.Module]]:
    """Find attention modules of the vision towers.

    Args:
        parts: The model's parts.
        layers: Which layers: "last", "selected" (the one whose output the model uses), "early"
            (layer 5 of 24, scaled to the tower's depth), or a number, from the end if below 0.

    Returns:
        By layer, the attention of each tower: a module with ``q_proj`` and ``k_proj``, or ``qkv``.

    Raises:
        UnsupportedModel: A tower has no such layer, or the layer no such module.
    """
    selected = getattr(parts.base.config, "vision_feature_layer", -1)
    selected = selected[-1] if isinstance(selected, list | tuple) else selected
    # ``vision_feature_layer`` counts hidden states, the first of which is the input of layer 0.
    numbers = {"last": -1, "selected": selected - 1 if selected > 0 else selected}
    found: dict[str | int, list[nn.Module]] = {layer: [] for layer in layers}
    for name, tower in towers(parts).items():
        stack = max(_stacks(tower), key=len)
        for layer, attentions in found.items():
            number = (
                round((len(stack) - 1) * 5 / 23) if layer == "early" else numbers.get(layer, layer)
            )
            if not -len(stack) <= number < len(stack):
                raise UnsupportedModel(f"{name} has {len(stack)} layers, no layer {number}")
            modules = stack[number].modules()
            ready = (
                m
                for m in modules
                if hasattr(m, "q_proj") and hasattr(m, "k_proj") or hasattr(m, "qkv")
            )
            attention = next(ready, None)
            if attention is None:
                raise UnsupportedModel(
                    f"{name}: no q_proj and k_proj in its layer {type(stack[number]).__name__}"
                )
            attentions.append(attention)
    return found


def tower_heads(attention: nn.Module) -> int:
    """The number of heads of a vision tower's attention.

    Args:
        attention: An attention module.

    Returns:
        The number of heads.

    Raises:
        UnsupportedModel: The module has no attribute with this number.
    """
    for name in ("num_heads", "num_attention_heads"):
        if hasattr(attention, name):
            return getattr(attention, name)
    raise UnsupportedModel(
        f"{type(attention).__name__} does not say how many heads it has; use avgpool or kmeans"
    )


def without_class_token(parts: Parts) -> list[str]:
    """List the vision towers that have no class token before their patches, such as SigLIP.

    Args:
        parts: The model's parts.

    Returns:
        Name and class of each such tower, as text for messages.
    """
    known = {"class_embedding", "cls_token"}
    return [
        f"{name} ({type(tower).__name__})"
        for name, tower in towers(parts).items()
        if known.isdisjoint(
            parameter.rpartition(".")[2] for parameter, _ in tower.named_parameters()
        )
    ]


def has_3d_positions(parts: Parts) -> bool:
    """Whether tokens have positions in time, height and width (M-RoPE)."""
    return hasattr(parts.base, "rope_deltas")


def holds_state(parts: Parts) -> str:
    """Name the decoder's layers that carry a running state instead of keys and values.

    These are linear attention, Mamba, and convolutions over tokens.

    Args:
        parts: The model's parts.

    Returns:
        Their types in the config, or else the classes that contain a convolution, separated by
        commas; "" if there is none.
    """
    kinds = map(str, getattr(parts.decoder.config, "layer_types", None) or ())
    found = {k for k in kinds if k == "linear_attention" or not k.endswith("attention")} or {
        type(module).__name__
        for module in parts.layers.modules()
        if any(isinstance(child, nn.Conv1d) for child in module.children())
    }
    return ", ".join(sorted(found))


def encode_pictures(base: nn.Module, args: tuple, kwargs: dict) -> dict:
    """Encode the images before the base model does.

    The encoder's output tells how many tokens each image has in any model family. The base model
    accepts it in place of pixels, as it does from ``generate``.

    Args:
        base: The base model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        All arguments by name. If there are images, ``mm_encoder_outputs`` has the encoder's output
        by modality, and the pixels are removed.
    """
    names = inspect.signature(base.forward).parameters
    inputs = {**dict(zip(names, args, strict=False)), **kwargs}
    encoded = {
        kind: output
        for kind, output in (inputs.get("mm_encoder_outputs") or {}).items()
        if output is not None
    }
    for kind, pixels in PIXELS.items():
        if inputs.get(pixels) is not None and len(inputs[pixels]):
            encode = getattr(base, f"get_{kind}_features")
            # Families differ in what the encoder needs besides pixels, such as sizes or grids.
            wanted = [
                name
                for name in inspect.signature(encode).parameters
                if inputs.get(name) is not None
            ]
            encoded[kind] = encode(**{name: inputs[name] for name in wanted}, return_dict=True)
            del inputs[pixels]
    return {**inputs, "mm_encoder_outputs": encoded} if encoded else inputs


def visual_tokens(parts: Parts, inputs: dict) -> dict[str, Tensor]:
    """Find the placeholders that images fill.

    Args:
        parts: The model's parts.
        inputs: Arguments of the base model, from ``encode_pictures``.

    Returns:
        By modality, (B, T) bool. A modality without images is missing, because then its
        placeholders are ordinary tokens.

    Raises:
        UnsupportedModel: There are no ``input_ids``.
    """
    ids = inputs.get("input_ids")
    if ids is None:
        raise UnsupportedModel(
            "compress needs input_ids to find the visual tokens; pass them, not inputs_embeds"
        )
    encoded = inputs.get("mm_encoder_outputs") or {}
    return {kind: ids == token for kind, token in parts.visual_ids.items() if kind in encoded}


def find_pictures(
    base: nn.Module, visual: dict[str, Tensor], encoded: dict, positions: Tensor
) -> Pictures:
    """Find which tokens belong to which image, and the height and width of each.

    The n visual tokens of the batch are put in text order and cut into images. An image begins
    where a feature of the encoder, a tile or a clip begins (``_marks``), after text, and, with 3-D
    positions, where a new frame begins. For example, LLaVA-NeXT gives one feature for a base tile b
    of 2 x 2 tokens and a grid g of 2 x 2 tokens with a newline token n after each of its rows::

        feature    b b b b g g n g g n
        start      1 0 0 0 1 0 0 0 0 0
        lines      0 0 0 0 0 0 1 0 0 1

    The result is two images with the grids (2, 2) and (2, 3): a newline counts as the last column
    of its row. A single newline after an image is not a part of the image, and stays as text does.

    Args:
        base: The base model.
        visual: By modality, (B, T) bool on the CPU, True at placeholders. The computation takes
            hundreds of small steps, and the host needs many of their results, so it runs on the
            CPU.
        encoded: By modality, the encoder's output.
        positions: (B, T, A) rotary positions, on the device of the result.

    Returns:
        The images, in the order of their tokens.

    Raises:
        UnsupportedModel: The number of placeholders is not the number of encoded tokens.
    """
    flat, start, lines, first = (
        torch.cat(part) for part in zip(*_marks(base, visual, encoded), strict=True)
    )  # (n,) each, images before clips
    order = flat.argsort()  # text order
    flat, start, lines, first = flat[order], start[order], lines[order], first[order]
    # Text stands before a token whose flat row does not follow on the one before.
    first |= torch.nn.functional.pad(flat[1:] != flat[:-1] + 1, (1, 0), value=True)
    start |= first
    device = positions.device
    positions = positions.reshape(-1, positions.shape[-1])  # (B, T, A) -> (B * T, A)
    positions = positions.cpu()[flat] if positions.shape[1] > 1 else positions[:0]  # (n or 0, A)
    # Axes are time, height and width. Height falls only where a new frame begins.
    if positions.shape[1] > 1:
        start[1:] |= positions[1:, 1] < positions[:-1, 1]

    number = start.cumsum(0) - 1  # (n,) the image of each token
    count = number.bincount()  # (I,)
    mask = torch.arange(int(count.max()), device=flat.device) < count[:, None]
    rows = flat.new_zeros(mask.shape)
    rows[mask] = flat  # (n,) -> (I, L)

    # Reduce values per token (n,) to one per image (I,).
    def per_picture(values: Tensor, reduce: str) -> Tensor:
        return values.new_zeros(len(count)).scatter_reduce(
            0, number, values, reduce, include_self=False
        )

    # The height is the extent of 3-D positions, or the number of newlines, or the side of a square.
    # Where none of these is known or divides the number of tokens, the grid is (1, n).
    height = per_picture(lines.long(), "sum")
    if positions.shape[1] > 1:
        height = per_picture(positions[:, 1], "amax") - per_picture(positions[:, 1], "amin") + 1
    side = count.double().sqrt().round().long()
    inner = (count - 1).double().sqrt().round().long()
    # A class token before the patches of a frame: n is no square, and n - 1 is.
    lead = (side * side != count) & (inner * inner == count - 1) & _gives_frames(base)
    count, side = count - lead.long(), torch.where(lead, inner, side)
    height = torch.where(height > 0, height, torch.where(side * side == count, side, 1))
    height = torch.where((count % height == 0) & (height < count), height, 1)
    grid = torch.stack([height, count // height], dim=1)
    clip = first.cumsum(0)[start] - 1  # (n,) -> (I,)
    found = (
        part.to(device, non_blocking=True)
        for part in (rows, mask, grid, clip, torch.ones_like(count))
    )
    return Pictures(*found, has_clips=bool(clip[-1] + 1 < len(clip)))


def _marks(base: nn.Module, visual: dict[str, Tensor], encoded: dict):
    """Mark where the images of each modality begin; see ``find_pictures``.

    Yields:
        For each modality, four tensors over the tokens of its images, in the encoder's order:
        flat rows; whether an image, tile or frame begins; whether a line ends with this newline;
        whether an image, tile or clip begins, which a later frame of a clip does not. Single
        newlines after an image are left out.
    """
    newline = getattr(base, "image_newline", None)
    for kind, where in visual.items():
        flat = where.reshape(-1).nonzero().squeeze(1)  # (B, T) -> (n,)
        # Idefics3 gives one feature per batch row, an empty one for a row without images.
        features = [feature for feature in encoded[kind].pooler_output if len(feature)]
        lengths = [len(feature) for feature in features]
        if sum(lengths) != len(flat):
            raise UnsupportedModel(
                f"the batch holds {len(flat)} {kind} tokens, but its {kind}s fill {sum(lengths)}"
            )
        starts, lines, kept = (
            [],
            flat.new_zeros(len(flat), dtype=torch.bool),
            torch.ones_like(flat, dtype=torch.bool),
        )
        clips = []
        frame = _frame_tokens(base) if kind == "video" else None
        # Tokens of a clip, where the encoder gives one feature per frame. If they do not divide the
        # tokens of the batch, the clips are shorter or longer, and only text separates them.
        clip = base.config.video_seq_length if kind == "video" and _gives_frames(base) else None
        clip = clip if clip and len(flat) % clip == 0 else len(flat)
        first = 0  # where the feature begins in ``flat``
        for feature, length in zip(features, lengths, strict=True):
            starts += range(first, first + length, frame or length)
            clips += (
                [first]
                if kind == "video" and (not _gives_frames(base) or first % clip == 0)
                else []
            )
            if newline is not None:
                # The places of newline embeddings in the feature (length, C).
                ends = (feature == newline.to(feature)).all(-1).cpu().nonzero().squeeze(1).tolist()
                if len(ends) == 1:
                    kept[first + ends[0]] = False  # a single newline after an image or clip
                elif ends:
                    # The base tile has no newline. The distance of two newlines is the width of the
                    # grid with its newline, so the grid begins this far before the first row's end.
                    starts.append(first + ends[0] + 1 - (ends[1] - ends[0]))
                    lines[[first + end for end in ends]] = True
            first += length
        start = torch.zeros_like(kept)
        start[[place for place in starts if place < len(start)]] = True
        whole = torch.zeros_like(kept) if kind == "video" else start.clone()
        whole[clips] = True
        yield flat[kept], start[kept], lines[kept], whole[kept]


def _gives_frames(base: nn.Module) -> bool:
    """Whether the encoder gives one feature per frame, with a class token, as Video-LLaVA's."""
    return hasattr(base, "video_tower")


def pools_frames(base: nn.Module) -> bool:
    """Whether the model halves height and width of frames after the projector (LLaVA-OneVision)."""
    return hasattr(base, "apply_pooling")


def _frame_tokens(base: nn.Module) -> int | None:
    """The number of tokens of a frame, if the model pools frames by a fixed stride; else None.

    The frames of such a clip follow each other in one feature.
    """
    stride = getattr(base.config, "spatial_pool_stride", 2 if pools_frames(base) else None)
    if stride is None:
        return None
    vision = base.config.vision_config
    # The side of a frame in patches, divided by the stride and rounded up.
    return (  # pyright: ignore[reportReturnType]
        -(-(vision.image_size // vision.patch_size) // stride)
    ) ** 2
