r"""Measure nano-tuned on questions that it was not trained on.

``python papers/nano.py`` writes papers/nano/accuracy.csv, one-token.csv and the page, in about ten minutes on 2 cores.
The questions are about new scenes: with drawings of the vendors that the model was trained on, and of a vendor that it
was not. Each is asked on all visual tokens, and with one token in place of all from layer 2 on.

``--curve FOLDER`` asks adapters that were saved during training, in FOLDER/STEP each, and writes curve.csv.
``--ship RUN`` makes data/nano-tuned from the last checkpoint of a run: projector and adapters, in bfloat16.

The shipped model was made by two runs, which took two hours and a quarter on 2 cores: the preset, and a second run from
its result on scenes in another order:

    python -m llavolta.train nano --output RUN
    python papers/nano.py --ship RUN
    python -m llavolta.train nano --output ON --set model=nano-tuned align_steps=0 align_words=0 seed=1 max_steps=450 \
        learning_rate=4e-4 projector_learning_rate=2e-4
    python papers/nano.py --ship ON
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from llavolta.data import LlavaData
from llavolta.errors import UserError
from llavolta.paths import NANO_TUNED, PAPERS, given_path
from llavolta.studies import records
from llavolta.studies.evaluation import evaluate
from llavolta.studies.opening import open_model
from llavolta.studies.statistics import OVERALL, accuracy_table, interval, paired_difference, percent
from llavolta.train.models import has_bfloat16
from llavolta.worlds import WORLDS

FOLDER = PAPERS / "nano"
MODEL, WORLD = "nano-tuned", "pictures"
ONE_TOKEN = "2:avgpool:144"
PLANS = ("none", ONE_TOKEN)
SCENES = 8  # of a training step
DTYPE = torch.bfloat16 if has_bfloat16() else torch.float32
VENDORS = {"seen": "heldout.json", "unseen": "unseen.json"}


def ask(model, processor, plan: str, vendor: str, limit: int | None = None) -> pd.DataFrame:
    """Ask the questions of one key of VENDORS under a plan; see ``evaluation.evaluate``."""
    data = LlavaData(WORLDS[WORLD].folder() / VENDORS[vendor])
    return evaluate(model, processor, data, plan, limit, batch_size=32).assign(vendor=vendor, plan=plan)


def accuracies(limit: int | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Ask all questions.

    Args:
        limit: Number of questions of each file, from the first; None: all.

    Returns:
        The accuracy by vendor, plan and question type; and by vendor, the difference between all tokens and one.
    """
    model, processor, _ = open_model(MODEL, DTYPE)
    answers = pd.concat([ask(model, processor, plan, vendor, limit) for vendor in VENDORS for plan in PLANS])
    rows = []
    for vendor, part in answers.groupby("vendor", sort=False):
        by_plan = {plan: of.reset_index(drop=True).correct for plan, of in part.groupby("plan", sort=False)}
        rows.append(dict(vendor=vendor, **paired_difference(by_plan["none"], by_plan[ONE_TOKEN])))
    return accuracy_table(answers, by=["vendor", "plan"]), pd.DataFrame(rows)


def curve(folder: Path, limit: int) -> pd.DataFrame:
    """Measure the accuracy by step and vendor, of adapters in subfolders named by their step."""
    rows = []
    for saved in sorted((path for path in folder.iterdir() if path.name.isdecimal()), key=lambda path: int(path.name)):
        model, processor, _ = open_model(saved, DTYPE)
        for vendor in VENDORS:
            correct = ask(model, processor, "none", vendor, limit).correct
            low, high = interval(correct)
            rows.append(dict(step=int(saved.name), vendor=vendor, accuracy=correct.mean(), low=low, high=high))
    return pd.DataFrame(rows)


def ship(run: Path, folder: Path = NANO_TUNED) -> Path:
    """Write the projector and adapters of a run's last checkpoint to ``folder``, for the model "nano".

    Args:
        run: A run folder.
        folder: The folder to write to.

    Returns:
        ``folder``.
    """
    last = max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    weights = load_file(last / "adapter_model.safetensors")
    settings = json.loads((last / "adapter_config.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.bfloat16() for name, value in weights.items()}, folder / "adapter_model.safetensors")
    # A name in place of the path on the machine of the run.
    settings |= {"base_model_name_or_path": "nano", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n")
    return folder


def page(table: pd.DataFrame, cost: pd.DataFrame, course: pd.DataFrame | None = None) -> str:
    """Render the page.

    Args:
        table: The accuracies of ``accuracies``.
        cost: The differences of ``accuracies``.
        course: From ``curve``.

    Returns:
        Markdown.
    """
    wide = table.set_index(["type", "vendor", "plan"])
    lines = ["| question | constant | seen vendors | unseen vendor | seen, one token | unseen, one token |"]
    lines.append("|---|---|---|---|---|---|")
    kinds = [*dict.fromkeys(kind for kind in table.type if kind != OVERALL), OVERALL]
    for kind in kinds:
        cells = []
        for plan in PLANS:
            for vendor in VENDORS:
                row = wide.loc[kind, vendor, plan]
                cells.append(f"{percent(row.accuracy)} ({percent(row.low)} to {percent(row.high)})")
        lines.append(f"| {kind} | {percent(wide.loc[kind, 'seen', 'none'].constant)} | {' | '.join(cells)} |")
    lost = [
        f"{row.vendor} {percent(row.difference)} ({percent(row.difference_low)} to {percent(row.difference_high)})"
        for row in cost.itertuples()
    ]
    return "\n".join(
        [
            "# nano-tuned on held-out questions",
            "",
            "Exact match with 95% intervals over questions (bootstrap); constant: the best one answer to each type.",
            f"One token: `{ONE_TOKEN}`. Made by `python papers/nano.py`.",
            "",
            *lines,
            "",
            f"What one token in place of all behind layer 2 costs (paired): {', '.join(lost)}.",
            "",
            *([] if course is None else _course(course)),
        ]
    )


def committed_page(folder: Path) -> str:
    """Render the page from the CSV files in ``folder``."""
    return page(*(pd.read_csv(folder / name) for name in ("accuracy.csv", "one-token.csv", "curve.csv")))


def _course(course: pd.DataFrame) -> list[str]:
    lines = [
        "## Accuracy against training",
        "",
        "| steps | scenes | seen vendors | unseen vendor |",
        "|---|---|---|---|",
    ]
    for step, of in course.groupby("step"):
        cells = [f"{percent(row.accuracy)} ({percent(row.low)} to {percent(row.high)})" for row in of.itertuples()]
        lines.append(f"| {step} | {SCENES * step:,} | {' | '.join(cells)} |")
    return [*lines, "", "The first questions of each vendor; `python papers/nano.py --curve FOLDER`, see there.", ""]


def main(arguments: list[str] | None = None) -> int:
    """Run the command. Returns the exit code: 1 after an error, which is printed on stderr."""
    parser = argparse.ArgumentParser(prog="python papers/nano.py")
    parser.add_argument("--limit", type=int, help="the first so many questions of each file")
    parser.add_argument("--curve", type=given_path, metavar="FOLDER", help="of saved adapters; writes curve.csv alone")
    about = "a finished run of the preset nano; makes data/nano-tuned alone"
    parser.add_argument("--ship", type=given_path, metavar="RUN", help=about)
    options = parser.parse_args(arguments)
    try:
        if options.ship:
            print(ship(options.ship))
            return 0
        files = [WORLDS[WORLD].folder() / name for name in VENDORS.values()]
        dtype = str(DTYPE).removeprefix("torch.")
        write = partial(records.write, data=files, dtype=dtype, index=False, float_format="%.6f")
        if options.curve:
            table = curve(options.curve, options.limit or 200)
            write(table, FOLDER / "curve.csv")
            return 0
        table, cost = accuracies(options.limit)
        write(table, FOLDER / "accuracy.csv")
        write(cost, FOLDER / "one-token.csv")
        text = committed_page(FOLDER)
        (FOLDER / "README.md").write_text(text)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
