"""Tiny models with their processors on disk, of each family whose pictures transformers reads without torchvision."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from families_tiny import _TEXT, _VISION

from llavolta.data.video import NoVideos, Unchecked
from llavolta.worlds import backbones

SIDE = 32  # pixels; patches of 4
CLIPS = {"num_frames": 8, "fps": 1}  # of the video processor, which is kept as it is


def _tokenizer(*more: str, **named: str):
    """The embedded model's, with ``more`` tokens, and ``named`` ones that the processor asks it for by name."""
    plain = backbones.tokenizer()
    plain.add_special_tokens({"additional_special_tokens": ["<image>", "<video>", *more, *named.values()]})
    own = {name: getattr(plain, name) for name in ("pad_token", "bos_token", "eos_token", "unk_token", "chat_template")}
    more = dict(padding_side="left", additional_special_tokens=["<image>", "<video>", *more])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=plain._tokenizer, model_specific_special_tokens=named, **own, **more
    )


def _text(tokenizer, **more) -> dict:
    own = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {**_TEXT, **{name: getattr(tokenizer, name) for name in own}, "vocab_size": len(tokenizer), **more}


def idefics3():
    """Tiles and a whole picture, each between tokens of their own for rows and columns."""
    places = (f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    tokenizer = _tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places)
    images = tf.Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = tf.Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template="<s>" + tokenizer.chat_template)
    config = tf.Idefics3Config(
        vision_config=tf.Idefics3VisionConfig(**_VISION, image_size=SIDE, patch_size=4),
        text_config=tf.LlamaConfig(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tf.Idefics3ForConditionalGeneration(config), processor


def llava_next():
    """Tiles whose number depends on the picture's shape, with newlines between their rows."""
    tokenizer = _tokenizer()
    grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    images = tf.LlavaNextImageProcessorPil(**size, image_grid_pinpoints=grid)
    options = dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    processor = tf.LlavaNextProcessor(images, tokenizer, chat_template=tokenizer.chat_template, **options)
    config = tf.LlavaNextConfig(
        vision_config=tf.CLIPVisionConfig(**_VISION, image_size=SIDE, patch_size=4),
        text_config=tf.LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grid,
        tie_word_embeddings=False,
    )
    return tf.LlavaNextForConditionalGeneration(config), processor


QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def _template(tokenizer, picture: str) -> str:
    """The embedded model's chat template with what this family writes for a picture."""
    placeholder = "<{{ part['type'] }}>"
    assert placeholder in tokenizer.chat_template
    return tokenizer.chat_template.replace(placeholder, picture)


def _qwen(kind, vision: dict, text: dict, **more):
    """As many tokens as the picture has patches, by twos; three position ids a token."""
    tokenizer = _tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    limits = {"size": {"shortest_edge": 16 * 16, "longest_edge": 40 * 40}}
    images = tf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, **limits)
    name = kind.removesuffix("_")
    blind = type(f"{name}Processor", (Unchecked, getattr(tf, f"{name}Processor")), {})
    processor = blind(images, tokenizer, NoVideos(CLIPS), chat_template=_template(tokenizer, QWEN_PICTURE))
    ids = {part: tokenizer.convert_tokens_to_ids(f"<|{part}|>") for part in ("image_pad", "video_pad")}
    config = getattr(tf, f"{name}Config")(
        vision_config=dict(patch_size=4, spatial_merge_size=2, temporal_patch_size=2, num_heads=2, depth=2) | vision,
        text_config=_text(tokenizer) | text,
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return getattr(tf, f"{name}ForConditionalGeneration")(config), processor


def _rotary(section: list[int]) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": section}}


def qwen2_vl():
    return _qwen("Qwen2VL", dict(embed_dim=16, hidden_size=32, mlp_ratio=2), _rotary([1, 1, 2]))


def qwen2_5_vl():
    sizes = dict(hidden_size=16, intermediate_size=24, out_hidden_size=32)
    return _qwen("Qwen2_5_VL", dict(**sizes, window_size=16, fullatt_block_indexes=[1]), _rotary([1, 1, 2]))


def qwen3_vl():
    sizes = dict(hidden_size=16, intermediate_size=24, out_hidden_size=32, num_position_embeddings=64)
    return _qwen("Qwen3VL", sizes | dict(deepstack_visual_indexes=[0, 1]), dict(head_dim=8) | _rotary([2, 1, 1]))


def internvl():
    """Tiles and a thumbnail, between tokens that begin and end a picture."""
    names = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>")
    tokenizer = _tokenizer(**names, video_token="<video>")
    images = tf.GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    blind = type("InternVLProcessor", (Unchecked, tf.InternVLProcessor), {})
    template = _template(tokenizer, "<IMG_CONTEXT>")
    processor = blind(images, tokenizer, NoVideos(CLIPS), image_seq_length=16, chat_template=template)
    config = tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**_VISION, image_size=[SIDE, SIDE], patch_size=[4, 4]),
        text_config=tf.Qwen2Config(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    return tf.InternVLForConditionalGeneration(config), processor


def smolvlm():
    """As Idefics3, whose processor it has."""
    model, processor = idefics3()
    images = tf.SmolVLMImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    blind = type("SmolVLMProcessor", (Unchecked, tf.SmolVLMProcessor), {})
    clips, words = NoVideos(CLIPS), processor.tokenizer
    processor = blind(images, words, clips, image_seq_len=16, chat_template=processor.chat_template)
    settings = {name: value for name, value in model.config.to_dict().items() if name != "model_type"}
    for part in ("text_config", "vision_config"):
        settings[part] = model.config.to_dict()[part]
    settings["vision_config"]["model_type"] = "smolvlm_vision"
    return tf.SmolVLMForConditionalGeneration(tf.SmolVLMConfig(**settings)), processor


def llava_onevision():
    """Tiles of any number, unpadded, with newlines between their rows."""
    tokenizer = _tokenizer()
    grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    images = tf.LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=grid)
    blind = type("LlavaOnevisionProcessor", (Unchecked, tf.LlavaOnevisionProcessor), {})
    options = dict(num_image_tokens=64, vision_feature_select_strategy="full", chat_template=tokenizer.chat_template)
    processor = blind(images, tokenizer, NoVideos(CLIPS), **options)
    config = tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(**_VISION, image_size=SIDE, patch_size=4),
        text_config=tf.Qwen2Config(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grid,
        tie_word_embeddings=False,
    )
    return tf.LlavaOnevisionForConditionalGeneration(config), processor


def llava_next_video():
    """As LLaVA-NeXT; clips would be pooled by four."""
    model, still = llava_next()
    blind = type("LlavaNextVideoProcessor", (Unchecked, tf.LlavaNextVideoProcessor), {})
    options = dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    words = still.tokenizer
    processor = blind(NoVideos(CLIPS), still.image_processor, words, chat_template=still.chat_template, **options)
    config = tf.LlavaNextVideoConfig(
        vision_config=model.config.vision_config,
        text_config=model.config.text_config,
        image_token_index=model.config.image_token_id,
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=model.config.image_grid_pinpoints,
        tie_word_embeddings=False,
    )
    return tf.LlavaNextVideoForConditionalGeneration(config), processor


def gemma3():
    """A fixed number of tokens between two of the processor's own, with which pictures attend to all of themselves."""
    names = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    tokenizer = _tokenizer(**names)
    images = tf.Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    template = "{{ bos_token }}" + _template(tokenizer, "<start_of_image>")
    processor = tf.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=16)
    text = dict(head_dim=8, sliding_window=64, query_pre_attn_scalar=8)
    text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    config = tf.Gemma3Config(
        vision_config=tf.SiglipVisionConfig(**_VISION, image_size=SIDE, patch_size=4),
        text_config=tf.Gemma3TextConfig(**_text(tokenizer), **text),
        image_token_index=tokenizer.image_token_id,
        mm_tokens_per_image=16,
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        tie_word_embeddings=False,
    )
    return tf.Gemma3ForConditionalGeneration(config), processor


def aya_vision():
    """Tiles and a thumbnail between tokens of their own, four patches a token."""
    tokenizer = _tokenizer("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "TILE", "TILE_GLOBAL")
    images = tf.GotOcr2ImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, min_patches=1, max_patches=3
    )
    names = dict(start_of_img_token="<|START_OF_IMG|>", end_of_img_token="<|END_OF_IMG|>", tile_token="TILE")
    names |= dict(tile_global_token="TILE_GLOBAL", img_patch_token="<|IMG_PATCH|>", image_token="<image>")
    template = "{{ bos_token }}" + tokenizer.chat_template
    options = dict(patch_size=4, img_size=SIDE, downsample_factor=2, chat_template=template)
    processor = tf.AyaVisionProcessor(images, tokenizer, **options, **names)
    config = tf.AyaVisionConfig(
        vision_config=tf.SiglipVisionConfig(**_VISION, image_size=SIDE, patch_size=4),
        text_config=tf.Cohere2Config(**_text(tokenizer), sliding_window=64),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
        tie_word_embeddings=False,
    )
    return tf.AyaVisionForConditionalGeneration(config), processor


WITH_PROCESSOR = {
    family.__name__: family
    for family in (
        idefics3,
        llava_next,
        qwen2_vl,
        qwen2_5_vl,
        qwen3_vl,
        internvl,
        smolvlm,
        llava_onevision,
        llava_next_video,
        gemma3,
        aya_vision,
    )
}


def write(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model, processor = WITH_PROCESSOR[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
