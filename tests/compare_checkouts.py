"""Whether two checkouts of this repository compute the same, bit for bit: for a change that must change nothing.

    git worktree add ../before main                        # the checkout to compare with
    python tests/compare_checkouts.py ../before .          # all cases, a few minutes
    python tests/compare_checkouts.py ../before . --only "^llava sdpa .*fastv"

Before the code under ``compress`` is cut anew, add the cases that the cut could break, and compare after every step.
Each checkout runs in a process of its own, on one thread, with the tiny models of its own tests; beyond these, cases
may use only what both import from ``llavolta`` itself. A case is a model, an attention backend, a plan and a use of the
model (see ``uses``); what it gives is tensors, or the error it raises. Every case that differs is printed, with the
tensors and how far they are apart, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

ROWS = [[3, 4], [2, 0, 5], [6]]  # see tiny.ragged_batch: one picture, two in a row, none
PLANS = [
    "none",
    "0:avgpool:1",
    "0:avgpool:3",
    "1:avgpool:3;3:avgpool:2",
    "0:avgpool2d:2;1:avgpool2d:2",
    "1:random:0.5",
    "2:fastv:0.5",
    "0:avgpool:2;2:pyramiddrop:0.5",
    "1:kmeans:0.25",
    "vision:avgpool:2;1:fastv:0.5",
    "vision:prumerge:0.25;2:avgpool:2",
    "vision:prumerge+:adaptive",
]
FAMILY_PLANS = [
    "1:avgpool:3",
    "0:avgpool3d:2:2;2:pyramiddrop:0.5",
    "2:fastv:0.5",
    "vision:avgpool:2;0:random:0.5",
    "vision:prumerge:0.25;3:avgpool:2",
]
BACKENDS = ["sdpa", "eager", "flex_attention", "flash_on_cpu"]  # the last is tests/compression/test_backends.py's
GREEDY = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, suppress_tokens=[3, 4])
GREEDY |= dict(output_logits=True, return_dict_in_generate=True)


def tensors(value, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the output of a model, by its path; of a cache the keys and values of its layers."""
    if isinstance(value, Tensor):
        yield name, value.detach().as_subclass(Tensor).clone().contiguous()
    elif hasattr(value, "layers"):
        yield from tensors([(layer.keys, layer.values) for layer in value.layers], name)
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, f"{name}/{key}")


def forward(model: nn.Module, batch: dict) -> dict:
    return model(**batch, output_hidden_states=True)


def train(model: nn.Module, batch: dict) -> dict:
    model.train()
    out = model(**batch)
    if model.get_decoder().config._attn_implementation != "flex_attention":  # which has no backward on CPUs
        out.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss, "logits": out.logits, "gradients": gradients}


@torch.no_grad()
def generate(model: nn.Module, batch: dict, **how) -> dict:
    return model.generate(**batch, **GREEDY, **how)


@torch.no_grad()
def chunks(model: nn.Module, batch: dict) -> list:
    """A prompt, a second chunk of two tokens, and one more token without a mask, on one cache."""
    out = [model(**batch, use_cache=True)]
    rows, cache = len(batch["input_ids"]), out[0].past_key_values
    mask = nn.functional.pad(batch["attention_mask"], (0, 2), value=1)
    out.append(model(input_ids=torch.full((rows, 2), 9), attention_mask=mask, past_key_values=cache))
    out.append(model(input_ids=torch.full((rows, 1), 11), past_key_values=cache))
    return [list(tensors(one)) for one in out]


class Prefix(nn.Module):
    """Two embeddings to stand before each picture."""

    def __init__(self, width: int):
        super().__init__()
        self.rows = nn.Parameter(torch.linspace(-1, 1, 2 * width).view(2, width))

    def forward(self, pictures: int) -> Tensor:
        return self.rows.expand(pictures, -1, -1)


def uses(batch: Callable[[str], dict], backend: str) -> Iterator[tuple[str, dict, Callable]]:
    """(name, options of compress, what to do with the model); batch: by the side of its padding, with labels."""

    def prompt() -> dict:
        return {name: value for name, value in batch("left").items() if name != "labels"}

    yield "train", {}, lambda model: train(model, batch("right"))
    yield "generate", {}, lambda model: generate(model, prompt())
    yield "forward", {}, lambda model: forward(model, batch("right"))
    yield "forward left", {}, lambda model: forward(model, batch("left"))
    yield "chunks", {}, lambda model: chunks(model, prompt())
    if backend in ("sdpa", "eager"):
        yield "train left", {}, lambda model: train(model, batch("left"))
        yield "train all logits", {"labelled_only": False}, lambda model: train(model, batch("right"))
        yield "labelled only", {"labelled_only": True}, lambda model: train(model, batch("right"))
        yield "beams", {}, lambda model: generate(model, prompt(), num_beams=2)
        yield "no cache", {}, lambda model: generate(model, prompt(), use_cache=False)


def more_uses(batch: Callable[[str], dict], plan: str) -> Iterator[tuple[str, dict, Callable]]:
    """Those of the tiny LLaVA alone."""

    def prompt() -> dict:
        return {name: value for name, value in batch("left").items() if name != "labels"}

    def guess(model: nn.Module) -> dict:  # guesses that fail are cropped from the cache
        return generate(model, {name: value[:1] for name, value in prompt().items()}, prompt_lookup_num_tokens=3)

    yield "speculation", {}, guess
    if plan[0] in "0v" and plan != "0:avgpool:1":
        prefix = Prefix(32)
        yield "prefix", {"prefix": prefix}, lambda model: train(model, batch("right"))
        yield "prefix chunks", {"prefix": prefix}, lambda model: chunks(model, prompt())


def cases() -> Iterator[tuple[str, Callable[[], dict]]]:
    """(name, what gives its tensors) of every case, one model at a time."""
    import test_backends  # noqa: F401  registers flash_on_cpu
    from families_tiny import FAMILIES
    from tiny import ragged_batch, tiny_llava

    from llavolta import compress

    @lru_cache(maxsize=1)
    def load(family: str, backend: str) -> tuple[nn.Module, dict[str, dict]]:
        if family == "llava":
            model = tiny_llava()
            model.get_decoder().config._attn_implementation_internal = backend  # of the decoder alone
            return model, {side: ragged_batch(ROWS, side=side) for side in ("left", "right")}
        left, right = (FAMILIES[family.split()[0]](side, backend) for side in ("left", "right"))
        return right.model, {"left": left.batch, "right": right.batch}

    def run(family: str, backend: str, plan: str, options: dict, use: Callable) -> dict:
        model, _ = load(family, backend)
        model.zero_grad()
        torch.manual_seed(0)
        flex = backend == "flex_attention"
        stance = torch.compiler.set_stance("force_eager" if flex else "default")
        with stance, torch.set_grad_enabled(not flex), compress(model.eval(), plan, **options):
            return dict(tensors(use(model)))

    models = [("llava", backend, PLANS) for backend in BACKENDS]
    models += [(f"{name} of families", backend, FAMILY_PLANS) for name in FAMILIES for backend in ("sdpa", "eager")]
    for family, backend, plans in models:
        batch = partial(lambda family, backend, side: load(family, backend)[1][side], family, backend)
        for plan in plans:
            more = more_uses(batch, plan) if (family, backend) == ("llava", "sdpa") else ()
            for name, options, use in (*uses(batch, backend), *more):
                yield f"{family} {backend} {plan} {name}", partial(run, family, backend, plan, options, use)


def dump(checkout: Path, only: str, file: Path) -> None:
    """Write what each case gives under ``checkout`` to ``file``: tensors, and errors in its metadata."""
    sys.path[:1] = [str(checkout), str(checkout / "tests"), str(checkout / "tests" / "compression")]
    import llavolta

    if checkout not in Path(llavolta.__file__).parents:
        raise SystemExit(f"{llavolta.__file__} was imported, not the package in {checkout}")
    torch.set_num_threads(1)
    found, outcomes = {}, {}
    for name, give in cases():
        if not re.search(only, name):
            continue
        try:
            given = give()
            outcomes[name] = f"{len(given)} tensors"
            found |= {f"{name}|{path}": value for path, value in given.items()}
        except Exception as error:  # what a plan cannot do is part of what is compared
            outcomes[name] = f"{type(error).__name__}: {error}"
    if not outcomes:
        raise SystemExit(f"no case is named like {only!r}")
    save_file(found, file, metadata=outcomes)


def differences(old: Path, new: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """{case: what differs} between two files of ``dump``, and {case: outcome} of the new one."""
    with safe_open(old, "pt") as before, safe_open(new, "pt") as after:
        was, now = before.metadata() or {}, after.metadata() or {}
        names = {name: was.get(name, "no such case") for name in {**was, **now}}
        found = {name: [f"{a} -> {b}"] for name, a in names.items() if (b := now.get(name, "no such case")) != a}
        held = set(after.keys())
        for key in before.keys():  # noqa: SIM118  (a file, not a dict)
            name, _, path = key.partition("|")
            if name in found and key not in held:
                continue
            if key not in held:
                found.setdefault(name, []).append(f"{path} is gone")
                continue
            told = _difference(before.get_tensor(key), after.get_tensor(key))
            if told:
                found.setdefault(name, []).append(f"{path} {told}")
    return found, now


def _difference(old: Tensor, new: Tensor) -> str:
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"{old.dtype} {tuple(old.shape)} -> {new.dtype} {tuple(new.shape)}"
    if torch.equal(*(value.reshape(-1).view(torch.uint8) for value in (old, new))):  # bits: NaN equals itself
        return ""
    return f"by up to {(old.double() - new.double()).abs().max():.3g}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path, help="folder of one checkout")
    parser.add_argument("new", type=Path, help="folder of the other")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose names match, by default all")
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)  # what the processes of main are told
    given = parser.parse_args(arguments)
    if given.dump:
        dump(given.new.resolve(), given.only, given.dump)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("old.safetensors", "new.safetensors")]
        running = []
        for checkout, file in zip((given.old, given.new), files, strict=True):
            checkout = str(checkout.resolve())
            environment = {**os.environ, "PYTHONPATH": checkout, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
            command = [sys.executable, __file__, checkout, checkout, "--only", given.only, "--dump", str(file)]
            running.append(subprocess.Popen(command, env=environment, cwd=folder))
        if any([process.wait() for process in running]):
            print("a checkout could not be run")
            return 2
        found, outcomes = differences(*files)
    for name, told in sorted(found.items()):
        print(f"{name}\n    " + "\n    ".join(told[:5]) + (f"\n    ... {len(told)} in all" if len(told) > 5 else ""))
    raised = sum(not outcome.endswith(" tensors") for outcome in outcomes.values())
    print(f"{len(outcomes)} cases ({raised} of them errors), {len(found)} differ")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
