"""The model card of a trained model: its scheme, its stages and its base models."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from llavolta.train.config import TrainConfig
from llavolta.train.schemes import Scheme

CARD = "README.md"


def write_card(
    folder: Path, config: TrainConfig, scheme: Scheme, total_steps: int, trained: int
) -> None:
    """Write README.md, the model card, into the folder of a model.

    Base models are named if they are on the hub; paths of this machine are left out.

    Args:
        folder: The folder of the model.
        config: The configuration of the run.
        scheme: The scheme, for the model's depth.
        total_steps: Optimizer steps of the whole scheme.
        trained: Optimizer steps that the model was trained for, from the first.
    """
    base = [name for name in (config.model, config.vision_tower, config.language_model) if name]
    # A hub name is OWNER/NAME; a local folder may look the same.
    base = [name for name in base if name.count("/") == 1 and not Path(name).exists()]
    data = ModelCardData(
        base_model=base or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["llavolta"],
    )
    lines = ["---", data.to_yaml(), "---", "", f"# Trained under `{scheme.name}`", ""]
    lines += [
        "Trained in stages, each under a plan for its visual tokens; it answers without any "
        "compression.",
        "",
    ]
    lines += ["| stage | plan | optimizer steps |", "|---|---|---|"]
    begun = 0
    for number, (stage, end) in enumerate(
        zip(scheme.stages, scheme.boundaries(total_steps), strict=True), 1
    ):
        steps = min(end, trained) - begun
        if steps > 0:
            lines.append(f"| {number} | `{stage}` | {steps} |")
        begun = end
    adapters = f", LoRA of rank {config.lora_rank}, merged" if config.lora_rank else ""
    lines += [
        "",
        f"Learning rate {config.learning_rate}{adapters}, seed {config.seed}; all parameters: "
        "config.yaml.",
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")
