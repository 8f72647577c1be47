"""Loads models and processors, chooses what of them trains, and saves them."""

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
    """Return whether this machine has instructions for products of bfloat16.

    That is a GPU that supports it, or a CPU with AMX or AVX-512 BF16. On other CPUs such products
    are several times slower than those of float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public functions for these.
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def autocasts(config: TrainConfig) -> bool:
    """Return whether a run of ``config`` autocasts to bfloat16 on this machine."""
    return has_bfloat16() if config.bf16 == "auto" else config.bf16


def read_config(name: str):
    """Read the configuration of a vision-language model, without its weights.

    Args:
        name: A folder, a hub name or a name of ``worlds.MODELS``. For a folder of adapters, the
            model that they were trained on is read.

    Returns:
        The transformers configuration.

    Raises:
        ConfigError: There is no such model, it cannot be read, or it reads no images.
    """
    path = whole_path(name)
    try:
        if "mm_vision_tower" in PretrainedConfig.get_config_dict(path)[0]:
            raise ConfigError(
                f"{name} is in LLaVA's original format; use a converted one, such as "
                "llava-hf/llava-1.5-7b-hf"
            )
        config = AutoConfig.from_pretrained(path)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"model {name!r} cannot be read: {str(error).splitlines()[0]}") from None
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ConfigError(
            f"{name} is a {config.model_type}, a model without pictures; give a vision-language "
            "model, or make one with vision_tower and language_model"
        )
    return config


def whole_path(name: str) -> str:
    """Return the folder or hub name of a model. For adapters: of the model they were trained on."""
    path = model_path(name)
    while (Path(path) / ADAPTERS).exists():  # the base may be a folder of adapters too
        with _reading_adapters(path):
            path = model_path(_base_of(path))
    return path


def source_dtype(config: TrainConfig) -> torch.dtype:
    """Return the dtype of the weights that a run starts from, as their configuration says it.

    It is float32 if the configuration does not say.
    """
    read = AutoConfig.from_pretrained(whole_path(config.language_model or config.model))
    dtype = read.dtype or read.get_text_config().dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


@quiet()
def load_model(name: str, quantize: str | None = None, dtype: torch.dtype = torch.float32) -> tuple:
    """Load a model and its processor.

    Adapters are loaded with the model that they were trained on, and merged into it.

    Args:
        name: A folder, a hub name or a name of ``worlds.MODELS``, such as "embedded".
        quantize: "nf4" loads the language model in 4 bits; None does not.
        dtype: The dtype of the weights.

    Returns:
        The model and the processor.

    Raises:
        ConfigError: The model cannot be read, or weights are missing, which ``from_pretrained``
            would fill with random numbers.
    """
    path = model_path(name)
    if (Path(path) / ADAPTERS).exists():
        if quantize:
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
    """Load adapters with the model that they were trained on, merged, and its processor."""
    with _reading_adapters(path):
        model, processor = load_model(_base_of(path), dtype=dtype)
        return PeftModel.from_pretrained(model, path).merge_and_unload(), processor


def _base_of(path: str) -> str:
    """Return the model that the adapters in the folder ``path`` were trained on."""
    base = PeftConfig.from_pretrained(path).base_model_name_or_path
    # If the run folder was moved, the path to its aligned model is wrong, but that model lies
    # beside the adapters.
    beside = Path(path).parent / Path(base).name
    if Path(base).is_absolute() and not Path(base).exists():
        if not beside.exists():
            raise ConfigError(
                f"{path} holds adapters of {base}, which is gone; put it there or at {beside}"
            )
        return str(beside)
    return base


@contextmanager
def _reading_adapters(path: str):
    """Turn the errors of damaged adapters into a ConfigError."""
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
    """Load a model and its processor, with adapters to be trained.

    If ``name`` is a folder of adapters of the form that ``config`` sets, these are trained further.
    Adapters of another form are merged into the model, which gets new ones.

    Args:
        name: A folder, a hub name or a name of ``worlds.MODELS``.
        config: The configuration of the run, with a lora_rank.

    Returns:
        The PEFT model and the processor.

    Raises:
        ConfigError: The model or its adapters cannot be read.
    """
    path = model_path(name)
    held = path if (Path(path) / ADAPTERS).exists() else None
    with _reading_adapters(path) if held else nullcontext():
        base = _base_of(path) if held else name
        model, processor = load_model(base, config.quantize)
        set_trainable(model, "instruct", config.train_tower)
        if base not in MODELS and Path(base).exists():
            base = str(Path(base).resolve())  # adapters may be loaded from another working folder
        return with_adapters(model, config, base, held), processor


def save_plain(model, folder: Path) -> None:
    """Save a model under the weight names of public checkpoints, which other programs read.

    Args:
        model: The model, without wrappers.
        folder: The folder, which is created.
    """
    # transformers saves under the names of the folder that a model was loaded from. Here that is a
    # checkpoint, which has the names in memory.
    vars(model).pop("_weight_conversions", None)
    model.save_pretrained(folder)


@quiet()
def load_processor(config, path: str):
    """Load the processor of a model.

    Without torchvision, the processor of Video-LLaVA reads videos with ``FrameProcessor``, and that
    of another model reads images alone.

    Args:
        config: The model's configuration.
        path: The folder or hub name of the processor.

    Raises:
        ConfigError: The processor cannot be read, or does not say its patch size.
    """
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
        # Without it, the processor cannot count an image's visual tokens.
        if getattr(processor, "patch_size", 0) is None:
            size = getattr(getattr(config, "vision_config", None), "patch_size", "...")
            raise ConfigError(
                f'{path}/processor_config.json has no patch_size; add "patch_size": {size}'
            )
        return processor
    # Imported here, because importing it warns where torchvision is missing.
    from transformers import CLIPImageProcessor

    # Video-LLaVA's own image processor, which some checkpoints name, names its output otherwise.
    images = CLIPImageProcessor.from_pretrained(path)
    settings, _ = VideoLlavaProcessor.get_processor_dict(path)
    parts = [images, FrameProcessor(images), AutoTokenizer.from_pretrained(path)]
    return VideoLlavaProcessor.from_args_and_dict(parts, settings)


def _four_bits(config):
    """Return the configuration of NF4 for the language model alone."""
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ConfigError("quantize 'nf4' needs the package bitsandbytes; pip install bitsandbytes")
    # A model without weights tells the modules that stay as they are.
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
    """Freeze the parameters that LLaVA freezes.

    Args:
        model: The model, wrapped or not.
        phase: "align" trains only the projector; "instruct" all but the vision tower.
        train_tower: Whether "instruct" trains the vision tower too.

    Raises:
        ConfigError: No projector or no vision tower is found in the model.
    """
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
        if parameter.is_floating_point():  # weights in 4 bits are integers, and stay frozen
            parameter.requires_grad_(trains)


def with_adapters(model, config: TrainConfig, base: str, held: str | None = None) -> PeftModel:
    """Add LoRA adapters to the linear layers of the decoder. The projector trains whole.

    The vision tower does too, if ``config`` trains it. Parameters beside them that belong to no
    module, such as LLaVA-NeXT's newline, do not train.

    Args:
        model: The model.
        config: The configuration of the run, with a lora_rank.
        base: The model's folder or name, which the saved adapters will refer to.
        held: A folder of adapters of ``model``. They are trained further if they have the form that
            ``config`` sets, else merged.

    Returns:
        The PEFT model.

    Raises:
        ConfigError: The adapters in ``held`` would have to be merged into 4 bits.
    """
    if config.quantize:
        model = prepare_model_for_kbit_training(model, config.gradient_checkpointing)
    modules = dict(model.named_modules())
    # whole: modules that are trained as they are. A ModuleList has no forward, so PEFT needs the
    # names of its items.
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
    # Adapters go to the decoder's layers only; towers have linear layers of the same names.
    prefix = next(name for name, module in modules.items() if module is find_parts(model).decoder)
    inside = find_parts(model).layers.named_modules()
    linear = [f"{prefix}.layers.{name}" for name, module in inside if isinstance(module, nn.Linear)]
    model.name_or_path = model.config.name_or_path = base  # PEFT saves it with the adapters
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
    # The same scale and the same shapes: the saved adapters fit the new ones.
    found, weights = PeftConfig.from_pretrained(held), load_file(Path(held) / ADAPTER_WEIGHTS)
    if found.lora_alpha == wanted.lora_alpha and _shapes(weights) == _shapes(
        get_peft_model_state_dict(adapted)
    ):
        set_peft_model_state_dict(adapted, weights)
        return adapted
    if config.quantize:
        raise ConfigError(
            f"{held} holds adapters of another form (rank {found.r}, lora_alpha "
            f"{found.lora_alpha}), which cannot be merged into 4 bits; ask for that form, or give "
            "a whole model"
        )
    # Merged, they are part of the base, so the new adapters refer to their folder as the base.
    model = PeftModel.from_pretrained(adapted.unload(), held).merge_and_unload()
    model.name_or_path = model.config.name_or_path = held
    return get_peft_model(model, wanted)


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Return the shape of each weight."""
    return {name: weight.shape for name, weight in weights.items()}


def _outermost(names: list[str]) -> list[str]:
    """Return the names of modules that are inside of no other one of ``names``."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def parameter_groups(
    model, weight_decay: float, decayed: set[str], rates: dict[str, float | None]
) -> list[dict]:
    """Sort the parameters that train into groups for the optimizer, each into one.

    Args:
        model: The model, wrapped or not.
        weight_decay: Weight decay of the parameters in ``decayed``; others have none.
        decayed: Names of parameters in the unwrapped model.
        rates: Learning rate by role ("projector", "tower", "language"). A role without one, or with
            None, has the optimizer's.

    Returns:
        The groups.
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
    """Switch gradient checkpointing off in vision towers that do not train.

    No backward pass reaches them, and on a GPU checkpointing takes longer than their layers do
    (twice the time of a CLIP ViT-L/14-336 on an H100).
    """
    for tower in towers(find_parts(model)).values():
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            for module in tower.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.gradient_checkpointing = False
