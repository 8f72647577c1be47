"""Plans: which compressor works at the input of which decoder layer, as a dict or as text.

``"2:avgpool:8"`` is ``{2: AveragePool(stride=8)}``. Several entries are joined by ``;``. Options
follow the compressor's name in order, or as ``option=value``. ``"none"`` is the empty plan. Layer
"vision" is the vision tower's output, before the projector. Layer 0 is the decoder's input, after
the projector. In a stage of a scheme, ``"0:avgpool2d:1|2|4"`` is one of three plans, drawn for each
step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from itertools import product

from llavolta.compression.compressors import COMPRESSORS, Compressor, Restore
from llavolta.compression.compressors.restore import options_of_restore
from llavolta.errors import PlanError

VISION = "vision"
Layer = int | str  # a decoder layer from 0, or VISION
Plan = dict[Layer, Compressor]


def parse_plan(plan: str | Mapping[Layer, Compressor] | None) -> Plan:
    """Read and check a plan.

    Args:
        plan: The plan's text, ``{layer: compressor}``, or None for the empty plan.

    Returns:
        The plan, "vision" first, then the layers in rising order.

    Raises:
        PlanError: The plan cannot be read. The message quotes what is wrong.
    """
    if plan is None:
        return {}
    if isinstance(plan, Mapping):
        entries = list(plan.items())
        for layer, compressor in entries:
            if not isinstance(compressor, Compressor):
                raise PlanError(
                    f"plan for layer {layer!r}: expected a Compressor, got {compressor!r}"
                )
    elif isinstance(plan, str):
        text = plan.strip()
        if text.lower() in ("none", ""):
            return {}
        entries = [_parse_entry(part.strip(), plan) for part in text.split(";")]
    else:
        raise PlanError(
            f"a plan is text such as '2:avgpool:8', a dict or None, not {type(plan).__name__}"
        )
    for layer, _ in entries:
        if layer != VISION and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
            raise PlanError(
                f"plan {plan!r}: a layer is a whole number from 0, or 'vision', not {layer!r}"
            )
    if len(dict(entries)) < len(entries):
        raise PlanError(f"plan {plan!r} names a layer twice; one compressor a layer")
    return dict(sorted(entries, key=_depth))


def _depth(entry: tuple[Layer, Compressor]) -> int:
    """The key to sort entries by; "vision" comes before layer 0."""
    return -1 if entry[0] == VISION else entry[0]  # pyright: ignore[reportReturnType]


def _parse_entry(entry: str, plan: str) -> tuple[Layer, Compressor]:
    """Read one entry of a plan's text. Raises PlanError, which quotes ``plan``."""
    layer, *rest = (part.strip() for part in entry.split(":"))
    if not rest or not (layer == VISION or layer.lstrip("-").isdecimal()):
        raise PlanError(
            f"cannot read {entry!r} in plan {plan!r}; write LAYER:COMPRESSOR:OPTION, as in "
            "'2:avgpool:8'"
        )
    name, *options = rest
    if name not in COMPRESSORS:
        raise PlanError(
            f"unknown compressor {name!r} in plan {plan!r}; known: {', '.join(sorted(COMPRESSORS))}"
        )
    kind = COMPRESSORS[name]
    names = [field.name for field in fields(kind)]
    try:
        if issubclass(kind, Restore) and options:
            options, inner = options_of_restore(options)
            # The text of the inner compressor is read as an entry at the same layer.
            inside = {"inner": _parse_entry(":".join([layer, *inner]), plan)[1]} if inner else {}
            parsed = parse_options(name, options, ["calibration"])
            return layer if layer == VISION else int(layer), kind(**inside, **parsed)
        given = parse_options(name, options, names)
        missing = [
            f.name
            for f in fields(kind)
            if f.name not in given and f.default is f.default_factory is MISSING
        ]
        if missing:
            raise ValueError(f"{name} needs {', '.join(missing)}")
        return layer if layer == VISION else int(layer), kind(**given)
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(
            f"plan {plan!r}: {error}; options of {name}: {', '.join(names) or 'none'}"
        ) from None


def parse_options(owner: str, options: list[str], names: list[str]) -> dict:
    """Read the options of a compressor or projector.

    Args:
        owner: Its name, for messages.
        options: The texts of the options, in the order of ``names`` or written ``name=value``.
        names: The names of its options.

    Returns:
        By name, the values: numbers and true or false are converted, other values stay text.

    Raises:
        ValueError: An option is unknown or given twice, or there are too many.
    """
    given = {}
    for place, option in enumerate(options):
        key, equals, value = option.partition("=")
        if not equals:
            if place >= len(names):
                raise ValueError(
                    f"{owner!r} takes {len(names)} options ({', '.join(names)}), not more"
                )
            key, value = names[place], option
        if key not in names or key in given:
            raise ValueError(
                f"option {key!r} of {owner!r} is unknown or given twice; options: {names}"
            )
        given[key] = _number_or_text(value)
    return given


def drawn_from(plan: str) -> tuple[str, ...]:
    """List the plans that a stage's plan is drawn from.

    Args:
        plan: The plan's text, such as ``"0:avgpool2d:1|2|4"``.

    Returns:
        The texts of the plans, three for this one. Several lists with ``|`` give every combination.
    """
    parts = [part.split("|") for part in re.split("([:;])", plan)]
    return tuple("".join(chosen) for chosen in product(*parts))


def _number_or_text(value: str) -> int | float | bool | str:
    """Convert an option's text to a bool or a number if it is one."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def format_plan(plan: Mapping[Layer, Compressor]) -> str:
    """Write a plan as text.

    Args:
        plan: The plan.

    Returns:
        The text, which ``parse_plan`` reads back as ``plan``.
    """
    return (
        ";".join(f"{layer}:{compressor}" for layer, compressor in sorted(plan.items(), key=_depth))
        or "none"
    )


def check_layers(plan: Plan, num_layers: int) -> Plan:
    """Check that a plan fits a model.

    Args:
        plan: The plan.
        num_layers: Number of decoder layers of the model.

    Returns:
        ``plan``.

    Raises:
        PlanError: A layer does not exist, or a compressor cannot work at its layer.
    """
    for layer in plan:
        if layer != VISION and layer >= num_layers:
            raise PlanError(
                f"plan {format_plan(plan)!r} names layer {layer}, but this model's {num_layers} "
                f"decoder layers are 0..{num_layers - 1}"
            )
    for layer, compressor in plan.items():
        wrong = None
        if "previous_layer" in compressor.needs and layer in (VISION, 0):
            wrong = "ranks by the layer before it, so from layer 1"
        elif "decoder" in compressor.needs and layer == VISION:
            wrong = "ranks by the attention of a decoder layer, so from layer 0, not at 'vision'"
        elif "class_token" in compressor.needs and layer != VISION:
            wrong = f"works on the vision tower's output only; write 'vision:{compressor.name}'"
        elif "tower" in compressor.needs and layer not in (VISION, 0):
            wrong = "ranks by the vision tower, so at 'vision' or layer 0"
        elif "tower" in compressor.needs and layer == 0 and VISION in plan:
            wrong = (
                "ranks by the vision tower, all of whose tokens must come to layer 0: nothing can "
                "stand at 'vision'"
            )
        elif compressor.may_empty and layer != list(plan)[-1]:
            wrong = f"leaves no visual token behind layer {layer}, so nothing can follow it"
        elif layer not in (VISION, 0) and getattr(compressor, "positions", None) == "contiguous":
            wrong = (
                "closes gaps at 'vision' and layer 0 only; deeper, leave positions out or write "
                "positions=original"
            )
        if wrong:
            raise PlanError(f"plan {format_plan(plan)!r}: {compressor.name} {wrong}")
    return plan


def tokens_per_layer(
    plan: str | Mapping[Layer, Compressor] | None, num_layers: int, num_tokens: int
) -> list[float]:
    """Count the visual tokens of one image that each layer processes.

    Args:
        plan: The plan, or its text.
        num_layers: Number of decoder layers.
        num_tokens: Number of tokens of the image before compression.

    Returns:
        One number per layer, a mean if a compressor's number depends on the image.

    Raises:
        PlanError: The plan cannot be read or does not fit ``num_layers``.
    """
    plan = check_layers(parse_plan(plan), num_layers)
    counts, left = [], plan[VISION].num_tokens(num_tokens) if VISION in plan else num_tokens
    for layer in range(num_layers):
        if layer in plan:
            left = plan[layer].num_tokens(left)
        counts.append(left)
    return counts
