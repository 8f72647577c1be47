"""Join a vision tower and a language model, both pre-trained, into a LLaVA-1.5.

The tower may be any model with one grid of patches per image. The language model may be any causal
one with rotary positions.
"""

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

# The format of Vicuna v1.5 and LLaVA-1.5: a system message, theirs unless the conversation has one,
# then the turns.
VICUNA_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. {% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }} {% else %}"
    "{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def load_whole(kind: type, path: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """Load a model all of whose weights must be in its folder.

    Args:
        kind: A class with ``from_pretrained``.
        path: The folder.
        dtype: Data type of the weights.
        **options: Others of ``from_pretrained``.

    Raises:
        ConfigError: Weights are missing or damaged.
    """
    try:
        model, info = kind.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    except SafetensorError as error:
        raise ConfigError(
            f"the weights in {path} cannot be read ({error}); the file is damaged"
        ) from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise ConfigError(
            f"{path} lacks {len(missing)} weights of its model, such as {missing[0]}; "
            "the folder is damaged"
        )
    return model


@dataclass(frozen=True)
class Grid:
    """The tokens that a vision tower makes of an image.

    Attributes:
        side: Patches along a side of the image.
        others: Tokens before the patches: a class token and registers.
    """

    side: int
    others: int

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of an image.

        LLaVA drops the first of the tokens before the patches; others, such as registers, stay.
        """
        return self.side**2 + max(0, self.others - 1)


def tower_grid(name: str, config: PretrainedConfig) -> Grid:
    """Find the grid of a vision tower without its weights.

    Images have the size that the tower's image processor gives them. DINOv2 reads any size, so that
    may differ from its configuration (224 pixels for the hub's checkpoints, not 518).

    Args:
        name: The folder or hub name of the tower, for its image processor.
        config: Its configuration.

    Raises:
        ConfigError: It cannot be the vision tower of ``join``.
    """
    # Checkpoints of CLIP and SigLIP hold a text model, too.
    vision = getattr(config, "vision_config", config)
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    wanted = "give a CLIP, SigLIP, DINOv2 or another model with one grid of patches a picture"
    if not isinstance(size, int) or not isinstance(patch, int) or size < patch:
        raise ConfigError(
            f"vision_tower {name}: a {config.model_type} has no grid of square patches; {wanted}"
        )
    size = _picture_size(name) or size
    # A run on shapes alone shows how many tokens the tower makes of an image.
    try:
        with torch.device("meta"):
            seen = _tower(AutoModel.from_config(vision))(
                torch.zeros(1, 3, size, size), output_hidden_states=True
            )
        shape = tuple(seen.hidden_states[-2].shape)
    except Exception as error:  # a model that is no such tower may raise anything
        raise ConfigError(
            f"vision_tower {name}: a {config.model_type} reads no picture ({error}); {wanted}"
        ) from None
    side = size // patch
    others = shape[1] - side**2 if len(shape) == 3 else -1  # below 0: no grid
    if not 0 <= others <= 16:
        raise ConfigError(
            f"vision_tower {name}: a {config.model_type} gives {shape}, "
            f"no {side} x {side} grid; {wanted}"
        )
    return Grid(side, others)


def _picture_size(name: str) -> int | None:
    """Return the side in pixels that an image processor gives images; None without one."""
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError):
        return None
    pixels = processor(torch.zeros(3, 64, 64, dtype=torch.uint8), return_tensors="pt")[
        "pixel_values"
    ]
    return pixels.shape[-1]


def _tower(model: nn.Module) -> nn.Module:
    """Return the vision model inside a CLIP-like model, or the model itself."""
    return getattr(model, "vision_model", model)


def join(
    vision_tower: str, language_model: str
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Join two trained parts and a new projector into a LLaVA-1.5, in float32.

    Args:
        vision_tower: Folder or hub name of a model that AutoModel loads and that has one grid of
            patches. Its penultimate layer is read, without the class token if it has one: see
            ``tower_grid``.
        language_model: Folder or hub name of a causal language model with a tokenizer. <image> and,
            if there is none, a padding token are added to its vocabulary. Tied embeddings stay
            tied.

    Returns:
        The model and its processor.

    Raises:
        ConfigError: The parts cannot be joined.
    """
    grid = tower_grid(vision_tower, AutoConfig.from_pretrained(vision_tower))
    tower = _tower(AutoModel.from_pretrained(vision_tower, dtype=torch.float32))
    language = load_whole(AutoModelForCausalLM, language_model)
    decoder = language.base_model
    if not hasattr(decoder, "layers") or not hasattr(decoder, "rotary_emb"):
        raise ConfigError(
            f"language_model {language_model}: a {language.config.model_type} has no decoder "
            "layers with rotary positions, which compression works on; give one of Llama's make"
        )
    tokenizer = AutoTokenizer.from_pretrained(language_model, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})  # the placeholder
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    language.resize_token_embeddings(
        len(tokenizer), pad_to_multiple_of=64 if len(tokenizer) > 1000 else None
    )

    strategy = "default" if grid.others else "full"  # "default" drops the first token
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


# Put before a template that takes text only: it joins the parts of each message's content to text.
_PARTS_TO_TEXT = (
    "{% set told = namespace(messages=[]) %}{% for message in messages %}{% set text %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}"
    "{% endif %}{% endset %}"
    "{% set told.messages = told.messages + [dict(message, content=text)] %}{% endfor %}"
    "{% set messages = told.messages %}"
)


def _multimodal_template(tokenizer, name: str) -> str:
    """Return the tokenizer's chat template, adapted to images if needed, or Vicuna's.

    Raises:
        ConfigError: The template does not write an image and the words beside it in their order.
    """
    own = tokenizer.chat_template
    if not own:
        return VICUNA_TEMPLATE
    looked, said = (
        [{"type": "image"}, {"type": "text", "text": "what"}],
        [{"type": "text", "text": "this"}],
    )
    messages = [{"role": "user", "content": looked}, {"role": "assistant", "content": said}]
    # A conversation with an image shows whether a template writes image and words in their order.
    for template in (own, _PARTS_TO_TEXT + own):
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception:  # a template that expects text may raise anything on a list
            continue
        places = [text.find(part) for part in ("<image>", "what", "this")]
        # A template that prints the list of parts as it is would write "'type'".
        if -1 < places[0] < places[1] < places[2] and "'type'" not in text:
            return template
    raise ConfigError(
        f"the chat template of {name} writes no pictures; give its tokenizer one that does"
    )


def _copy(source: nn.Module, target: nn.Module, name: str) -> None:
    """Copy weights by name, with or without a leading ``vision_model``."""
    plain = {key.removeprefix("vision_model."): value for key, value in source.state_dict().items()}
    wanted = list(target.state_dict())
    renamed = {key: plain.get(key.removeprefix("vision_model.")) for key in wanted}
    missing = [key for key, value in renamed.items() if value is None]
    if missing:
        raise ConfigError(
            f"{name} lacks {len(missing)} weights that LLaVA needs, such as {missing[0]}"
        )
    target.load_state_dict(renamed)
