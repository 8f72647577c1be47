"""Tiny models with their processors on disk, of families whose pictures transformers reads without torchvision."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from families_tiny import _TEXT, _VISION

from llavolta.worlds import backbones

SIDE = 32  # pixels; patches of 4


def _tokenizer(*more: str):
    tokenizer = backbones.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>", "<video>", *more]})
    return tokenizer


def _text(tokenizer, **more) -> dict:
    own = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {**_TEXT, **{name: getattr(tokenizer, name) for name in own}, "vocab_size": len(tokenizer), **more}


def idefics3():
    """Tiles and a whole picture, each between tokens of their own for rows and columns."""
    places = (f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    tokenizer = _tokenizer("<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places)
    images = tf.Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    processor = tf.Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template=tokenizer.chat_template)
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


WITH_PROCESSOR = {family.__name__: family for family in (idefics3, llava_next)}


def write(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model, processor = WITH_PROCESSOR[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
