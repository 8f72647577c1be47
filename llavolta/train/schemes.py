"""Training schemes: which plan is in force at which optimizer step (LLaVolta, section 4.2).

A scheme is a list of stages. A stage has a plan and a share of the optimizer steps.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

from llavolta.compression.plan import (
    VISION,
    Plan,
    check_layers,
    drawn_from,
    format_plan,
    parse_plan,
    tokens_per_layer,
)
from llavolta.errors import ConfigError, PlanError

REFERENCE_LAYERS = 32  # the depth (Vicuna-7B) that the published layers K refer to
ISOLATOR = "mode_isolator"  # attribute of a model, and file of its checkpoint; see train.dualspeed
ISOLATOR_TOKENS = 4


def compression_ratio(num_layers: int, num_tokens: int, layer: int, stride: int) -> float:
    """Return the compression ratio of average pooling (LLaVolta, section 4.1).

    It is ``CR = N L / ((N - K) L_out + K L)`` with ``L_out = ceil(L / stride)``.

    Args:
        num_layers: Decoder layers N.
        num_tokens: Visual tokens L of an image.
        layer: The decoder layer K, from 0, at whose input tokens are pooled.
        stride: How many tokens are averaged to one.
    """
    if not 0 <= layer < num_layers:
        raise ConfigError(f"layer must be 0..{num_layers - 1}, not {layer}")
    return plan_compression_ratio(f"{layer}:avgpool:{stride}", num_layers, num_tokens)


def plan_compression_ratio(plan, num_layers: int, num_tokens: int) -> float:
    """Return the visual tokens of all layers without compression, divided by those under ``plan``.

    Infinite if the plan leaves no layer a visual token.
    """
    left = sum(tokens_per_layer(plan, num_layers, num_tokens))
    return num_layers * num_tokens / left if left else math.inf


@dataclass(frozen=True)
class Pass:
    """One run of the model over a batch within an optimizer step.

    Attributes:
        plan: The plan in force, as text.
        share: Share of the stage's steps that have this pass.
        prefix: Tokens that are put before each image.
        trains: Whether there is a backward pass.
    """

    plan: str
    share: float = 1
    prefix: int = 0
    trains: bool = True


@dataclass(frozen=True)
class Stage:
    """One stage of a scheme: a plan, and its share of the optimizer steps.

    Attributes:
        plan: The plan's text. With alternatives, as in ``"0:avgpool2d:1|2|4"``, one of them is
            drawn uniformly at each step.
        share: Share of the scheme's steps, above 0 and at most 1.
        slow_every: Every so many steps is one of DualSpeed's slow steps, on all tokens. The others
            are its fast steps, under ``plan`` and with the mode isolator. 0: neither. See
            train.dualspeed.
        isolated: Whether all steps have the mode isolator, without slow steps, as in DualSpeed's
            alignment.
        warmup: Share of the stage's steps in which the learning rate rises again, from 0.
        lr_scale: Multiplier on the scheduled learning rate.
        choices: The parsed plans that are drawn from, mostly one.

    Raises:
        PlanError: A plan cannot be read.
        ConfigError: Another value is wrong, or two do not fit together.
    """

    plan: str
    share: float
    slow_every: int = 0
    isolated: bool = False
    warmup: float = 0.0
    lr_scale: float = 1.0
    choices: tuple[Plan, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        # The class is frozen, so fields are set through object.
        drawn = drawn_from(self.plan) if isinstance(self.plan, str) else (self.plan,)
        object.__setattr__(self, "choices", tuple(parse_plan(plan) for plan in drawn))
        if len(drawn) == 1:
            object.__setattr__(self, "plan", format_plan(self.choices[0]))
        elif self.slow_every or self.isolated:
            raise ConfigError(
                f"plan {self.plan!r} is drawn for each step, which cannot be with slow_every or "
                "isolated"
            )
        if isinstance(self.share, bool) or not (
            isinstance(self.share, (int, float)) and 0 < self.share <= 1
        ):
            raise ConfigError(f"a stage's share must be above 0 and at most 1, not {self.share!r}")
        every = self.slow_every
        if isinstance(every, bool) or not isinstance(every, int) or every < 0 or every == 1:
            raise ConfigError(
                "slow_every must be 0 (no slow steps) or a whole number of at least 2, not "
                f"{every!r}"
            )
        if isinstance(self.warmup, bool) or not (
            isinstance(self.warmup, (int, float)) and 0 <= self.warmup < 1
        ):
            raise ConfigError(
                "a stage's warmup must be a share of its steps from 0 to below 1, not "
                f"{self.warmup!r}"
            )
        scale = self.lr_scale
        if isinstance(scale, bool) or not (
            isinstance(scale, (int, float)) and 0 < scale < math.inf
        ):
            raise ConfigError(f"lr_scale must be a number above 0, not {scale!r}")
        if not isinstance(self.isolated, bool):
            raise ConfigError(f"isolated must be true or false, not {self.isolated!r}")
        if every and self.isolated:
            raise ConfigError(
                "fast steps are behind the isolator anyway; leave isolated out where slow_every is "
                "given"
            )
        if self.isolates and not {0, VISION} & self.choices[0].keys():
            raise ConfigError(
                "fast steps are shortened before the decoder: with "
                f"{'slow_every' if every else 'isolated'}, plan {self.plan!r} needs a compressor "
                "at layer 0 or 'vision', such as '0:divprune:0.1'"
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
        """The passes of the stage's steps, with their shares.

        A slow step has two: it trains on all tokens, and runs in fast mode without training.
        """
        if self.isolated:
            return (Pass(self.plan, 1, ISOLATOR_TOKENS),)
        if not self.slow_every:
            return tuple(Pass(format_plan(plan), 1 / len(self.choices)) for plan in self.choices)
        # Every slow step also runs in fast mode, without a backward pass, to compare the two.
        slow, fast = 1 / self.slow_every, Pass(self.plan, 1 - 1 / self.slow_every, ISOLATOR_TOKENS)
        return (fast, Pass("none", slow), replace(fast, share=slow, trains=False))

    def drawn(self, step: int, seed: int) -> Stage:
        """Return the stage with the plan of one step, from 0. The same seed draws the same plan."""
        if len(self.choices) == 1:
            return self
        # Seeded by the step, not drawn in sequence: a resumed run draws the same plans.
        return self.fixed()[random.Random(f"{seed} {step}").randrange(len(self.choices))]

    def fixed(self) -> list[Stage]:
        """Return a stage for each plan that is drawn from."""
        return [replace(self, plan=format_plan(plan)) for plan in self.choices]

    def tokens_per_layer(self, num_layers: int, num_tokens: int) -> list[float]:
        """Return the visual tokens of an image per layer, as ``plan.tokens_per_layer`` for a plan.

        They are means over the stage's steps. Passes without training do not count.
        """
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
    """Stages in their order. Which one a step has depends on the step and on their total alone.

    Attributes:
        name: Name of the scheme.
        stages: The stages; their shares sum to 1.
        align: The stage of projector alignment. Its share is the share of the run's alignment steps
            that is done. None: all of these steps, under ``TrainConfig.align_plan``.

    Raises:
        ConfigError: The shares do not sum to 1.
    """

    name: str
    stages: tuple[Stage, ...]
    align: Stage | None = None

    def __post_init__(self):
        object.__setattr__(self, "stages", tuple(self.stages))
        total = sum(stage.share for stage in self.stages)
        if not self.stages or not math.isclose(total, 1, abs_tol=1e-6):
            raise ConfigError(
                f"scheme {self.name!r}: the shares of its stages sum to {total:g}, not to 1"
            )

    @classmethod
    def equal(cls, name: str, *plans: str) -> Scheme:
        """Return a scheme of one stage per plan, which share the steps equally."""
        return cls(name, tuple(Stage(plan, 1 / len(plans)) for plan in plans))

    @classmethod
    def of(cls, name: str, stages: Sequence[str | dict]) -> Scheme:
        """Return a scheme from a list, as a YAML file has it.

        Args:
            name: Name of the scheme.
            stages: Plans, which share the steps equally, or dicts of Stage's fields. The first item
                may be ``{"align": {...}}`` with the fields of the alignment stage.

        Raises:
            ConfigError: The list has another form, or a stage is wrong.
        """
        try:
            align, rest = None, stages
            if stages and isinstance(stages[0], dict) and set(stages[0]) == {"align"}:
                align, rest = Stage(**{"share": 1, **stages[0]["align"]}), stages[1:]
            if all(isinstance(stage, str) for stage in rest):
                return replace(cls.equal(name, *rest), align=align)
            return cls(name, tuple(Stage(**stage) for stage in rest), align)
        except TypeError:
            raise ConfigError(
                f"stages must be a list of plans or a list of {{plan, share}}, not {stages!r}"
            ) from None

    @classmethod
    def from_pivots(
        cls, name: str, plans: Sequence[str], pivots: Sequence[int], total_steps: int
    ) -> Scheme:
        """Return a scheme whose stage i ends before optimizer step ``pivots[i]``.

        The last stage ends at ``total_steps``.

        Raises:
            ConfigError: The pivots do not rise from 0 to ``total_steps``, or their number is wrong.
        """
        if not all(isinstance(pivot, int) and not isinstance(pivot, bool) for pivot in pivots):
            raise ConfigError(f"pivots must be optimizer steps, not {list(pivots)}")
        edges = [0, *pivots, total_steps]
        if len(plans) != len(pivots) + 1 or any(
            a >= b for a, b in zip(edges, edges[1:], strict=False)
        ):
            raise ConfigError(
                f"{len(plans)} plans need {len(plans) - 1} pivots rising from 0 to {total_steps}, "
                f"not {list(pivots)}"
            )
        shares = [(b - a) / total_steps for a, b in zip(edges, edges[1:], strict=False)]
        return cls(
            name, tuple(Stage(plan, share) for plan, share in zip(plans, shares, strict=True))
        )

    @property
    def written(self) -> list[dict]:
        """Alignment and stages as ``of`` reads them; fields with their defaults are left out."""
        align = (
            []
            if self.align is None
            else [{"align": _written(self.align, *["share"] * (self.align.share == 1))}]
        )
        return align + [_written(stage) for stage in self.stages]

    def reversed(self, name: str) -> Scheme:
        """Return the same stages in the opposite order, at the same cost."""
        return replace(self, name=name, stages=self.stages[::-1])

    def shuffled(self, name: str, blocks: int = 4, seed: int = 0) -> Scheme:
        """Cut each stage into ``blocks`` equal parts, and put all parts in random order."""
        parts = [
            replace(stage, share=stage.share / blocks)
            for stage in self.stages
            for _ in range(blocks)
        ]
        return replace(self, name=name, stages=tuple(random.Random(seed).sample(parts, len(parts))))

    def boundaries(self, total_steps: int) -> tuple[int, ...]:
        """Return the step before which each stage ends; the last is ``total_steps``.

        Every stage has at least one step.

        Raises:
            ConfigError: There are fewer steps than stages.
        """
        if total_steps < len(self.stages):
            raise ConfigError(
                f"{total_steps} steps are too few for the {len(self.stages)} stages of "
                f"{self.name!r}"
            )
        ends, share = [], 0.0
        for number, stage in enumerate(self.stages, start=1):
            share += stage.share
            # At least one step is left for each later stage.
            room = total_steps - (len(self.stages) - number)
            ends.append(min(max(round(share * total_steps), ends[-1] + 1 if ends else 1), room))
        return tuple(ends)

    def stage_at(self, step: int, total_steps: int) -> int:
        """Return the index, from 0, of the stage that trains an optimizer step, from 0."""
        if not 0 <= step < total_steps:
            raise ConfigError(f"step must be 0..{total_steps - 1}, not {step}")
        return sum(step >= end for end in self.boundaries(total_steps))

    def warmth(self, step: int, total_steps: int) -> float:
        """Return the multiplier on the scheduled learning rate at an optimizer step, from 0.

        It is the lr_scale of the step's stage, and less while the stage warms up.
        """
        stage = self.stage_at(step, total_steps)
        first, end = [0, *self.boundaries(total_steps)][stage : stage + 2]
        rising = (step - first + 1) / max(1, round(self.stages[stage].warmup * (end - first)))
        return self.stages[stage].lr_scale * min(1.0, rising)

    def is_slow(self, step: int, total_steps: int) -> bool:
        """Return whether optimizer step ``step``, from 0, is one of DualSpeed's slow steps."""
        every = self.stages[self.stage_at(step, total_steps)].slow_every
        return every > 0 and (step + 1) % every == 0

    def scaled(self, num_layers: int, reference_layers: int = REFERENCE_LAYERS) -> Scheme:
        """Return the scheme for a model of another depth.

        Layer K of ``reference_layers`` becomes ``round(K * num_layers / reference_layers)``, halves
        rounded up. It becomes at least 1 if K is at least 1, so that a scheme whose first layers
        see every token keeps that property.

        Args:
            num_layers: Decoder layers of the model.
            reference_layers: Decoder layers that the scheme was written for.

        Raises:
            PlanError: Two layers of a plan become the same one, or a plan does not fit the model.
        """
        stages = (
            replace(s, plan=scale_plan(s.plan, num_layers, reference_layers)) for s in self.stages
        )
        align = self.align and replace(
            self.align, plan=scale_plan(self.align.plan, num_layers, reference_layers)
        )
        return replace(self, stages=tuple(stages), align=align)


def _written(stage: Stage, *without: str) -> dict:
    """Return the fields of a stage that are not at their defaults, except those of ``without``."""
    held = [field for field in fields(stage) if field.init and field.name not in without]
    return {
        field.name: getattr(stage, field.name)
        for field in held
        if getattr(stage, field.name) != field.default
    }


def scale_layer(layer: int, num_layers: int, reference_layers: int = REFERENCE_LAYERS) -> int:
    """Scale the number of a layer from one depth to another; see ``Scheme.scaled``."""
    return max(min(layer, 1), math.floor(layer * num_layers / reference_layers + 0.5))


def scale_plan(plan: str | Plan, num_layers: int, reference_layers: int = REFERENCE_LAYERS) -> str:
    """Scale the layers of a plan from one depth to another; see ``Scheme.scaled``.

    Args:
        plan: A plan, or its text, maybe with alternatives.
        num_layers: Decoder layers of the model.
        reference_layers: Decoder layers that the plan was written for.

    Returns:
        The plan's text, its layers in rising order.
    """

    def new_layer(layer: int | str) -> int | str:
        return layer if layer == VISION else scale_layer(int(layer), num_layers, reference_layers)

    # Alternatives may stand in layers and in options, so layers are replaced in the text.
    if isinstance(plan, str) and "|" in plan:
        for drawn in drawn_from(plan):
            scale_plan(drawn, num_layers, reference_layers)  # raises for a plan that does not fit
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

# DualSpeed's code truncates 0.1 L where DivPrune rounds: 57 of 576 tokens, 14 of 144.
_DIVERSE = "0:divprune:0.099"
BASELINE_SCHEMES = {
    "dualspeed": Scheme(
        "dualspeed", (Stage(_DIVERSE, 1, slow_every=10),), Stage(_DIVERSE, 1, isolated=True)
    ),
    "dualspeed-random": Scheme("dualspeed-random", (Stage("0:random:0.1", 1, slow_every=10),)),
}
"""What others train by: DualSpeed (arXiv 2602.03815), as in its code. Fast steps and alignment see
tokens that are chosen to be diverse, and tuning starts from the isolator that alignment trains. As
a control, a variant has random tokens, and alignment on all tokens."""

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
"""The best of a search among thirty: the whole recipe in 0.4 of the time (papers/faster). Alignment
sees a sixteenth of the tokens, and fewer still in the upper half of the layers. The first stage
sees a quarter (means of clusters), and next to none in the upper half, where the text has already
absorbed what it needs. The second sees all in the lower half, the third all. Both raise the
learning rate, which the schedule has lowered by then."""

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
"""What staged pooling is compared with: its stages in other orders at the same cost, one light plan
for all steps, and pruning by attention to the same number of tokens."""

SCHEMES = PAPER_SCHEMES | BASELINE_SCHEMES | EXTRA_SCHEMES | CONTROL_SCHEMES
"""All named schemes, for REFERENCE_LAYERS layers. Every command knows a scheme that is added here
by its name."""

# Old names of the registries, which still work with a DeprecationWarning.
_RENAMED = {"NAMED": "SCHEMES", "NEIGHBOURS": "BASELINE_SCHEMES", "OURS": "EXTRA_SCHEMES"}


def __getattr__(name: str):
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} is now {_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
