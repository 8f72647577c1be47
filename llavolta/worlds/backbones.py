"""Build the tiny LLaVA and Video-LLaVA that come with the package, and their processors.

LLaVA starts from CLIP and Vicuna. The embedded model starts from a CLIP vision tower and a Llama
language model of 1/4000 of their size, pre-trained in the same spirit. The tower has learned from
images alone what each patch shows and where. The language model has learned the questions, with
scenes described in its own words, and has never seen a pixel. Neither has seen a held-out digit.

The projector between them is untrained, which is what projector alignment is for. The language
model knows nothing of images, which is what instruction tuning is for.
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
# "USER: <image>\nquestion ASSISTANT: answer</s>", for content that is text or a list of parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Return a word-level, lower-case tokenizer of the digits questions' words, about 40.

    Args:
        more: Further words.
    """
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
    bos = ("<s>", vocabulary["<s>"])  # put before every text, as Llama's tokenizers do
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
    """Return the processor of the embedded model, with CLIP's normalisation.

    Args:
        size: Side of an image in pixels.
        patch: Side of a patch in pixels; each patch is one visual token.
    """
    # Imported here, since the import warns where torchvision is missing.
    from transformers import CLIPImageProcessor

    image_processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    return LlavaProcessor(
        image_processor,
        tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token
        chat_template=CHAT_TEMPLATE,
    )


def vision_config(**changes) -> CLIPVisionConfig:
    """Return the configuration of the tower: 5 layers of width 128.

    ``changes`` replace single fields.
    """
    sizes = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4)
    return CLIPVisionConfig(
        **{**sizes, "image_size": digits.SIZE, "patch_size": digits.PATCH, **changes}
    )


def text_config(**changes) -> LlamaConfig:
    """Return the configuration of the language model: 8 decoder layers of width 128.

    Widths this small need initial weights near 1/sqrt(width) in place of 0.02. ``changes`` replace
    single fields.
    """
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
    """Return a LLaVA of two trained parts and a new projector.

    Args:
        tower: The vision tower.
        language_model: The language model.
        seed: Seed of the projector's weights.
    """
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
    """Return ``model`` with the weights of the two parts, and a new projector."""
    for name, part in model.model.named_children():
        if name.endswith("_tower"):
            part.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    # The default standard deviation, 0.02, is too small at this width.
    for part in model.model.multi_modal_projector.modules():
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=part.in_features**-0.5)
            torch.nn.init.zeros_(part.bias)
    return model


def video_llava(
    model: LlavaForConditionalGeneration, seed: int = 0
) -> VideoLlavaForConditionalGeneration:
    """Return a Video-LLaVA of a LLaVA's parts and a new projector, for frames of 48 x 48 pixels.

    A frame has 6 x 6 patches. The tower keeps every second position embedding in each direction, so
    that a frame spans the positions of a whole scene. The words of the questions on clips are added
    to the language model, untrained; ``model`` itself changes with it.

    Args:
        model: The LLaVA.
        seed: Seed of the new weights.
    """
    torch.manual_seed(seed)
    side = clips.SIZE // digits.PATCH
    tower = CLIPVisionModel(vision_config(image_size=clips.SIZE))
    weights = model.model.vision_tower.state_dict()
    name = next(name for name in weights if name.endswith("position_embedding.weight"))
    # Position 0 is the class token's; the others form a 12 x 12 grid, of which 6 x 6 remain.
    places = weights[name][1:].view(digits.TOKENS, digits.TOKENS, -1)[::2, ::2].reshape(side**2, -1)
    tower.load_state_dict(weights | {name: torch.cat([weights[name][:1], places])})
    language_model = language_model_of(model)  # shares its weights, so ``model`` is resized with it
    language_model.resize_token_embeddings(len(tokenizer(clips.vocabulary())))
    ids = dict(zip(SPECIAL, range(len(SPECIAL)), strict=True))
    config = VideoLlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_seq_length=side**2,
        video_seq_length=FRAMES * (side**2 + 1),  # with the class token of each frame
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=False,
    )
    return _fill(VideoLlavaForConditionalGeneration(config), tower, language_model)


def embedded_video() -> Path:
    """Return the folder of the embedded parts' Video-LLaVA, made on first use."""

    def write(folder: Path, **make) -> None:
        model = LlavaForConditionalGeneration.from_pretrained(TINY_LLAVA, dtype=torch.float32)
        save(video_llava(model), folder, words=video_processor())

    return digits.build_once(DATA / "cache" / "tiny-video-llava", {"version": 1}, write)


def video_processor() -> VideoLlavaProcessor:
    """Return the processor of the embedded Video-LLaVA."""
    images = processor(clips.SIZE).image_processor
    return VideoLlavaProcessor(
        images,
        FrameProcessor(images),
        tokenizer(clips.vocabulary()),
        patch_size=digits.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which images drop and frames keep
        chat_template=CHAT_TEMPLATE,
    )


def language_model_of(model: LlavaForConditionalGeneration) -> LlamaForCausalLM:
    """Return the language model of a LLaVA as a causal language model that shares its weights."""
    language_model = LlamaForCausalLM(model.config.text_config)
    language_model.model, language_model.lm_head = model.model.language_model, model.lm_head
    return language_model.eval()


def save(model, folder: str | Path, log: dict | None = None, words=None) -> Path:
    """Write a model and its processor to a plain Hugging Face folder.

    Weights are stored in half precision, to be small. The configuration says float32, the type that
    the model is trained in, as in the folder of a finished run.

    Args:
        model: The model. It is returned to float32, with the precision of half lost.
        folder: The folder to write.
        log: Training logs of the parts, written beside the model as ``backbones.json``.
        words: The processor. None: that of the embedded LLaVA.

    Returns:
        The folder.
    """
    folder = Path(folder)
    model.half().save_pretrained(folder)
    (words or processor()).save_pretrained(folder)
    model.float().config.dtype = torch.float32
    model.config.save_pretrained(folder)
    if log is not None:
        (folder / "backbones.json").write_text(json.dumps(log))
    return folder
