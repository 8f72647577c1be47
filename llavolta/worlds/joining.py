"""A LLaVA-1.5 of two trained parts: any tower with a grid of patches, any causal language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
)

from llavolta.errors import ConfigError

# The conversation of Vicuna v1.5 and LLaVA-1.5: a system message, theirs unless there is one, then the turns.
VICUNA_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. {% endif %}"
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }} {% else %}"
    "{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def load_whole(kind: type, path: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A model whose weights are all in the folder ``path``. Raises ConfigError if some are missing or damaged."""
    try:
        model, info = kind.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ConfigError(
            f"the weights in {path} cannot be read ({error}); the file is damaged"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"{path} lacks {len(missing)} weights of its model, such as {missing[0]}; the folder is damaged"
        )
    return model


@dataclass(frozen=True)
class Grid:
    """What a tower gives of a picture. side: patches along it. others: tokens before them (class token, registers)."""

    side: int
    others: int

    @property
    def visual_tokens(self) -> int:
        """LLaVA drops the first token where there are others; registers, which are no first token, stay."""
        return self.side**2 + max(0, self.others - 1)


def tower_grid(name: str, config: PretrainedConfig) -> Grid:
    """The grid of the model in the folder ``name``, of this ``config``, found without its weights.

    Its pictures are as large as its image processor makes them, which DINOv2 reads at any size (the hub's at 224
    pixels, not the 518 of its configuration). Raises ConfigError unless it can be the vision tower of ``join``.
    """
    vision = getattr(
        config, "vision_config", config
    )  # CLIP's and SigLIP's checkpoints hold a text model, too
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    wanted = "give a CLIP, SigLIP, DINOv2 or another model with one grid of patches a picture"
    if not isinstance(size, int) or not isinstance(patch, int) or size < patch:
        raise ConfigError(
            f"vision_tower {name}: a {config.model_type} has no grid of square patches; {wanted}"
        )
    size = _picture_size(name) or size
    try:
        with torch.device("meta"):
            seen = _tower(AutoModel.from_config(vision))(
                torch.zeros(1, 3, size, size), output_hidden_states=True
            )
        shape = tuple(seen.hidden_states[-2].shape)
    except Exception as error:  # whatever a model that is no such tower makes of a picture
        raise ConfigError(
            f"vision_tower {name}: a {config.model_type} reads no picture ({error}); {wanted}"
        ) from None
    side = size // patch
    others = shape[1] - side**2 if len(shape) == 3 else -1
    if not 0 <= others <= 16:
        raise ConfigError(
            f"vision_tower {name}: a {config.model_type} gives {shape}, no {side} x {side} grid; {wanted}"
        )
    return Grid(side, others)


def _picture_size(name: str) -> int | None:
    """The side in pixels of what the image processor in the folder ``name`` makes of a picture; None without one."""
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        return None
    pixels = processor(torch.zeros(3, 64, 64, dtype=torch.uint8), return_tensors="pt")[
        "pixel_values"
    ]
    return pixels.shape[-1]


def _tower(model: nn.Module) -> nn.Module:
    return getattr(model, "vision_model", model)


def join(
    vision_tower: str, language_model: str
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA-1.5 of two trained parts and a new projector, and its processor; float32.

    vision_tower: folder or hub name of a model that AutoModel loads and that has a grid of patches; its penultimate
    layer is read, without the class token where there is one (see ``tower_grid``). language_model: of a causal language
    model with a tokenizer; <image> and a padding token are added to its words, tied embeddings stay tied. Raises
    ConfigError for what cannot be joined.
    """
    grid = tower_grid(vision_tower, AutoConfig.from_pretrained(vision_tower))
    tower = _tower(AutoModel.from_pretrained(vision_tower, dtype=torch.float32))
    language = load_whole(AutoModelForCausalLM, language_model)
    decoder = language.base_model
    if not hasattr(decoder, "layers") or not hasattr(decoder, "rotary_emb"):
        raise ConfigError(
            f"language_model {language_model}: a {language.config.model_type} has no decoder layers with rotary "
            "positions, which compression works on; give one of Llama's make"
        )
    tokenizer = AutoTokenizer.from_pretrained(language_model, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    language.resize_token_embeddings(
        len(tokenizer), pad_to_multiple_of=64 if len(tokenizer) > 1000 else None
    )

    strategy = "default" if grid.others else "full"
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=grid.visual_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy=strategy,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration(config)
    _copy(tower, model.model.vision_tower, vision_tower)
    _copy(decoder, model.model.language_model, language_model)
    _copy(language.lm_head, model.lm_head, language_model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = LlavaProcessor(
        AutoImageProcessor.from_pretrained(vision_tower),
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=grid.others,
        chat_template=_multimodal_template(tokenizer, language_model),
    )
    return model, processor


# Before a template that takes a message's content for text: the text that its parts come to.
_PARTS_TO_TEXT = (
    "{% set told = namespace(messages=[]) %}{% for message in messages %}{% set text %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}"
    "{% endif %}{% endset %}{% set told.messages = told.messages + [dict(message, content=text)] %}{% endfor %}"
    "{% set messages = told.messages %}"
)


def _multimodal_template(tokenizer, name: str) -> str:
    """The tokenizer's own chat template, made to take pictures where it takes text alone; Vicuna's if it has none.

    Raises ConfigError if neither way a picture and the words beside it are written in their order.
    """
    own = tokenizer.chat_template
    if not own:
        return VICUNA_TEMPLATE
    looked, said = (
        [{"type": "image"}, {"type": "text", "text": "what"}],
        [{"type": "text", "text": "this"}],
    )
    messages = [{"role": "user", "content": looked}, {"role": "assistant", "content": said}]
    for template in (own, _PARTS_TO_TEXT + own):
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception:  # Jinja raises whatever a template makes of a list
            continue
        places = [text.find(part) for part in ("<image>", "what", "this")]
        if (
            -1 < places[0] < places[1] < places[2] and "'type'" not in text
        ):  # which a printed list would hold
            return template
    raise ConfigError(
        f"the chat template of {name} writes no pictures; give its tokenizer one that does"
    )


def _copy(source: nn.Module, target: nn.Module, name: str) -> None:
    """Weights by name, whatever of them is wrapped in ``vision_model``."""
    plain = {key.removeprefix("vision_model."): value for key, value in source.state_dict().items()}
    wanted = list(target.state_dict())
    renamed = {key: plain.get(key.removeprefix("vision_model.")) for key in wanted}
    missing = [key for key, value in renamed.items() if value is None]
    if missing:
        raise ConfigError(
            f"{name} lacks {len(missing)} weights that LLaVA needs, such as {missing[0]}"
        )
    target.load_state_dict(renamed)
