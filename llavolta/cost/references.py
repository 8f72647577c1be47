"""Hold the configurations of published models.

They have the values of each model's config.json and preprocessor_config.json. Nothing is
downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import transformers as tf
from PIL import Image

from llavolta.cost.flops import of_tower
from llavolta.errors import UnsupportedModel


@dataclass(frozen=True)
class Reference:
    """A published model.

    Attributes:
        hub: Name of its checkpoint on the Hugging Face hub.
        config: Makes its Hugging Face config.
        images: Name of its image processor's class. Empty: each image is a square of the tower's
            size.
        settings: Settings of the image processor.
    """

    hub: str
    config: Callable[[], tf.PretrainedConfig]
    images: str = ""
    settings: dict = field(default_factory=dict)


def _llava_1_5() -> tf.LlavaConfig:
    vision = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    )
    text = dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    return tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            **vision, image_size=336, patch_size=14, projection_dim=768
        ),
        text_config=tf.LlamaConfig(
            **text, vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5
        ),
        image_token_index=32000,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


_QWEN2_7B = dict(
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)


def _qwen2_5_vl() -> tf.Qwen2_5_VLConfig:
    rotary = {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [16, 24, 24],
        }
    }
    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        patch_size=14,
        window_size=112,
    )
    vision |= dict(out_hidden_size=3584, fullatt_block_indexes=[7, 15, 23, 31])
    text = {**_QWEN2_7B, **rotary, "vocab_size": 152064}
    return tf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)


def _qwen3_vl() -> tf.Qwen3VLConfig:
    rotary = {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
        }
    }
    text = dict(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32
    )
    text |= dict(num_key_value_heads=8, head_dim=128, vocab_size=151936, **rotary)
    vision = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, patch_size=16)
    vision |= dict(
        out_hidden_size=4096, num_position_embeddings=2304, deepstack_visual_indexes=[8, 16, 24]
    )
    return tf.Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)


def _internvl3() -> tf.InternVLConfig:
    vision = dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16
    )
    return tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(
            **vision, image_size=[448, 448], patch_size=[14, 14], attention_bias=True
        ),
        text_config=tf.Qwen2Config(**_QWEN2_7B, vocab_size=151674),
        image_token_id=151667,
        image_seq_length=256,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def _smolvlm() -> tf.SmolVLMConfig:
    vision = dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    text = dict(
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15
    )
    return tf.SmolVLMConfig(
        vision_config=tf.SmolVLMVisionConfig(**vision, image_size=512, patch_size=16),
        text_config=tf.LlamaConfig(**text, num_key_value_heads=5, vocab_size=49280, pad_token_id=2),
        image_token_id=49190,
        scale_factor=4,
        tie_word_embeddings=False,
        pad_token_id=2,
    )


_ONEVISION_GRID = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]


def _llava_onevision() -> tf.LlavaOnevisionConfig:
    vision = dict(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16
    )
    return tf.LlavaOnevisionConfig(
        vision_config=tf.SiglipVisionConfig(
            **vision, image_size=384, patch_size=14, vision_use_head=False
        ),
        text_config=tf.Qwen2Config(**_QWEN2_7B, vocab_size=152000),
        image_token_index=151646,
        video_token_index=151647,
        image_grid_pinpoints=_ONEVISION_GRID,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


REFERENCES = {
    "llava-1.5-7b": Reference("llava-hf/llava-1.5-7b-hf", _llava_1_5),
    "qwen2.5-vl-7b": Reference(
        "Qwen/Qwen2.5-VL-7B-Instruct",
        _qwen2_5_vl,
        "Qwen2VLImageProcessor",
        dict(
            patch_size=14,
            merge_size=2,
            size={"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
        ),
    ),
    "qwen3-vl-8b": Reference(
        "Qwen/Qwen3-VL-8B-Instruct",
        _qwen3_vl,
        "Qwen2VLImageProcessor",
        dict(
            patch_size=16,
            merge_size=2,
            size={"shortest_edge": 64 * 64, "longest_edge": 4096 * 4096},
        ),
    ),
    "internvl3-8b": Reference(
        "OpenGVLab/InternVL3-8B-hf",
        _internvl3,
        "GotOcr2ImageProcessor",
        dict(
            size={"height": 448, "width": 448}, crop_to_patches=True, min_patches=1, max_patches=12
        ),
    ),
    "smolvlm-500m": Reference(
        "HuggingFaceTB/SmolVLM-500M-Instruct",
        _smolvlm,
        "SmolVLMImageProcessor",
        dict(size={"longest_edge": 2048}, max_image_size={"longest_edge": 512}),
    ),
    "llava-onevision-7b": Reference(
        "llava-hf/llava-onevision-qwen2-7b-ov-hf",
        _llava_onevision,
        "LlavaOnevisionImageProcessor",
        dict(size={"height": 384, "width": 384}, image_grid_pinpoints=_ONEVISION_GRID),
    ),
}
"""The published models by short name."""


def reference(name: str) -> Reference:
    """Return the Reference of that name. Raises UnsupportedModel if there is none."""
    if name not in REFERENCES:
        raise UnsupportedModel(
            f"no reference configuration {name!r}; there are {', '.join(REFERENCES)}"
        )
    return REFERENCES[name]


def reference_config(name: str = "llava-1.5-7b") -> tf.PretrainedConfig:
    """Return the Hugging Face config of a published model.

    Raises:
        UnsupportedModel: Unknown name.
    """
    return reference(name).config()


def pictures_of(name: str, size: tuple[int, int]) -> dict | None:
    """Return the processor's output for one image, as ``CostModel.step`` takes it.

    Args:
        name: A key of REFERENCES.
        size: Width and height in pixels.

    Returns:
        The inputs of the vision tower; None where each image is a square of the tower's size.

    Raises:
        UnsupportedModel: Unknown name.
    """
    known = reference(name)
    if not known.images:
        return None
    processor = getattr(tf, f"{known.images}Pil")(**known.settings)  # needs no torchvision
    return of_tower(processor(images=[Image.new("RGB", size)], return_tensors="pt"))
