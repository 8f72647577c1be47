"""One-line faults, each planted in a copy of the package, and which of the tests find it.

``python tests/mutants.py`` plants them one after the other and writes ``tests/mutants.csv``: whether the quick tests
(``make test``) find a fault, whether only the slow ones do, or none. ``--only`` takes a regular expression of their
names. Each runs the tests that are listed for it alone, up to the first that fails.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "mutants.csv"
QUICK, SLOW = "not slow and not browser", "slow and not browser"
COLUMNS = ("name", "file", "found by", "test", "seconds")


@dataclass(frozen=True)
class Mutant:
    """``old``, which stands once in ``file`` (below llavolta/), becomes ``new``.

    Attributes:
        tests: Files and folders below tests/ that may find it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def _of(file: str, tests: str, *mutants: tuple[str, str, str]) -> list[Mutant]:
    return [Mutant(name, file, old, new, tuple(tests.split())) for name, old, new in mutants]


CORE = "compression/test_compress.py compression/test_families.py compression/test_generation.py"
ZOO = "compression/test_compressors.py compression/test_zoo.py"
TRAIN = "train/test_train.py train/test_schemes.py train/test_faults.py"
STUDIES = "studies"

MUTANTS = [
    # compression: what the rows stand for
    *_of(
        "compression/rows.py",
        f"{CORE} compression/test_compressors.py",
        ("rows: padding is kept", "pad(self.valid.reshape(-1), (0, 1))", "pad(self.valid.reshape(-1) | True, (0, 1))"),
        (
            "rows: kept columns lose their order",
            "torch.argsort(~keep, dim=1, stable=True)",
            "torch.argsort(keep, dim=1)",
        ),
        (
            "rows: last new column is padding",
            "device=keep.device) < count[:, None]\n",
            "device=keep.device) < count[:, None] - 1\n",
        ),
        ("rows: tokens go one row too far", "(keep.cumsum(1) - 1 + start", "(keep.cumsum(1) - 0 + start"),
        (
            "rows: text moves up too far",
            "gone = gone - before.cummax(1).values",
            "gone = gone + before.cummax(1).values",
        ),
        (
            "rows: later columns are those of this pass",
            "columns(new_length, keep) if first else",
            "columns(new_length, keep) if True else",
        ),
        (
            "rows: deep-stack features are lost",
            "features[pictures.mask]).view_as",
            "features[pictures.mask] * 0).view_as",
        ),
        (
            "rows: the token before answers",
            "cumsum(1) - 1).clamp(min=0)",
            "cumsum(1) - 2).clamp(min=0)",
        ),
        ("rows: merged features are not averaged", "total / count.clamp(min=1)", "total / count.clamp(max=1, min=1)"),
    ),
    # masks
    *_of(
        "compression/masks.py",
        f"{CORE} compression/test_backends.py",
        (
            "masks: queries see the next token",
            "key[:, None] <= query[..., None] + past))[:, None]\n        return torch",
            "key[:, None] <= query[..., None] + past + 1))[:, None]\n        return torch",
        ),
        ("masks: padded keys are seen", "return picked & ~hidden", "return picked"),
        ("masks: padded keys are seen, additive", "picked.masked_fill(hidden, torch.finfo(mask.dtype).min)", "picked"),
        (
            "masks: padding of a flat mask is seen",
            "mask.gather(1, key) * key_valid.to(mask.dtype)",
            "mask.gather(1, key)",
        ),
        (
            "masks: rows of a block mask are shifted",
            "query[batch, row], key[batch, column])",
            "row, key[batch, column])",
        ),
        (
            "masks: the bias is dropped",
            "torch.where(mask, bias[:, None], least)",
            "torch.where(mask, bias[:, None] * 0, least)",
        ),
    ),
    # caches
    *_of(
        "compression/cache.py",
        "compression/test_generation.py compression/test_backends.py compression/test_families.py",
        ("cache: its length is off by one", "past.seen + length,", "past.seen + length - 1,"),
        (
            "cache: later columns start at 0",
            "torch.cat([past.later, later + state.past], dim=1)",
            "torch.cat([past.later, later], dim=1)",
        ),
        (
            "cache: original columns start at 0",
            "torch.cat([past.original, index + past.seen], dim=1)",
            "torch.cat([past.original, index], dim=1)",
        ),
        (
            "cache: padding is forgotten",
            "torch.cat([past.valid, valid], dim=1)",
            "torch.cat([past.valid, valid | True], dim=1)",
        ),
        ("cache: moved positions are forgotten", "moved=past.moved + state.moved", "moved=past.moved"),
        ("cache: reset is not noticed", "if state.past == 0:", "if state.past < 0:"),
        ("cache: beams keep their first rows", "return alike.long().argmax(1)", "return None"),
        (
            "cache: keys of this pass start at 0",
            "torch.cat([before, query + state.past], dim=1)",
            "torch.cat([before, query], dim=1)",
        ),
        ("cache: a crop is not taken off", "seen=rows.seen - count, **cut", "seen=rows.seen, **cut"),
        ("cache: another length passes", "if held != expected:", "if held < 0:"),
    ),
    # labels and logits
    *_of(
        "compression/labelled.py",
        "compression/test_compress.py compression/test_passing.py compression/test_zoo.py",
        ("labels: not shifted", "labels[row, column + 1]]", "labels[row, column]]"),
        (
            "labels: rows are those of the labels",
            "(labels[:, 1:] != IGNORED).nonzero",
            "(labels[:, :-1] != IGNORED).nonzero",
        ),
        (
            "labels: hidden states are not moved",
            "column if back is None else back[row, column]",
            "column if back is None else column.clamp(max=last.shape[1] - 1)",
        ),
        (
            "labels: the last hidden state is not replaced",
            "output.hidden_states = (*output.hidden_states[:-1], hidden)",
            "pass",
        ),
        (
            "labels: answers begin one later",
            "labelled[:, 1:] & ~labelled[:, :-1]",
            "labelled[:, :-1] & ~labelled[:, 1:]",
        ),
    ),
    # the hooks
    *_of(
        "compression/patch.py",
        f"{CORE} compression/test_wrappers.py compression/test_passing.py",
        (
            "patch: position ids stay those of before",
            'kwargs["position_embeddings"] = state.rotary_of_rows(stock_rotary, self.parts.rotary)\n            kwargs',
            'kwargs["position_embeddings"] = stock_rotary\n            kwargs',
        ),
        (
            "patch: deep-stack comes once more",
            '"deepstack_visual_embeds": deepstack[:first]',
            '"deepstack_visual_embeds": deepstack',
        ),
        ("patch: the model stays marked as compressed", "_active.discard(self.parts.decoder)", "pass"),
        (
            "patch: labelled rows in evaluation",
            "            or not module.training\n",
            "",
        ),
        ("patch: gaps close in every layer", "compressor.contiguous and number == 0", "compressor.contiguous"),
        ("patch: clips are frames", "compressor.over_clips and rows.pictures.has_clips", "False"),
    ),
    *_of(
        "compression/families.py",
        "compression/test_families.py train/test_roles.py",
        ("families: images side by side are one", "start |= first", "start &= first"),
        ("families: a class token is a patch", "count, side = count - lead.long(),", "count, side = count,"),
        ("families: a lone newline belongs to the image", "kept[first + ends[0]] = False", "pass"),
    ),
    *_of(
        "compression/vision.py",
        f"compression/test_prumerge.py {ZOO} compression/test_backends.py",
        (
            "vision: tokens at the front",
            "out.anchor.masked_fill(~out.mask, length)[..., None]",
            "(out.mask.cumsum(1) - 1).masked_fill(~out.mask, length)[..., None]",
        ),
        ("vision: dropped tokens are zeros", "DROPPED = torch.nan", "DROPPED = 0.0"),
        ("vision: an interrupted pass is taken", "held[-calls:] for where, held", "held[:calls] for where, held"),
    ),
    *_of(
        "compression/probe.py",
        f"{ZOO} compression/test_passing.py",
        (
            "probe: tokens behind are seen",
            "device=rows.device) <= rows[..., None]) & valid",
            "device=rows.device) >= 0) & valid",
        ),
        (
            "probe: other samples of a row are seen",
            "seen &= sample[:, None] == sample.gather(1, rows)[..., None]",
            "pass",
        ),
        ("probe: answers are part of the question", "text if self.labelled is None else text & ~self.labelled", "text"),
        ("probe: the layer itself in place of the one before", "self.before if previous else self.here", "self.here"),
    ),
    # compressors
    *_of(
        "compression/compressors/avgpool.py",
        f"{CORE} compression/test_compressors.py",
        ("avgpool: divides by one more", "sum(2) // at_least_one", "sum(2) // (at_least_one + 1)"),
        ("avgpool: anchor is the last of the window", "(count - 1).clamp(min=0) // 2", "(count - 1).clamp(min=0)"),
        ("avgpool: padding counts", "count = mask.sum(-1)  #", "count = mask.sum(-1).clamp(min=stride)  #"),
        (
            "avgpool: windows are shifted in the groups",
            "device=mask.device) // stride).expand",
            "device=mask.device) // (stride + 1)).expand",
        ),
    ),
    *_of(
        "compression/compressors/avgpool3d.py",
        f"{ZOO} compression/test_families.py",
        (
            "avgpool3d: rows and columns change places",
            "patch // width // k * columns + patch % width // k",
            "patch % width // k * columns + patch // width // k",
        ),
        ("avgpool3d: the class token is pooled", "torch.where(patch < 0, 0, lead +", "torch.where(patch < 0, 0,"),
    ),
    *_of(
        "compression/compressors/base.py",
        ZOO,
        (
            "base: the worst are kept",
            "scores.argsort(dim=1, descending=True, stable=True).argsort",
            "scores.argsort(dim=1, descending=False, stable=True).argsort",
        ),
        ("base: padding may be kept", "keep = keep & tokens.mask", "keep = keep.clone()"),
        ("base: shares are rounded down", "* keep).round().clamp(min=1)", "* keep).floor().clamp(min=1)"),
        (
            "base: one is chosen twice",
            "gain.masked_fill(kept | ~mask, -torch.inf)",
            "gain.masked_fill(~mask, -torch.inf)",
        ),
        ("base: falling anchors pass", "((anchor.diff(dim=1) > 0) | ~out.mask[:, 1:]).all()", "(anchor >= 0).all()"),
    ),
    *_of(
        "compression/compressors/prumerge.py",
        "compression/test_prumerge.py",
        ("prumerge: outliers of another rule", "high + 1.5 * (high - low)", "high + 1.0 * (high - low)"),
        (
            "prumerge: a token is its own neighbour",
            "similarity.scatter_(2, itself, -torch.inf)",
            "similarity.scatter_(2, itself, torch.inf)",
        ),
    ),
    *_of(
        "compression/compressors/random_drop.py",
        ZOO,
        ("random: fixed in training, too", "if tokens.training:", "if False:"),
    ),
    # schemes and training
    *_of(
        "train/schemes.py",
        "train/test_schemes.py train/test_dualspeed.py train/test_train.py",
        ("schemes: a stage ends one step late", "step >= end for end in", "step > end for end in"),
        ("schemes: slow steps come one early", "(step + 1) % every == 0", "step % every == 0"),
        (
            "schemes: halves are rounded down",
            "layer * num_layers / reference_layers + 0.5",
            "layer * num_layers / reference_layers",
        ),
        ("schemes: layer 1 may become 0", "max(min(layer, 1),", "max(0,"),
        ("schemes: drawn by the seed alone", 'random.Random(f"{seed} {step}")', 'random.Random(f"{seed}")'),
        ("schemes: warm-up is one step short", "(step - first + 1) / max(1,", "(step - first) / max(1,"),
    ),
    *_of(
        "train/callback.py",
        "train/test_callback.py train/test_train.py train/test_trl.py train/test_dualspeed.py",
        (
            "callback: the stage's last step is not saved",
            "if state.global_step in ends:",
            "if state.global_step - 1 in ends:",
        ),
        (
            "callback: the plan of the step before",
            "stages[self.scheme.stage_at(state.global_step, state.max_steps)]",
            "stages[self.scheme.stage_at(max(state.global_step - 1, 0), state.max_steps)]",
        ),
        ("callback: stages are not tried", "if not self._untried or not", "if True or not"),
        (
            "callback: names of older versions are saved",
            '"save_original_format": False',
            '"save_original_format": True',
        ),
    ),
    *_of(
        "train/trainer.py",
        f"{TRAIN} train/test_callback.py train/test_roles.py train/test_dualspeed.py",
        (
            "trainer: resumed metrics are written twice",
            'row["step"] <= state.global_step]',
            'row["step"] <= state.global_step + 1]',
        ),
        ("trainer: a NaN trains on", "if not torch.isfinite(loss):", "if False:"),
        (
            "trainer: data order of another seed",
            "self.examples_per_step, self.args.seed)",
            "self.examples_per_step, 1 + self.args.seed)",
        ),
        (
            "trainer: the record names another step",
            '"step": step,\n            "total_steps": total,',
            '"step": step - 1,\n            "total_steps": total,',
        ),
    ),
    *_of(
        "train/models.py",
        "train/test_roles.py train/test_train.py train/test_presets.py",
        ("models: the tower trains", 'of != "tower" or train_tower', 'of != "none" or train_tower'),
        (
            "models: alignment trains everything",
            'of == "projector" if phase == "align"',
            'of != "none" if phase == "align"',
        ),
    ),
    *_of(
        "train/run.py",
        TRAIN,
        ("run: a finished stage is trained again", "if held >= phase.end:", "if held > phase.end:"),
        ("run: a checkpoint of another batch", 'held["examples_per_step"] != trainer.examples_per_step', "False"),
        (
            "run: training starts anew",
            "resume_from_checkpoint=str(checkpoint) if checkpoint else None",
            "resume_from_checkpoint=None",
        ),
        ("run: another run's folder is taken", "if differ:\n", "if False:\n"),
    ),
    *_of(
        "train/checkpoints.py",
        "train/test_faults.py train/test_train.py",
        ("checkpoints: the oldest is the newest", "key=step_of, reverse=True", "key=step_of"),
        (
            "checkpoints: ends of stages are removed",
            "if step_of(folder) not in always]",
            "if step_of(folder) not in ()]",
        ),
        ("checkpoints: another scheme's model is taken", "same = (held", "same = True or (held"),
    ),
    *_of(
        "train/dualspeed.py",
        "train/test_dualspeed.py",
        ("dualspeed: the divergence is turned round", "F.kl_div(slow, fast,", "F.kl_div(fast, slow,"),
        (
            "dualspeed: the isolator is not loaded",
            "ISOLATOR).weight.copy_(held)",
            "ISOLATOR).weight.copy_(getattr(unwrap(model), ISOLATOR).weight)",
        ),
    ),
    # data
    *_of(
        "data/collate.py",
        "data train/test_other_families.py",
        ("collate: padding in place of the labels", '"labels": IGNORED}\n        shape', '"labels": 0}\n        shape'),
        ("collate: rows are padded at the front", 'videos, padding_side="right")', 'videos, padding_side="left")'),
        ("collate: cut pictures pass", "if placeholder[self.max_length :].any():", "if False:"),
    ),
    *_of(
        "data/chat.py",
        "data train/test_other_families.py",
        ("chat: questions are labelled", "(starts >= blanks) & (ends > first) & (starts < last)", "(starts < last)"),
    ),
    *_of(
        "data/sampler.py",
        "data/test_data.py",
        ("sampler: every epoch in one order", "default_rng([self.seed, self.epoch])", "default_rng([self.seed])"),
        ("sampler: short and long together", 'part[np.argsort(-self.lengths[part], kind="stable")]', "part"),
    ),
    *_of(
        "data/index.py",
        "data/test_data.py data/test_real_data.py data/test_table.py",
        (
            "index: one key for all files",
            "for part in (file.resolve(), *more, _code())",
            "for part in (*more, _code())",
        ),
    ),
    *_of(
        "data/images.py",
        "data/test_data.py data/test_real_data.py",
        ("images: lie on their side", "image = ImageOps.exif_transpose(image)", "image = image.copy()"),
        (
            "images: paths lead out of the folder",
            "if not any(full == base or full.startswith(",
            "if not any(True or full.startswith(",
        ),
        ("images: padded at one side", "((side - image.width) // 2, (side - image.height) // 2)", "(0, 0)"),
    ),
    *_of(
        "data/video.py",
        "data/test_video.py",
        (
            "video: the last frame is never shown",
            "np.linspace(0, total - 1, count)",
            "np.linspace(0, total - 1, count, endpoint=False)",
        ),
    ),
    # studies
    *_of(
        "studies/redundancy.py",
        STUDIES,
        (
            "redundancy: one key for all weights",
            "digest.update(weight.detach()",
            "digest.copy().update(weight.detach()",
        ),
        ("redundancy: one key for all questions", "digest.update(evaluation.asked_digest(data, questions))", "pass"),
        (
            "redundancy: layers above are shared",
            "if number >= shared.below or cache is None",
            "if number > shared.below or cache is None",
        ),
    ),
    *_of(
        "studies/evaluation.py",
        STUDIES,
        ("evaluation: answers are one token short", "max(longest + 1, LEAST_NEW_TOKENS)", "max(longest - 4, 1)"),
        ("evaluation: prompts are padded at the end", 'padding_side: str = "left"', 'padding_side: str = "right"'),
        ("evaluation: case counts", 'rstrip(".").lower()', 'rstrip(".")'),
        (
            "evaluation: pictures of another question are digested",
            'digest.update(f"{len(content)} ".encode() + content)',
            "digest.update(path.encode())",
        ),
    ),
    *_of(
        "studies/statistics.py",
        STUDIES,
        ("statistics: intervals of 80%", "stats.t.ppf(0.975,", "stats.t.ppf(0.9,"),
        (
            "statistics: seeds are not paired",
            "(first.astype(float) - second.astype(float)).dropna()",
            "(first.astype(float) - second.astype(float).mean()).dropna()",
        ),
    ),
]


def plant(mutant: Mutant, package: Path) -> None:
    """Write the fault into the copy ``package``. Raises SystemExit where its line is no longer there once."""
    file = package / mutant.file
    text = file.read_text()
    if (count := text.count(mutant.old)) != 1:
        raise SystemExit(
            f"mutant {mutant.name!r}: {mutant.old!r} stands {count} times in llavolta/{mutant.file}, not once"
        )
    file.write_text(text.replace(mutant.old, mutant.new))


def run(mutant: Mutant, chosen: str, folder: Path) -> str | None:
    """The first test of those ``chosen`` that fails under the fault in ``folder``; None if all pass."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    files = [f"tests/{part}" for part in mutant.tests]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", chosen, *files]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode in (0, 5):  # 5: nothing is chosen
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(\S+)", done.stdout, re.M)
    return failed[1] if failed else f"pytest ended with {done.returncode}"


def measure(mutant: Mutant) -> dict:
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder, away = Path(name), shutil.ignore_patterns("__pycache__", "cache", "runs")
        for part in ("llavolta", "tests", "data"):
            shutil.copytree(ROOT / part, folder / part, ignore=away)
        for part in ("notebooks", "papers", "pyproject.toml", "README.md", "Makefile"):
            (folder / part).symlink_to(ROOT / part)
        plant(mutant, folder / "llavolta")
        found = "make test"
        if (test := run(mutant, QUICK, folder)) is None:
            found = "make test-rest"
            if (test := run(mutant, SLOW, folder)) is None:
                found = "nothing"
    seconds = f"{time.perf_counter() - start:.0f}"
    return dict(zip(COLUMNS, (mutant.name, mutant.file, found, test or "", seconds), strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="REGEX", help="mutants whose names match, by default all")
    parser.add_argument("--table", type=Path, default=TABLE, help="CSV to write; rows of other mutants stay")
    given = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if re.search(given.only, mutant.name)]
    if not chosen:
        print(f"error: no mutant is named like {given.only!r}", file=sys.stderr)
        return 2
    names = [mutant.name for mutant in MUTANTS]
    rows = {}
    if given.table.exists():
        with given.table.open() as file:
            rows = {row["name"]: row for row in csv.DictReader(file) if row["name"] in names}
    for mutant in chosen:
        rows[mutant.name] = row = measure(mutant)
        print(f"{row['found by']:<15} {row['seconds']:>5} s  {mutant.name:<50} {row['test']}", flush=True)
        with given.table.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[name] for name in names if name in rows)
    missed = [mutant.name for mutant in chosen if rows[mutant.name]["found by"] == "nothing"]
    print(f"{len(chosen)} mutants, {len(missed)} found by no test" + (f": {', '.join(missed)}" if missed else ""))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
