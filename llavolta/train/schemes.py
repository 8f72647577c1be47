"""Training schemes: which plan is in force at which optimizer step (LLaVolta, section 4.2)."""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from llavolta.compression.plan import (
    VISION,
    Plan,
    PlanError,
    check_layers,
    drawn_from,
    format_plan,
    parse_plan,
    tokens_per_layer,
)
from llavolta.errors import UserError

REFERENCE_LAYERS = 32  # the depth (Vicuna-7B) that the published layers K refer to
ISOLATOR = "mode_isolator"  # the name of DualSpeed's, in a model and its checkpoint
ISOLATOR_TOKENS = 4


class SchemeError(UserError, ValueError):
    """A stage, scheme or step that cannot be; the message says what it may be."""


def compression_ratio(num_layers: int, num_tokens: int, layer: int, stride: int) -> float:
    """``CR = N L / ((N - K) L_out + K L)`` for average pooling with ``stride`` at the input of decoder ``layer`` K.

    N = ``num_layers``, L = ``num_tokens`` visual tokens, ``L_out = ceil(L / stride)``. Source: LLaVolta, section 4.1.
    """
    if not 0 <= layer < num_layers:
        raise SchemeError(f"layer must be 0..{num_layers - 1}, not {layer}")
    return plan_compression_ratio(f"{layer}:avgpool:{stride}", num_layers, num_tokens)


def plan_compression_ratio(plan, num_layers: int, num_tokens: int) -> float:
    """The same ratio for any plan: visual tokens summed over the layers without compression over those with it."""
    left = sum(tokens_per_layer(plan, num_layers, num_tokens))
    return num_layers * num_tokens / left if left else math.inf


@dataclass(frozen=True)
class Pass:
    """One run of the model over a batch in a step: with ``prefix`` more tokens before each picture, and backward if it
    ``trains``. share: in how many of the stage's steps."""

    plan: str
    share: float = 1
    prefix: int = 0
    trains: bool = True


@dataclass(frozen=True)
class Stage:
    """One stage of a scheme: the ``plan`` in force and its ``share`` of the optimizer steps (0 to 1).

    The plan may be drawn anew for each step, uniformly: ``"0:avgpool2d:1|2|4"``; see ``drawn``.
    choices: the plans that it is drawn from, mostly one, parsed once; the plan itself is the text that it prints as.
    slow_every: 0, or after how many steps there is one of DualSpeed's slow steps, on all tokens; the steps between are
    its fast ones, on what ``plan`` leaves behind the mode isolator. isolated: behind the isolator without slow steps,
    as DualSpeed aligns. See llavolta.train.dualspeed. warmup: the share of the stage's steps in which the learning rate
    rises anew, from 0 to what the run's schedule says, times lr_scale.
    """

    plan: str
    share: float
    slow_every: int = 0
    isolated: bool = False
    warmup: float = 0.0
    lr_scale: float = 1.0
    choices: tuple[Plan, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        drawn = drawn_from(self.plan) if isinstance(self.plan, str) else (self.plan,)
        object.__setattr__(self, "choices", tuple(parse_plan(plan) for plan in drawn))
        if len(drawn) == 1:
            object.__setattr__(self, "plan", format_plan(self.choices[0]))
        elif self.slow_every or self.isolated:
            raise SchemeError(
                f"plan {self.plan!r} is drawn for each step, which cannot be with slow_every or isolated"
            )
        if isinstance(self.share, bool) or not (
            isinstance(self.share, (int, float)) and 0 < self.share <= 1
        ):
            raise SchemeError(f"a stage's share must be above 0 and at most 1, not {self.share!r}")
        every = self.slow_every
        if isinstance(every, bool) or not isinstance(every, int) or every < 0 or every == 1:
            raise SchemeError(
                f"slow_every must be 0 (no slow steps) or a whole number of at least 2, not {every!r}"
            )
        if isinstance(self.warmup, bool) or not (
            isinstance(self.warmup, (int, float)) and 0 <= self.warmup < 1
        ):
            raise SchemeError(
                f"a stage's warmup must be a share of its steps from 0 to below 1, not {self.warmup!r}"
            )
        scale = self.lr_scale
        if isinstance(scale, bool) or not (
            isinstance(scale, (int, float)) and 0 < scale < math.inf
        ):
            raise SchemeError(f"lr_scale must be a number above 0, not {scale!r}")
        if not isinstance(self.isolated, bool):
            raise SchemeError(f"isolated must be true or false, not {self.isolated!r}")
        if every and self.isolated:
            raise SchemeError(
                "fast steps are behind the isolator anyway; leave isolated out where slow_every is given"
            )
        if self.isolates and not {0, VISION} & self.choices[0].keys():
            raise SchemeError(
                f"fast steps are shortened before the decoder: with {'slow_every' if every else 'isolated'}, plan "
                f"{self.plan!r} needs a compressor at layer 0 or 'vision', such as '0:divprune:0.1'"
            )

    @property
    def isolates(self) -> bool:
        """Whether steps train the mode isolator."""
        return self.isolated or self.slow_every > 0

    def __str__(self) -> str:
        parts = ["isolated"] * self.isolated + [f"slow every {self.slow_every}"] * bool(
            self.slow_every
        )
        parts += [f"warmup {self.warmup:g}"] * bool(self.warmup)
        return ", ".join(
            [self.plan, *parts, *([f"learning rate x {self.lr_scale:g}"] * (self.lr_scale != 1))]
        )

    @property
    def passes(self) -> tuple[Pass, ...]:
        """What the steps of this stage compute: a slow step asks the fast mode, too, without training it."""
        if self.isolated:
            return (Pass(self.plan, 1, ISOLATOR_TOKENS),)
        if not self.slow_every:
            return tuple(Pass(format_plan(plan), 1 / len(self.choices)) for plan in self.choices)
        slow, fast = 1 / self.slow_every, Pass(self.plan, 1 - 1 / self.slow_every, ISOLATOR_TOKENS)
        return (fast, Pass("none", slow), replace(fast, share=slow, trains=False))

    def drawn(self, step: int, seed: int) -> Stage:
        """The stage as it is in optimizer step ``step``, of one plan; the same for the same seed."""
        if len(self.choices) == 1:
            return self
        return self.fixed()[random.Random(f"{seed} {step}").randrange(len(self.choices))]

    def fixed(self) -> list[Stage]:
        """A stage of each plan that this one's is drawn from."""
        return [replace(self, plan=format_plan(plan)) for plan in self.choices]

    def tokens_per_layer(self, num_layers: int, num_tokens: int) -> list[float]:
        """As plan.tokens_per_layer: the mean over the stage's steps, of the passes that train."""
        counts = [
            [
                p.share * (count + p.prefix)
                for count in tokens_per_layer(p.plan, num_layers, num_tokens)
            ]
            for p in self.passes
            if p.trains
        ]
        return [sum(layer) for layer in zip(*counts, strict=True)]


@dataclass(frozen=True)
class Scheme:
    """Stages in their order; their shares sum to 1. The stage is a function of the step and the total alone.

    align: the stage that projector alignment before them is, its share that of the run's steps of alignment which are
    done; None: all of them, on all tokens.
    """

    name: str
    stages: tuple[Stage, ...]
    align: Stage | None = None

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))
        total = sum(stage.share for stage in self.stages)
        if not self.stages or not math.isclose(total, 1, abs_tol=1e-6):
            raise SchemeError(
                f"scheme {self.name!r}: the shares of its stages sum to {total:g}, not to 1"
            )

    @classmethod
    def equal(cls, name: str, *plans: str) -> Scheme:
        """A scheme whose stages share the steps equally."""
        return cls(name, tuple(Stage(plan, 1 / len(plans)) for plan in plans))

    @classmethod
    def of(cls, name: str, stages: Sequence[str | dict]) -> Scheme:
        """A scheme from a list as YAML holds it: plans, which share the steps equally, or Stage's fields each; the
        first may be ``{align: {plan, share, isolated}}``, what projector alignment is."""
        try:
            align, rest = None, stages
            if stages and isinstance(stages[0], dict) and set(stages[0]) == {"align"}:
                align, rest = Stage(**{"share": 1, **stages[0]["align"]}), stages[1:]
            if all(isinstance(stage, str) for stage in rest):
                return replace(cls.equal(name, *rest), align=align)
            return cls(name, tuple(Stage(**stage) for stage in rest), align)
        except TypeError:
            raise SchemeError(
                f"stages must be a list of plans or a list of {{plan, share}}, not {stages!r}"
            ) from None

    @classmethod
    def from_pivots(
        cls, name: str, plans: Sequence[str], pivots: Sequence[int], total_steps: int
    ) -> Scheme:
        """A scheme whose stage i ends before optimizer step ``pivots[i]``; the last one ends at ``total_steps``."""
        if not all(isinstance(pivot, int) and not isinstance(pivot, bool) for pivot in pivots):
            raise SchemeError(f"pivots must be optimizer steps, not {list(pivots)}")
        edges = [0, *pivots, total_steps]
        if len(plans) != len(pivots) + 1 or any(
            a >= b for a, b in zip(edges, edges[1:], strict=False)
        ):
            raise SchemeError(
                f"{len(plans)} plans need {len(plans) - 1} pivots rising from 0 to {total_steps}, not {list(pivots)}"
            )
        shares = [(b - a) / total_steps for a, b in zip(edges, edges[1:], strict=False)]
        return cls(
            name, tuple(Stage(plan, share) for plan, share in zip(plans, shares, strict=True))
        )

    @property
    def written(self) -> list[dict]:
        """Alignment and stages as ``of`` reads them back, without what is not in use."""
        align = (
            []
            if self.align is None
            else [{"align": _written(self.align, *["share"] * (self.align.share == 1))}]
        )
        return align + [_written(stage) for stage in self.stages]

    def reversed(self, name: str) -> Scheme:
        """The same stages in the opposite order, at the same cost."""
        return replace(self, name=name, stages=self.stages[::-1])

    def shuffled(self, name: str, blocks: int = 4, seed: int = 0) -> Scheme:
        """Each stage cut into ``blocks`` equal parts, all parts in one random order, at the same cost."""
        parts = [
            replace(stage, share=stage.share / blocks)
            for stage in self.stages
            for _ in range(blocks)
        ]
        return replace(self, name=name, stages=tuple(random.Random(seed).sample(parts, len(parts))))

    def boundaries(self, total_steps: int) -> tuple[int, ...]:
        """The step before which each stage ends; the last is ``total_steps``. Every stage has at least one step."""
        if total_steps < len(self.stages):
            raise SchemeError(
                f"{total_steps} steps are too few for the {len(self.stages)} stages of {self.name!r}"
            )
        ends, share = [], 0.0
        for number, stage in enumerate(self.stages, start=1):
            share += stage.share
            room = total_steps - (
                len(self.stages) - number
            )  # one step at least for each stage to come
            ends.append(min(max(round(share * total_steps), ends[-1] + 1 if ends else 1), room))
        return tuple(ends)

    def stage_at(self, step: int, total_steps: int) -> int:
        """The index, from 0, of the stage that trains optimizer step ``step`` (0 .. total_steps - 1)."""
        if not 0 <= step < total_steps:
            raise SchemeError(f"step must be 0..{total_steps - 1}, not {step}")
        return sum(step >= end for end in self.boundaries(total_steps))

    def warmth(self, step: int, total_steps: int) -> float:
        """What optimizer step ``step`` has of the learning rate that the run's schedule says: its stage's lr_scale, or
        less while the stage warms up."""
        stage = self.stage_at(step, total_steps)
        first, end = [0, *self.boundaries(total_steps)][stage : stage + 2]
        rising = (step - first + 1) / max(1, round(self.stages[stage].warmup * (end - first)))
        return self.stages[stage].lr_scale * min(1.0, rising)

    def is_slow(self, step: int, total_steps: int) -> bool:
        """Whether optimizer step ``step`` is a slow one: see Stage."""
        every = self.stages[self.stage_at(step, total_steps)].slow_every
        return every > 0 and (step + 1) % every == 0

    def scaled(self, num_layers: int, reference_layers: int = REFERENCE_LAYERS) -> Scheme:
        """The scheme for a model of another depth.

        Layer K of ``reference_layers`` becomes ``round(K * num_layers / reference_layers)``, halves rounded up, and
        at least 1 where K is: a scheme that lets the first layers see every token keeps doing so.
        """
        stages = (
            replace(s, plan=scale_plan(s.plan, num_layers, reference_layers)) for s in self.stages
        )
        align = self.align and replace(
            self.align, plan=scale_plan(self.align.plan, num_layers, reference_layers)
        )
        return replace(self, stages=tuple(stages), align=align)


def _written(stage: Stage, *without: str) -> dict:
    held = [field for field in fields(stage) if field.init and field.name not in without]
    return {
        field.name: getattr(stage, field.name)
        for field in held
        if getattr(stage, field.name) != field.default
    }


def scale_layer(layer: int, num_layers: int, reference_layers: int = REFERENCE_LAYERS) -> int:
    """``layer`` of a model of ``reference_layers`` layers in one of ``num_layers``; see Scheme.scaled."""
    return max(min(layer, 1), math.floor(layer * num_layers / reference_layers + 0.5))


def scale_plan(plan: str | Plan, num_layers: int, reference_layers: int = REFERENCE_LAYERS) -> str:
    """``plan`` moved from a model of ``reference_layers`` layers to one of ``num_layers``; see Scheme.scaled."""

    def new_layer(layer: int | str) -> int | str:
        return layer if layer == VISION else scale_layer(int(layer), num_layers, reference_layers)

    if isinstance(plan, str) and "|" in plan:  # in layers and in options
        for drawn in drawn_from(plan):
            scale_plan(drawn, num_layers, reference_layers)  # raises what is wrong with any of them
        entries = []
        for entry in plan.split(";"):
            layers, rest = entry.split(":", 1)
            layers = [new_layer(layer.strip()) for layer in layers.split("|")]
            entries.append((layers, rest.strip()))
        entries.sort(key=lambda entry: -1 if VISION in entry[0] else min(entry[0]))
        return ";".join(f"{'|'.join(map(str, layers))}:{rest}" for layers, rest in entries)
    scaled = {}
    for layer, compressor in parse_plan(plan).items():
        new = new_layer(layer)
        if new in scaled:
            raise PlanError(
                f"plan {plan!r} has two layers that both become layer {new} of {num_layers}"
            )
        scaled[new] = compressor
    return format_plan(check_layers(scaled, num_layers))


PAPER_SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme.equal("single-stage", "none"),
        Scheme.equal("heavy", "2:avgpool:8", "none"),
        Scheme.equal("light", "16:avgpool:8", "none"),
        Scheme.equal("three-stage", "2:avgpool:8", "16:avgpool:8", "none"),
        Scheme.equal("four-stage-wider", "2:avgpool:8", "2:avgpool:2", "16:avgpool:2", "none"),
        Scheme.equal("four-stage-deeper", "2:avgpool:8", "16:avgpool:8", "16:avgpool:2", "none"),
    )
}
"""LLaVolta's six."""

_DIVERSE = "0:divprune:0.099"  # int(0.1 L) of 576 tokens and of 144, as its code truncates where DivPrune rounds
BASELINE_SCHEMES = {
    "dualspeed": Scheme(
        "dualspeed", (Stage(_DIVERSE, 1, slow_every=10),), Stage(_DIVERSE, 1, isolated=True)
    ),
    "dualspeed-random": Scheme("dualspeed-random", (Stage("0:random:0.1", 1, slow_every=10),)),
}
"""What others train by: DualSpeed (arXiv 2602.03815) as its code has it: diverse tokens in the fast steps, of which
alignment consists; the isolator that is trained there is where tuning starts from. Beside it, as a control, random
tokens, after alignment on all."""

EXTRA_SCHEMES = {
    "fast": Scheme(
        "fast",
        (
            Stage("0:kmeans:0.25;16:avgpool:36", 0.66),
            Stage("16:avgpool:8", 0.24, lr_scale=2),
            Stage("none", 0.1, lr_scale=4),
        ),
        Stage("0:avgpool2d:4;16:avgpool:9", 1),
    )
}
"""The whole recipe in 0.4 of the time: what won a search among thirty (papers/faster). Alignment on a sixteenth of the
tokens; tuning on a quarter, means of clusters, and on next to none in the upper half of the layers, where the text has
taken up what it asks for; then on all in the lower half; then on all, at more of the learning rate than the schedule
has left."""

_three = PAPER_SCHEMES["three-stage"]
CONTROL_SCHEMES = {
    scheme.name: scheme
    for scheme in (
        _three.reversed("three-stage-reversed"),
        _three.shuffled("three-stage-shuffled"),
        Scheme.equal("constant", "16:avgpool:8"),
        Scheme.equal("three-stage-pruned", "2:pyramiddrop:0.125", "16:pyramiddrop:0.125", "none"),
    )
}
"""What staged pooling is compared with: other orders of the same stages at the same cost, one light plan to the end,
and pruning by attention to the same number of tokens in place of pooling."""

SCHEMES = PAPER_SCHEMES | BASELINE_SCHEMES | EXTRA_SCHEMES | CONTROL_SCHEMES
"""All named schemes, for REFERENCE_LAYERS layers. A scheme added here is known to every command by its name."""

_RENAMED = {"NAMED": "SCHEMES", "NEIGHBOURS": "BASELINE_SCHEMES", "OURS": "EXTRA_SCHEMES"}


def __getattr__(name: str):
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
