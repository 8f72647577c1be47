"""A tiny random model and batch of each supported family, and a slow oracle that takes the stock decoder apart.

``FAMILIES[name]()`` gives a Family. Every batch has two rows, one with a single picture and one with more, unequally
long, with labels on the last text tokens; ``pictures`` lists per row the (start, length) of every unit that a pooling
window may not leave, written down here by hand.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field

import torch
import transformers as tf

IMAGE, VIDEO, START, END, PAD = 4, 3, 6, 7, 0
VOCABULARY = 32


@dataclass
class Family:
    model: torch.nn.Module
    batch: dict
    pictures: list[list[tuple[int, int]]]
    clips: list[list[tuple[int, int]]] = field(default_factory=list)  # the same with a clip's frames as one
    extra: dict = field(default_factory=dict)

    def inputs(self, rows: list[list], side: str) -> None:
        """Fill in ids, labels and mask from rows of text lengths and ("image" | "video", [unit lengths], tail)."""
        generator = torch.Generator().manual_seed(1)
        ids, labels, self.pictures, self.clips = [], [], [], []
        for row in rows:
            tokens, units, clips = [], [], []
            for part in row:
                if isinstance(part, int):
                    tokens += torch.randint(8, VOCABULARY, (part,), generator=generator).tolist()
                    continue
                kind, lengths, lone = part
                first = len(tokens)
                for length in lengths:
                    units.append((len(tokens), length))
                    tokens += [IMAGE if kind == "image" else VIDEO] * length
                clips += [(first, sum(lengths))] if kind == "video" else units[-len(lengths) :]
                tokens += [IMAGE if kind == "image" else VIDEO] * lone
            ids.append(tokens)
            labels.append([-100] * (len(tokens) - 2) + tokens[-2:])
            self.pictures.append(units)
            self.clips.append(clips)
        longest = max(map(len, ids))

        def pad(values, fill):
            extra = [fill] * (longest - len(values))
            return extra + values if side == "left" else values + extra

        if side == "left":
            shift = [longest - len(row) for row in ids]
            for rows in (self.pictures, self.clips):
                rows[:] = [[(s + by, n) for s, n in row] for row, by in zip(rows, shift, strict=True)]
        self.batch["input_ids"] = torch.tensor([pad(row, PAD) for row in ids])
        self.batch["labels"] = torch.tensor([pad(row, -100) for row in labels])
        self.batch["attention_mask"] = torch.tensor([pad([1] * len(row), 0) for row in ids])


_TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)
_VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


def _build(kind, config, attention):
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.std() < 0.1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def _pixels(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def llava(side="right", attention="sdpa"):
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_VISION, image_size=16, patch_size=4),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    family = Family(
        _build(tf.LlavaForConditionalGeneration, config, attention), {"pixel_values": _pixels(3, 3, 16, 16)}, []
    )
    family.inputs([[3, ("image", [16], 0), 4], [2, ("image", [16, 16], 0), 6]], side)
    return family


def llava_next(side="right", attention="sdpa"):
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**_VISION, image_size=16, patch_size=4),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        tie_word_embeddings=False,
    )
    # 32 x 32: a base tile and 8 rows of 8 + newline. 16 x 32 (height, width): 4 rows of 8 + newline.
    # 14 x 32 is resized to 14 x 32 in a 16 x 32 canvas: 4 rows, cut by the padding (16 - 14) / 2 patches = none.
    batch = {"pixel_values": _pixels(3, 5, 3, 16, 16), "image_sizes": torch.tensor([[32, 32], [16, 32], [30, 14]])}
    family = Family(_build(tf.LlavaNextForConditionalGeneration, config, attention), batch, [])
    tall = 8 * (4 + 1)
    family.inputs(
        [[3, ("image", [16, 8 * 9], 0), 4], [2, ("image", [16, 4 * 9], 0), 1, ("image", [16, tall], 0), 6]], side
    )
    return family


def llava_onevision(side="right", attention="sdpa"):
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**_VISION, image_size=16, patch_size=4),
        text_config=tf.Qwen2Config(**_TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 32]],
        tie_word_embeddings=False,
    )
    batch = {
        "pixel_values": _pixels(2, 5, 3, 16, 16),
        "image_sizes": torch.tensor([[32, 32], [16, 32]]),
        "pixel_values_videos": _pixels(1, 3, 3, 16, 16),
    }
    family = Family(_build(tf.LlavaOnevisionForConditionalGeneration, config, attention), batch, [])
    rows = [[3, ("image", [16, 8 * 9], 0), 4], [2, ("video", [4, 4, 4], 1), 1, ("image", [16, 4 * 9], 0), 6]]
    family.inputs(rows, side)
    return family


def video_llava(side="right", attention="sdpa"):
    config = tf.VideoLlavaConfig(
        vision_config=tf.CLIPVisionConfig(**_VISION, image_size=16, patch_size=4),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        tie_word_embeddings=False,
    )
    batch = {"pixel_values": _pixels(2, 3, 16, 16), "pixel_values_videos": _pixels(1, 2, 3, 16, 16)}
    family = Family(_build(tf.VideoLlavaForConditionalGeneration, config, attention), batch, [])
    family.inputs([[3, ("image", [16], 0), 4], [2, ("video", [17, 17], 0), 2, ("image", [16], 0), 6]], side)
    return family


def _qwen(kind, config_kind, vision, text, side, attention):
    config = config_kind(
        vision_config=vision,
        text_config={**_TEXT, **text},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=False,
    )
    grids = torch.tensor([[1, 8, 4], [1, 4, 4]])
    clips = torch.tensor([[2, 4, 8]])
    width = 3 * 2 * 4 * 4
    batch = {
        "pixel_values": _pixels(int(grids.prod(1).sum()), width),
        "image_grid_thw": grids,
        "pixel_values_videos": _pixels(int(clips.prod(1).sum()), width),
        "video_grid_thw": clips,
    }
    return Family(_build(kind, config, attention), batch, [])


def _types(family):
    ids = family.batch["input_ids"]
    family.batch["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return family


def qwen2_5_vl(side="right", attention="sdpa"):
    vision = dict(
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=32,
        window_size=16,
        fullatt_block_indexes=[1],
    )
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    family = _qwen(tf.Qwen2_5_VLForConditionalGeneration, tf.Qwen2_5_VLConfig, vision, text, side, attention)
    rows = [[3, ("image", [8], 0), 4], [2, ("video", [8, 8], 0), 2, ("image", [4], 0), 6]]
    family.inputs(rows, side)
    return _types(family)


def qwen3_vl(side="right", attention="sdpa"):
    vision = dict(
        depth=3,
        hidden_size=16,
        intermediate_size=24,
        num_heads=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
        out_hidden_size=32,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1, 2],
    )
    text = {"head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    family = _qwen(tf.Qwen3VLForConditionalGeneration, tf.Qwen3VLConfig, vision, text, side, attention)
    # Qwen3-VL writes a time stamp (text) before each frame.
    rows = [[3, ("image", [8], 0), 4], [2, ("video", [8], 0), 1, ("video", [8], 0), 2, ("image", [4], 0), 6]]
    family.inputs(rows, side)
    return _types(family)


def internvl(side="right", attention="sdpa"):
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**_VISION, image_size=[32, 32], patch_size=[4, 4]),
        text_config=tf.Qwen2Config(**_TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    family = Family(
        _build(tf.InternVLForConditionalGeneration, config, attention), {"pixel_values": _pixels(4, 3, 32, 32)}, []
    )
    family.inputs([[3, ("image", [16], 0), 4], [2, ("image", [16, 16, 16], 0), 6]], side)  # three tiles
    return family


def smolvlm(side="right", attention="sdpa"):
    config = tf.SmolVLMConfig(
        vision_config=tf.SmolVLMVisionConfig(**_VISION, image_size=32, patch_size=4),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=PAD,
    )
    pixels = _pixels(2, 2, 3, 32, 32)
    pixels[0, 1] = 0  # padding: the first row has one image
    family = Family(_build(tf.SmolVLMForConditionalGeneration, config, attention), {"pixel_values": pixels}, [])
    family.inputs([[3, ("image", [16], 0), 4], [2, ("image", [16], 0), 1, ("image", [16], 0), 6]], side)
    return family


def gemma3(side="right", attention="sdpa"):
    text = {**_TEXT, "head_dim": 8, "sliding_window": 12, "query_pre_attn_scalar": 8}
    text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**_VISION, image_size=32, patch_size=4),
        text_config=tf.Gemma3TextConfig(**text),
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    model = _build(tf.Gemma3ForConditionalGeneration, config, attention)
    family = Family(model, {"pixel_values": _pixels(3, 3, 32, 32)}, [])
    family.inputs([[3, ("image", [16], 0), 4], [2, ("image", [16], 0), 2, ("image", [16], 0), 6]], side)
    family.batch["token_type_ids"] = (family.batch["input_ids"] == IMAGE).long()
    return family


def llava_next_video(side="right", attention="sdpa"):
    config = tf.LlavaNextVideoConfig(
        vision_config=tf.CLIPVisionConfig(**_VISION, image_size=16, patch_size=4),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[16, 32], [32, 32]],
        tie_word_embeddings=False,
    )
    batch = {
        "pixel_values": _pixels(1, 5, 3, 16, 16),
        "image_sizes": torch.tensor([[32, 32]]),
        "pixel_values_videos": _pixels(1, 3, 3, 16, 16),
    }
    family = Family(_build(tf.LlavaNextVideoForConditionalGeneration, config, attention), batch, [])
    family.inputs([[3, ("image", [16, 8 * 9], 0), 4], [2, ("video", [4, 4, 4], 0), 6]], side)
    return family


def qwen2_vl(side="right", attention="sdpa"):
    vision = dict(
        depth=2,
        embed_dim=16,
        hidden_size=32,
        mlp_ratio=2,
        num_heads=2,
        patch_size=4,
        spatial_merge_size=2,
        temporal_patch_size=2,
    )
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    family = _qwen(tf.Qwen2VLForConditionalGeneration, tf.Qwen2VLConfig, vision, text, side, attention)
    family.inputs([[3, ("image", [8], 0), 4], [2, ("video", [8, 8], 0), 2, ("image", [4], 0), 6]], side)
    return _types(family)


def idefics3(side="right", attention="sdpa"):
    config = tf.Idefics3Config(
        vision_config=tf.Idefics3VisionConfig(**_VISION, image_size=32, patch_size=4),
        text_config=tf.LlamaConfig(**_TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=PAD,
    )
    pixels = _pixels(2, 2, 3, 32, 32)
    pixels[0, 1] = 0
    family = Family(_build(tf.Idefics3ForConditionalGeneration, config, attention), {"pixel_values": pixels}, [])
    family.inputs([[3, ("image", [16], 0), 4], [2, ("image", [16], 0), 1, ("image", [16], 0), 6]], side)
    return family


def mistral3(side="right", attention="sdpa"):
    vision = {**_VISION, "image_size": 32, "patch_size": 4}
    config = tf.Mistral3Config(
        vision_config=tf.PixtralVisionConfig(**vision),
        text_config=tf.MistralConfig(**_TEXT),
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    batch = {"pixel_values": _pixels(3, 3, 32, 32), "image_sizes": torch.tensor([[32, 32], [16, 32], [32, 32]])}
    family = Family(_build(tf.Mistral3ForConditionalGeneration, config, attention), batch, [])
    family.inputs([[3, ("image", [16], 0), 4], [2, ("image", [8, 16], 0), 6]], side)
    return family


def aya_vision(side="right", attention="sdpa"):
    config = tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**_VISION, image_size=32, patch_size=4),
        text_config=tf.Cohere2Config(**_TEXT, sliding_window=12),
        image_token_index=IMAGE,
        downsample_factor=2,
        tie_word_embeddings=False,
    )
    model = _build(tf.AyaVisionForConditionalGeneration, config, attention)
    family = Family(model, {"pixel_values": _pixels(3, 3, 32, 32)}, [])
    family.inputs([[3, ("image", [16], 0), 4], [2, ("image", [16, 16], 0), 6]], side)
    return family


def _built_once(family):
    """``family``, built once a process: each call gives a copy, in half the time."""
    build = functools.cache(lambda side, attention: family(side, attention))

    @functools.wraps(family)
    def copied(side="right", attention="sdpa"):
        return copy.deepcopy(build(side, attention))

    return copied


FAMILIES = {
    family.__name__: _built_once(family)
    for family in (
        llava,
        llava_next,
        llava_onevision,
        video_llava,
        qwen2_5_vl,
        qwen3_vl,
        internvl,
        smolvlm,
        gemma3,
        llava_next_video,
        qwen2_vl,
        idefics3,
        mistral3,
        aya_vision,
    )
}


def pool_by_hand(
    family: Family, layer: int, stride: int, merged=None, newlines=(), by="clips"
) -> list[tuple[list[int], torch.Tensor]]:
    """What average pooling at ``layer`` must give, from the stock model's own inputs at that layer.

    The stock model (eager attention) runs once and is watched; then every row goes alone and without padding, token
    by token, through the remaining layers. merged: hidden states of the windows in the batch's order instead of their
    means. by: "pictures" or "clips". Returns per row the columns of its text tokens and their logits.
    """
    model, batch = family.model, family.batch
    decoder = model.get_decoder()
    seen, rotary, extra, hooks = {}, [], {}, []
    for number, module in enumerate(decoder.layers):
        watch = lambda module, args, kwargs, number=number: seen.__setitem__(number, (args[0], kwargs))  # noqa: E731
        hooks.append(module.register_forward_pre_hook(watch, with_kwargs=True))
    watch = lambda module, args, kwargs, output: rotary.append((args, kwargs, output))  # noqa: E731
    hooks.append(decoder.rotary_emb.register_forward_hook(watch, with_kwargs=True))
    hooks.append(decoder.register_forward_pre_hook(lambda m, a, kwargs: extra.update(kwargs), with_kwargs=True))
    model(**batch)
    for hook in hooks:
        hook.remove()

    deepstack = extra.get("deepstack_visual_embeds") or []
    start_of_row = (extra["visual_pos_masks"].sum(1).cumsum(0).tolist() if deepstack else [0] * 2) + [0]
    merged = iter(merged) if merged is not None else None
    results = []
    for row, units in enumerate(getattr(family, by)):
        units = [[c for c in range(first, first + n) if (row, c) not in newlines] for first, n in units]
        inside = {column for unit in units for column in unit}
        windows = {}  # by the column at which a window's token stands
        for unit in units:
            for begin in range(0, len(unit), stride):
                window = unit[begin : begin + stride]
                windows[window[(len(window) - 1) // 2]] = window
        real = batch["attention_mask"][row].bool()
        groups = {c: [c] for c in range(len(real)) if real[c] and c not in inside} | windows
        columns = sorted(groups)

        def mean(values, columns=columns, groups=groups):
            return torch.stack([values[groups[c]].float().mean(0) for c in columns]).to(values.dtype)

        hidden = mean(seen[layer][0][row])
        if merged is not None:
            hidden = torch.stack([next(merged) if c in windows else hidden[i] for i, c in enumerate(columns)])
        for number in range(layer, len(decoder.layers)):
            kwargs = seen[number][1]
            args, rotary_kwargs, _ = next(call for call in rotary if call[2] is kwargs["position_embeddings"])
            positions = rotary_kwargs["position_ids"] if "position_ids" in rotary_kwargs else args[1]
            mine = positions[..., min(row, positions.shape[-2] - 1), :]  # (T,) or (3, T)
            places = groups if merged is None else {c: [c] for c in columns}
            mine = torch.stack([mine[..., places[c]].sum(-1) // len(places[c]) for c in columns], dim=-1)[..., None, :]
            if "position_ids" in rotary_kwargs:
                embeddings = decoder.rotary_emb(hidden[None], **{**rotary_kwargs, "position_ids": mine})
            else:
                embeddings = decoder.rotary_emb(hidden[None], mine, *args[2:])
            mask = kwargs["attention_mask"][row, 0][columns][:, columns]
            hidden = decoder.layers[number](
                hidden[None], attention_mask=mask[None, None], position_embeddings=embeddings
            )
            hidden = hidden[0]
            if number < len(deepstack):
                features = torch.zeros(len(real), hidden.shape[-1])
                before = start_of_row[row - 1]
                features[extra["visual_pos_masks"][row]] = deepstack[number][before : start_of_row[row]]
                hidden = hidden + mean(features)
        logits = model.get_output_embeddings()(decoder.norm(hidden))
        text = [i for i, c in enumerate(columns) if c not in windows]
        results.append(([columns[i] for i in text], logits[text]))
    return results
