"""The tiny pre-trained parts of the embedded LLaVA: a CLIP vision tower, a Llama language model, a processor.

LLaVA starts from CLIP and Vicuna; the embedded model starts from these two, made the same way at 1/4000 of
the size. The tower learns from pictures alone what each patch shows and where; the language model learns the
questions on scenes given in its own words, never seeing a pixel. Neither sees a held-out digit. What joins
them, the projector, is left to projector alignment, and everything about pictures in the language model to
instruction tuning: the two phases that the package studies.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from llavolta.data.video import FRAMES, FrameProcessor, VideoLlavaProcessor
from llavolta.paths import DATA, TINY_LLAVA
from llavolta.worlds import clips, digits

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of the digits questions, lower case, 40-odd words, and ``more``."""
    vocabulary = {
        token: index for index, token in enumerate((*SPECIAL, *digits.vocabulary(), *more))
    }
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split("?", "isolated"),
            pre_tokenizers.Split(".", "isolated"),
        ]
    )
    bos = ("<s>", vocabulary["<s>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
    )


def processor(size: int = digits.SIZE, patch: int = digits.PATCH) -> LlavaProcessor:
    """The processor of the embedded model: CLIP's normalisation at ``size`` pixels, one token a patch."""
    from transformers import (
        CLIPImageProcessor,
    )  # warns of a missing torchvision as soon as it is imported

    image_processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return LlavaProcessor(
        image_processor,
        tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS
        chat_template=CHAT_TEMPLATE,
    )


def vision_config(**changes) -> CLIPVisionConfig:
    sizes = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4)
    return CLIPVisionConfig(
        **{**sizes, "image_size": digits.SIZE, "patch_size": digits.PATCH, **changes}
    )


def text_config(**changes) -> LlamaConfig:
    """8 decoder layers of width 128. Widths this small need initial weights near 1/sqrt(width), not 0.02."""
    sizes = dict(hidden_size=128, intermediate_size=344, num_hidden_layers=8, num_attention_heads=4)
    ids = dict(
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        vocab_size=len(SPECIAL) + len(digits.vocabulary()),
    )
    return LlamaConfig(
        **{**sizes, **ids, "max_position_embeddings": 2048, "initializer_range": 0.08, **changes}
    )


def assemble(
    tower: CLIPVisionModel, language_model: LlamaForCausalLM, seed: int = 0
) -> LlavaForConditionalGeneration:
    """A LLaVA of the two trained parts and a new projector."""
    torch.manual_seed(seed)
    ids = dict(zip(SPECIAL, range(len(SPECIAL)), strict=True))
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=ids["<image>"],
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=False,
    )
    return _fill(LlavaForConditionalGeneration(config), tower, language_model)


def _fill(model, tower: CLIPVisionModel, language_model: LlamaForCausalLM):
    """``model`` with the weights of its parts, and a new projector."""
    for name, part in model.model.named_children():
        if name.endswith("_tower"):
            part.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    for (
        part
    ) in model.model.multi_modal_projector.modules():  # the default 0.02 is too small at this width
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=part.in_features**-0.5)
            torch.nn.init.zeros_(part.bias)
    return model


def video_llava(
    model: LlavaForConditionalGeneration, seed: int = 0
) -> VideoLlavaForConditionalGeneration:
    """A Video-LLaVA of the parts of a LLaVA, with a new projector, for frames of 48 x 48 pixels (6 x 6 patches).

    The tower keeps every second position in each direction, so that a frame spans the places of a whole scene; the
    language model gets the words of the questions on clips, untrained.
    """
    torch.manual_seed(seed)
    side = clips.SIZE // digits.PATCH
    tower = CLIPVisionModel(vision_config(image_size=clips.SIZE))
    weights = model.model.vision_tower.state_dict()
    name = next(name for name in weights if name.endswith("position_embedding.weight"))
    places = weights[name][1:].view(digits.TOKENS, digits.TOKENS, -1)[::2, ::2].reshape(side**2, -1)
    tower.load_state_dict(weights | {name: torch.cat([weights[name][:1], places])})
    language_model = language_model_of(model)
    language_model.resize_token_embeddings(len(tokenizer(clips.vocabulary())))
    ids = dict(zip(SPECIAL, range(len(SPECIAL)), strict=True))
    config = VideoLlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_seq_length=side**2,
        video_seq_length=FRAMES * (side**2 + 1),  # with CLS
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=False,
    )
    return _fill(VideoLlavaForConditionalGeneration(config), tower, language_model)


def embedded_video() -> Path:
    """The folder of the Video-LLaVA of the embedded parts, made on first use."""

    def write(folder: Path, **make) -> None:
        model = LlavaForConditionalGeneration.from_pretrained(TINY_LLAVA, dtype=torch.float32)
        save(video_llava(model), folder, words=video_processor())

    return digits.build_once(DATA / "cache" / "tiny-video-llava", {"version": 1}, write)


def video_processor() -> VideoLlavaProcessor:
    """The processor of the embedded Video-LLaVA."""
    images = processor(clips.SIZE).image_processor
    return VideoLlavaProcessor(
        images,
        FrameProcessor(images),
        tokenizer(clips.vocabulary()),
        patch_size=digits.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, which is dropped from images and kept in frames
        chat_template=CHAT_TEMPLATE,
    )


def language_model_of(model: LlavaForConditionalGeneration) -> LlamaForCausalLM:
    """The language model of a LLaVA as a causal language model; shares its weights."""
    language_model = LlamaForCausalLM(model.config.text_config)
    language_model.model, language_model.lm_head = model.model.language_model, model.lm_head
    return language_model.eval()


def save(model, folder: str | Path, log: dict | None = None, words=None) -> Path:
    """Write the unaligned model and its processor (``words``; default: the LLaVA's) to ``folder``, a plain Hugging Face
    folder. The weights are stored in half precision, to be small; the configuration says float32, in which it is
    trained, and which a finished run has, too.

    log: the training logs of its parts, kept beside it as ``backbones.json``.
    """
    folder = Path(folder)
    model.half().save_pretrained(folder)
    (words or processor()).save_pretrained(folder)
    model.float().config.dtype = torch.float32
    model.config.save_pretrained(folder)
    if log is not None:
        (folder / "backbones.json").write_text(json.dumps(log))
    return folder
