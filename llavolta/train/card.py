"""The model card of a trained model: what it was made of, and under which scheme."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCardData

from llavolta.train.config import TrainConfig
from llavolta.train.schemes import Scheme

CARD = "README.md"


def write_card(
    folder: Path, config: TrainConfig, scheme: Scheme, total_steps: int, trained: int
) -> None:
    """``folder``/README.md of a model after the first ``trained`` of ``total_steps`` optimizer steps of ``scheme``.

    Names that are paths of this machine are left out.
    """
    base = [name for name in (config.model, config.vision_tower, config.language_model) if name]
    base = [name for name in base if name.count("/") == 1 and not Path(name).exists()]  # of the hub
    data = ModelCardData(
        base_model=base or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["llavolta"],
    )
    lines = ["---", data.to_yaml(), "---", "", f"# Trained under `{scheme.name}`", ""]
    lines += [
        "Trained in stages, each under a plan for its visual tokens; it answers without any compression.",
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
        f"Learning rate {config.learning_rate}{adapters}, seed {config.seed}; all parameters: config.yaml.",
        "",
    ]
    (folder / CARD).write_text("\n".join(lines), encoding="utf-8")
