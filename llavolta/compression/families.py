"""Where the parts are that compression needs, in any Hugging Face vision-language model: the adapter layer.

What differs between families is found from the model's own structure, not from its name: placeholder ids from the
config, the extent of each picture from the encoder's output, tiles from newline tokens and text between them, frames
of a clip from 3-D positions. So a new family usually needs nothing here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from llavolta.errors import UnsupportedModel

PIXELS = {
    "image": "pixel_values",
    "video": "pixel_values_videos",
}  # by modality, the argument with the raw pictures


@dataclass(frozen=True)
class Parts:
    """The modules of a vision-language model.

    top: takes labels and returns the loss (None if the model has no head). base: joins pictures and text.
    decoder: the language model; its ``layers`` and ``rotary_emb``. visual_ids: the placeholder token of "image",
    "video". projector: maps the vision tower's tokens one by one to the decoder's width, None if it merges some.
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
    """Which tokens belong to which picture: an image, a tile of one, a frame of a clip.

    rows (I, L): indices into the flat (B * T) sequence, and mask (I, L), False at padding. grid (I, 2): height and
    width without a class token, (1, n) where n tokens are no known rectangle. clip (I,): rising, the same for the
    frames of a clip that no text parts. frames (I,): in each row. has_clips: whether some pictures are frames of one
    clip; known to the host, which need not wait for the device.
    """

    rows: Tensor
    mask: Tensor
    grid: Tensor
    clip: Tensor
    frames: Tensor
    has_clips: bool

    def by_clip(self) -> Pictures:
        """The same with clips, each in one row, in place of frames."""
        frames = self.clip.bincount()
        first = frames.cumsum(0) - frames
        sizes = torch.cat([self.grid, self.mask.sum(1, keepdim=True)], dim=1)
        alike = (sizes == sizes[first][self.clip]).all(1)
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
        """values (I, L, D) of these pictures as those of ``by_clip``, 0 at padding."""
        count = torch.zeros_like(self.clip.bincount()).index_add(0, self.clip, self.mask.sum(1))
        mask = torch.arange(int(count.max()), device=count.device) < count[:, None]
        merged = values.new_zeros(*mask.shape, values.shape[-1])
        merged[mask] = values[self.mask]
        return merged


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside DistributedDataParallel, DeepSpeed, torch.compile and PEFT wrappers."""
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
    """The parts of ``model``, wrapped or not. Raises UnsupportedModel if it has no visual tokens or no decoder."""
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
    """The projector, if it works token by token; those with weights of their own (Gemma 3) or by other names pool."""
    projector = getattr(base, "multi_modal_projector", None)
    if projector is None or any(True for _ in projector.parameters(recurse=False)):
        return None
    if getattr(projector, "merges_tokens", False) or hasattr(
        projector, "pixel_shuffle"
    ):  # our own, Aya Vision's
        return None
    return projector


def towers(parts: Parts) -> dict[str, nn.Module]:
    """The vision towers, by their names in the base model."""
    others = (parts.decoder, parts.projector)
    children = parts.base.named_children()
    return {name: _running(part) for name, part in children if part not in others and _stacks(part)}


def _running(part: nn.Module) -> nn.Module:
    """The module that runs: where PEFT trains a part whole, its copy of it, not the original."""
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
    """What the parameters of a model are for, by the names of modules and lone parameters within the unwrapped model:
    ``projector`` (what leads from the tower's width to the decoder's: also Qwen's mergers, newlines), ``tower``; the
    rest is the language model's."""

    projector: tuple[str, ...]
    tower: tuple[str, ...]

    def of(self, parameter: str) -> str:
        """Of a parameter, by its name in the unwrapped model: "projector", "tower" or "language"."""
        parameter = parameter.replace(".modules_to_save.default", "")  # PEFT's copy of a part
        for role in ("projector", "tower"):  # a merger stands within its tower
            if any(
                parameter == name or parameter.startswith(f"{name}.")
                for name in getattr(self, role)
            ):
                return role
        return "language"


def roles(model: nn.Module) -> Roles:
    """Found from the structure: a tower has a stack of layers and takes pixels by a convolution; a projector stands
    beside it, or within it, behind the layers, and ends at the decoder's width."""
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
    seeing = seeing or [name for name, part in beside if _stacks(part)]
    projector = [name for name, _ in beside if name not in seeing]
    if not projector:
        width = parts.decoder.config.hidden_size
        for name in seeing:
            projector += [f"{name}.{inner}" for inner in _mergers(dict(beside)[name], width)]
    projector += [name for name, _ in parts.base.named_parameters(recurse=False)]
    return Roles(tuple(base + name for name in projector), tuple(base + name for name in seeing))


def _mergers(tower: nn.Module, width: int) -> list[str]:
    """The parts of a vision tower that stand behind its layers and end at the decoder's ``width``."""
    stack = max(_stacks(tower), key=len)
    children = list(tower.named_children())
    at = next(place for place, (_, part) in enumerate(children) if stack in list(part.modules()))
    found = []
    for name, part in children[at + 1 :]:
        if any(isinstance(m, nn.Linear) and m.out_features == width for m in part.modules()):
            found.append(name)
    return found


def _stacks(module: nn.Module) -> list[nn.ModuleList]:
    return [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part)]


def tower_attentions(parts: Parts, layers: Iterable[str | int]) -> dict[str | int, list[nn.Module]]:
    """The attention, with ``q_proj`` and ``k_proj`` or with ``qkv``, of ``layers`` of each vision tower.

    layers: "last", "selected" (the layer whose output the model selects), "early" (5 of 24) or a number, from the
    end if below 0. Raises UnsupportedModel for a tower without such a layer.
    """
    selected = getattr(parts.base.config, "vision_feature_layer", -1)
    selected = selected[-1] if isinstance(selected, list | tuple) else selected
    # The model counts hidden states, of which the first stands before all layers.
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
    """How many heads an attention of a vision tower has."""
    for name in ("num_heads", "num_attention_heads"):
        if hasattr(attention, name):
            return getattr(attention, name)
    raise UnsupportedModel(
        f"{type(attention).__name__} does not say how many heads it has; use avgpool or kmeans"
    )


def without_class_token(parts: Parts) -> list[str]:
    """The vision towers that have no class token before their patches (SigLIP), by name and class."""
    known = {"class_embedding", "cls_token"}
    return [
        f"{name} ({type(tower).__name__})"
        for name, tower in towers(parts).items()
        if known.isdisjoint(
            parameter.rpartition(".")[2] for parameter, _ in tower.named_parameters()
        )
    ]


def has_3d_positions(parts: Parts) -> bool:
    """Whether tokens have a position in time, height and width each (M-RoPE)."""
    return hasattr(parts.base, "rope_deltas")


def holds_state(parts: Parts) -> str:
    """What of the decoder's layers holds a running state of the tokens, such as linear attention,
    Mamba or a convolution over tokens: its types in the config, else its classes; "" if nothing."""
    kinds = map(str, getattr(parts.decoder.config, "layer_types", None) or ())
    found = {k for k in kinds if k == "linear_attention" or not k.endswith("attention")} or {
        type(module).__name__
        for module in parts.layers.modules()
        if any(isinstance(child, nn.Conv1d) for child in module.children())
    }
    return ", ".join(sorted(found))


def encode_pictures(base: nn.Module, args: tuple, kwargs: dict) -> dict:
    """The arguments of the base model with its pictures encoded ahead, as ``generate`` hands them over too.

    Then the encoder's output tells how many tokens each picture fills, whatever the family makes of its pixels.
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
            wanted = [
                name
                for name in inspect.signature(encode).parameters
                if inputs.get(name) is not None
            ]
            encoded[kind] = encode(**{name: inputs[name] for name in wanted}, return_dict=True)
            del inputs[pixels]
    return {**inputs, "mm_encoder_outputs": encoded} if encoded else inputs


def visual_tokens(parts: Parts, inputs: dict) -> dict[str, Tensor]:
    """(B, T) bool by modality: the placeholders that pictures fill. Without pictures they are ordinary tokens."""
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
    """The pictures of a batch, in the order of their tokens.

    visual: (B, T) bool by modality, on the CPU, where all of this is computed: it is hundreds of small steps, and many
    need their results. encoded: the encoder's output by modality. positions: (B, T, A), on the device of the result.

    A newline token at the end of each row of a high-resolution grid counts as the grid's last column. One that stands
    alone behind a picture is no part of it and stays, as text does.
    """
    flat, start, lines, first = (
        torch.cat(part) for part in zip(*_marks(base, visual, encoded), strict=True)
    )
    order = flat.argsort()
    flat, start, lines, first = flat[order], start[order], lines[order], first[order]
    first |= torch.nn.functional.pad(
        flat[1:] != flat[:-1] + 1, (1, 0), value=True
    )  # text stands between
    start |= first
    device = positions.device
    positions = positions.reshape(-1, positions.shape[-1])
    positions = positions.cpu()[flat] if positions.shape[1] > 1 else positions[:0]
    if (
        positions.shape[1] > 1
    ):  # (time, height, width): a new frame starts where the height falls back
        start[1:] |= positions[1:, 1] < positions[:-1, 1]

    number = start.cumsum(0) - 1
    count = number.bincount()
    mask = torch.arange(int(count.max()), device=flat.device) < count[:, None]
    rows = flat.new_zeros(mask.shape)
    rows[mask] = flat

    def per_picture(values: Tensor, reduce: str) -> Tensor:
        return values.new_zeros(len(count)).scatter_reduce(
            0, number, values, reduce, include_self=False
        )

    height = per_picture(lines.long(), "sum")
    if positions.shape[1] > 1:
        height = per_picture(positions[:, 1], "amax") - per_picture(positions[:, 1], "amin") + 1
    side = count.double().sqrt().round().long()
    inner = (count - 1).double().sqrt().round().long()
    lead = (
        (side * side != count) & (inner * inner == count - 1) & _gives_frames(base)
    )  # a class token
    count, side = count - lead.long(), torch.where(lead, inner, side)
    height = torch.where(height > 0, height, torch.where(side * side == count, side, 1))
    height = torch.where((count % height == 0) & (height < count), height, 1)
    grid = torch.stack([height, count // height], dim=1)
    clip = first.cumsum(0)[start] - 1
    found = (
        part.to(device, non_blocking=True)
        for part in (rows, mask, grid, clip, torch.ones_like(count))
    )
    return Pictures(*found, has_clips=bool(clip[-1] + 1 < len(clip)))


def _marks(base: nn.Module, visual: dict[str, Tensor], encoded: dict):
    """By modality, for the n tokens of its pictures: flat indices, where a picture starts, which ones end a line, where
    an image, a tile or a clip starts."""
    newline = getattr(base, "image_newline", None)
    for kind, where in visual.items():
        flat = where.reshape(-1).nonzero().squeeze(1)
        # Idefics3 makes one of each row of the batch, empty for a row of text alone.
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
        clip = base.config.video_seq_length if kind == "video" and _gives_frames(base) else None
        clip = (
            clip if clip and len(flat) % clip == 0 else len(flat)
        )  # only text parts clips of another length
        first = 0
        for feature, length in zip(features, lengths, strict=True):
            starts += range(first, first + length, frame or length)
            clips += (
                [first]
                if kind == "video" and (not _gives_frames(base) or first % clip == 0)
                else []
            )
            if newline is not None:
                ends = (feature == newline.to(feature)).all(-1).cpu().nonzero().squeeze(1).tolist()
                if len(ends) == 1:
                    kept[first + ends[0]] = False
                elif (
                    ends
                ):  # a base tile, then the grid of the others, each of its rows with a newline
                    starts.append(first + ends[0] + 1 - (ends[1] - ends[0]))
                    lines[[first + end for end in ends]] = True
            first += length
        start = torch.zeros_like(kept)
        start[[place for place in starts if place < len(start)]] = True
        whole = torch.zeros_like(kept) if kind == "video" else start.clone()
        whole[clips] = True
        yield flat[kept], start[kept], lines[kept], whole[kept]


def _gives_frames(base: nn.Module) -> bool:
    """Whether the encoder's output is frame by frame, with a class token each, as Video-LLaVA's is."""
    return hasattr(base, "video_tower")


def pools_frames(base: nn.Module) -> bool:
    """Whether the model halves each frame of a clip behind the projector, as LLaVA-OneVision does."""
    return hasattr(base, "apply_pooling")


def _frame_tokens(base: nn.Module) -> int | None:
    """The tokens of one frame where a clip's frames follow each other in one piece; None if nothing tells."""
    stride = getattr(base.config, "spatial_pool_stride", 2 if pools_frames(base) else None)
    if stride is None:
        return None
    vision = base.config.vision_config
    return (-(-(vision.image_size // vision.patch_size) // stride)) ** 2  # pyright: ignore[reportReturnType]
