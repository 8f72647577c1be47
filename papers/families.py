"""Estimate what training other model families costs, and what stages save.

``python papers/families.py`` writes papers/families.csv and prints it, in a minute or two. It needs the published
shapes only (llavolta.cost.references); nothing is downloaded.

Hours are of one epoch on the 665,298 examples of LLaVA-1.5's instruction tuning, with one image of 640 x 480 pixels and
200 text tokens each, on H100s at an assumed 40% of their peak. What is trained (adapters, tower) is that of each
preset. Memory is of one GPU under ZeRO-3 at the preset's batch, with gradient checkpointing.
"""

from __future__ import annotations

import pandas as pd
from tqdm.auto import tqdm

from llavolta.cost.flops import cost_model
from llavolta.cost.planner import Speed, memory_table, scheme_table, subject
from llavolta.cost.references import REFERENCES
from llavolta.paths import PAPERS
from llavolta.studies.records import write
from llavolta.train.config import PRESETS, TrainConfig
from llavolta.train.schemes import SCHEMES

GPU, UTILISATION = "H100-SXM", 0.4
EXAMPLES, TEXT = 665298, 200
STAGED = "four-stage-wider"


def row(name: str) -> dict:
    """Estimate time and memory of one family.

    Args:
        name: A key of REFERENCES, with which the name of a preset begins.

    Returns:
        preset, visual_tokens (of the image), parameters (in billions); for 1 and 8 GPUs, hours without compression,
        staged (hours under STAGED) and memory (GB of a GPU); and saved, the share of time that STAGED saves.
    """
    preset = next(found for found in PRESETS if found.startswith(name) and found != f"{name}-hf")
    config = TrainConfig.from_preset(preset, output="x")
    planned = subject(name)
    model = cost_model(planned.config)
    schemes = {of: SCHEMES[of].scaled(len(model.layers)) for of in ("single-stage", STAGED)}
    shared = dict(text_tokens=TEXT, lora_rank=config.lora_rank, pictures=planned.pictures)
    shared |= dict(train_tower=config.train_tower)
    step = dict(**shared, checkpointing=True)
    found = dict(preset=preset, visual_tokens=model.tokens_of(planned.pictures))
    found["parameters"] = sum(model.parameters.values()) / 1e9
    for gpus in (1, 8):
        table = scheme_table(model, schemes, EXAMPLES, Speed.of_gpu(GPU, UTILISATION, gpus), **step)
        memory = memory_table(model, ["none"], config.batch_size, gpus, True, **shared)
        found[f"hours_{gpus}"], found[f"staged_{gpus}"] = table.hours["single-stage"], table.hours[STAGED]
        found[f"memory_{gpus}"] = memory.total["none"]
    return {**found, "saved": 1 - table.time_ratio[STAGED]}


def main() -> None:
    """Write and print the table."""
    table = pd.DataFrame([row(name) for name in tqdm(REFERENCES, desc="families")]).set_index("preset")
    write(table, PAPERS / "families.csv", float_format="%.4g", dtype="none")
    print(table.to_string(float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
