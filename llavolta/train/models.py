"""Loading a model, making one of its parts, and saying what of it trains."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
)
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import is_torchvision_available

from llavolta.compression.families import find_parts, roles, towers, unwrap
from llavolta.data.video import FrameProcessor, VideoLlavaProcessor, without_videos
from llavolta.errors import UserError
from llavolta.quiet import quiet
from llavolta.train.config import ConfigError, TrainConfig
from llavolta.worlds import MODELS, model_path
from llavolta.worlds.joining import load_whole

ADAPTERS = "adapter_config.json"  # what a folder of adapters holds
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def has_bfloat16() -> bool:
    """Whether this machine has instructions for products of bfloat16: a GPU that does, or a CPU with AMX or AVX-512
    BF16. Without them they are several times slower than those of float32 on a CPU, not faster."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    names = (
        "_is_amx_tile_supported",
        "_is_avx512_bf16_supported",
    )  # torch has no public names for them
    return any(getattr(torch.cpu, name, bool)() for name in names)


def autocasts(config: TrainConfig) -> bool:
    """Whether a run of ``config`` autocasts to bfloat16 on this machine."""
    return has_bfloat16() if config.bf16 == "auto" else config.bf16


def read_config(name: str):
    """The configuration of the vision-language model ``name``, or of that whose adapters are there. Raises ConfigError
    if it is none, or unreadable."""
    path = whole_path(name)
    try:
        if "mm_vision_tower" in PretrainedConfig.get_config_dict(path)[0]:
            raise ConfigError(
                f"{name} is in LLaVA's original format; use a converted one, such as llava-hf/llava-1.5-7b-hf"
            )
        config = AutoConfig.from_pretrained(path)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r} cannot be read: {str(error).splitlines()[0]}") from None
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ConfigError(
            f"{name} is a {config.model_type}, a model without pictures; give a vision-language model, or make one "
            "with vision_tower and language_model"
        )
    return config


def whole_path(name: str) -> str:
    """Where the model ``name`` is; where ``name`` holds adapters, the model that they were trained on."""
    path = model_path(name)
    while (Path(path) / ADAPTERS).exists():
        with _reading_adapters(path):
            path = model_path(_base_of(path))
    return path


def source_dtype(config: TrainConfig) -> torch.dtype:
    """The dtype that the model which ``config`` starts from says that its weights have; float32 if it does not."""
    read = AutoConfig.from_pretrained(whole_path(config.language_model or config.model))
    dtype = read.dtype or read.get_text_config().dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


@quiet()
def load_model(name: str, quantize: str | None = None, dtype: torch.dtype = torch.float32) -> tuple:
    """(model, processor) of a Hugging Face folder or hub name; "embedded" is the one in data/.

    A folder of adapters is loaded with the model that they were trained on, and merged into it. quantize: "nf4".
    Raises ConfigError when weights are missing, which ``from_pretrained`` would fill with random numbers.
    """
    path = model_path(name)
    if (Path(path) / ADAPTERS).exists():
        if (
            quantize
        ):  # of a base that holds adapters itself: they would have to be merged into 4 bits
            raise ConfigError(
                f"{path} holds adapters, which cannot be merged into 4 bits; give a whole model"
            )
        return _with_its_adapters(path, dtype)
    config = read_config(name)
    options = {"quantization_config": _four_bits(config)} if quantize else {}
    return load_whole(AutoModelForImageTextToText, path, dtype=dtype, **options), load_processor(
        config, path
    )


def _with_its_adapters(path: str, dtype: torch.dtype) -> tuple:
    """The model that the adapters in the folder ``path`` were trained on, with them merged in, and its processor."""
    with _reading_adapters(path):
        model, processor = load_model(_base_of(path), dtype=dtype)
        return PeftModel.from_pretrained(model, path).merge_and_unload(), processor


def _base_of(path: str) -> str:
    """The model that the adapters in the folder ``path`` were trained on."""
    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    beside = (
        Path(path).parent / Path(base).name
    )  # where the run's own base is after the run was moved
    if Path(base).is_absolute() and not Path(base).exists():
        if not beside.exists():
            raise ConfigError(
                f"{path} holds adapters of {base}, which is gone; put it there or at {beside}"
            )
        return str(beside)
    return base


@contextmanager
def _reading_adapters(path: str):
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(
            f"the adapters in {path} cannot be read ({why}); the folder is damaged"
        ) from None


@quiet()
def load_to_adapt(name: str, config: TrainConfig) -> tuple:
    """(model, processor) as ``load_model``, with adapters to be trained by ``config``: new ones, or those in the folder
    ``name``, which are trained on if they have the form that ``config`` asks for and are merged otherwise."""
    path = model_path(name)
    held = path if (Path(path) / ADAPTERS).exists() else None
    with _reading_adapters(path) if held else nullcontext():
        base = _base_of(path) if held else name
        model, processor = load_model(base, config.quantize)
        set_trainable(model, "instruct", config.train_tower)
        if base not in MODELS and Path(base).exists():
            base = str(Path(base).resolve())  # the adapters may be loaded from elsewhere
        return with_adapters(model, config, base, held), processor


def save_plain(model, folder: Path) -> None:
    """Save ``model`` under the names of public checkpoints, which other programs read."""
    # transformers keeps the names of the folder that a model was loaded from, here a checkpoint.
    vars(model).pop("_weight_conversions", None)
    model.save_pretrained(folder)


@quiet()
def load_processor(config, path: str):
    """The processor at ``path`` for the model that ``config`` describes, also without torchvision: then that of
    Video-LLaVA reads clips by ours, that of others reads none. Raises ConfigError."""
    if config.model_type != "video_llava":
        try:
            kind = PROCESSOR_MAPPING.get(type(config), None)
            reads_clips = (
                hasattr(kind, "get_attributes") and "video_processor" in kind.get_attributes()
            )
            blind = reads_clips and not is_torchvision_available()
            processor = without_videos(kind, path) if blind else AutoProcessor.from_pretrained(path)
        except ImportError as error:
            why = next(iter(str(error).strip().splitlines()))
            if "orchvision" in why:
                why = "it needs torchvision, which is not installed"
            raise ConfigError(f"the processor of {path} cannot be read: {why}") from None
        if getattr(processor, "patch_size", 0) is None:  # with which it counts a picture's tokens
            size = getattr(getattr(config, "vision_config", None), "patch_size", "...")
            raise ConfigError(
                f'{path}/processor_config.json has no patch_size; add "patch_size": {size}'
            )
        return processor
    from transformers import (
        CLIPImageProcessor,
    )  # warns of a missing torchvision as soon as it is imported

    images = CLIPImageProcessor.from_pretrained(
        path
    )  # the one of its own that some have calls pixel_values otherwise
    settings, _ = VideoLlavaProcessor.get_processor_dict(path)
    parts = [images, FrameProcessor(images), AutoTokenizer.from_pretrained(path)]
    return VideoLlavaProcessor.from_args_and_dict(parts, settings)


def _four_bits(config):
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ConfigError("quantize 'nf4' needs the package bitsandbytes; pip install bitsandbytes")
    with torch.device("meta"):
        role = roles(AutoModelForImageTextToText.from_config(config))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", *role.projector, *role.tower],
    )


def set_trainable(model, phase: str, train_tower: bool = False) -> None:
    """Freeze what LLaVA freezes: in "align" all but the projector, in "instruct" the tower unless ``train_tower``."""
    top = unwrap(model)
    role = roles(top)
    if not role.projector or not role.tower:
        lacks = "projector" if role.tower else "vision tower"
        raise ConfigError(
            f"{type(top).__name__}: no {lacks} was found in its structure, so nothing can be frozen"
        )
    for name, parameter in top.named_parameters():
        of = role.of(name)
        trains = of == "projector" if phase == "align" else of != "tower" or train_tower
        if parameter.is_floating_point():
            parameter.requires_grad_(trains)


def with_adapters(model, config: TrainConfig, base: str, held: str | None = None) -> PeftModel:
    """``model`` with LoRA in the linear layers of its decoder; the projector (and tower) train whole. See TrainConfig.
    Lone parameters beside them, such as LLaVA-NeXT's newline, stay as they are.

    base: the folder of ``model``, which the adapters' folder will name. held: a folder of adapters of ``model``, to be
    trained on, or merged if ``config`` asks for others.
    """
    if config.quantize:
        model = prepare_model_for_kbit_training(model, config.gradient_checkpointing)
    modules = dict(model.named_modules())
    whole = [name for name in roles(model).projector if name in modules]
    whole += [name for name in roles(model).tower if config.train_tower]
    lists = {
        name: [f"{name}.{inner}" for inner, _ in modules[name].named_children()] for name in whole
    }
    whole = [
        part
        for name in whole
        for part in (lists[name] if isinstance(modules[name], nn.ModuleList) else [name])
    ]
    prefix = next(name for name, module in modules.items() if module is find_parts(model).decoder)
    inside = find_parts(model).layers.named_modules()
    linear = [f"{prefix}.layers.{name}" for name, module in inside if isinstance(module, nn.Linear)]
    model.name_or_path = model.config.name_or_path = base
    wanted = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules=linear,
        modules_to_save=_outermost(whole),
    )
    adapted = get_peft_model(model, wanted)
    if held is None:
        return adapted
    found, weights = PeftConfig.from_pretrained(held), load_file(Path(held) / ADAPTER_WEIGHTS)
    if found.lora_alpha == wanted.lora_alpha and _shapes(weights) == _shapes(
        get_peft_model_state_dict(adapted)
    ):
        set_peft_model_state_dict(adapted, weights)
        return adapted
    if config.quantize:
        raise ConfigError(
            f"{held} holds adapters of another form (rank {found.r}, lora_alpha {found.lora_alpha}), which cannot be "
            "merged into 4 bits; ask for that form, or give a whole model"
        )
    model = PeftModel.from_pretrained(adapted.unload(), held).merge_and_unload()
    model.name_or_path = model.config.name_or_path = held
    return get_peft_model(model, wanted)


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}


def _outermost(names: list[str]) -> list[str]:
    """``names`` without those that stand within another."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def parameter_groups(
    model, weight_decay: float, decayed: set[str], rates: dict[str, float | None]
) -> list[dict]:
    """Groups for the optimizer, which hold every parameter that trains once.

    Args:
        model: The model, wrapped or not.
        weight_decay: That of the parameters that decay.
        decayed: Their names in the unwrapped model.
        rates: Learning rates by role ("projector", "tower", "language"). None, or no rate: the run's.
    """
    top, role = unwrap(model), roles(model)
    groups: dict[tuple, dict] = {}
    for name, parameter in top.named_parameters():
        if parameter.requires_grad:
            rate = rates.get(role.of(name))
            decay = weight_decay if name in decayed else 0.0
            group = groups.setdefault((rate, decay), {"params": [], "weight_decay": decay})
            group["params"].append(parameter)
            if rate is not None:
                group["lr"] = rate
    return list(groups.values())


def spare_frozen_towers(model) -> None:
    """No checkpointing in towers that do not train: no backward pass comes there, and on a GPU its bookkeeping takes
    longer than the tower's layers do (twice the time of a CLIP ViT-L/14-336 on an H100)."""
    for tower in towers(find_parts(model)).values():
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            for module in tower.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False
