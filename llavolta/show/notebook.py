"""Check the parameters of a notebook, and convert what papermill injects to their types.

A parameter's type is that of its default, or is given by a comment in papermill's syntax.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence

from llavolta.errors import ConfigError
from llavolta.paths import expand
from llavolta.train.config import parse_yaml

# The types of a parameter, in the order of trying, and their names in an error message.
KINDS = {
    "bool": "true or false",
    "int": "a whole number of at least 0",
    "float": "a number",
    "list": "a list such as [1, 2]",
    "dict": "a mapping such as {name: value}",
    "plan": "a plan such as 1:avgpool:4, or none",  # "none" is a plan, not None
    "str": "text (papermill's -r gives text that looks like a number)",
}


def check_parameters() -> dict:
    """Check the notebook's parameters and convert them to their types.

    Call it below the parameters cell, as ``globals().update(check_parameters())``. It is needed
    because papermill only warns of a misspelt name, and passes all values but numbers as text, so
    that "false" would be true.

    A parameter's type is that of its default, or what a comment gives:
    ``plan = None  # type: str``, ``layers = []  # type: list[int]``,
    ``hours = 6.0  # type: float|None``. If the default is None or empty, "none" stands for it.

    Returns:
        The parameters' values by name.

    Raises:
        ConfigError: An unknown name, a value of another type, or the parameters cell has not
            run.
    """
    from IPython import get_ipython

    shell = get_ipython()
    names = shell.user_ns if shell is not None else {}
    return converted(names.get("In", []), names)


def converted(cells: Sequence[str], values: dict) -> dict:
    """Check and convert parameters, without a running notebook.

    Args:
        cells: Source text of the cells that have run. The parameters cell is the one with most
            assignments among those that assign literals only. A cell that papermill injected
            begins with "# Parameters".
        values: The variables.

    Returns:
        The parameters' values by name.

    Raises:
        ConfigError: As of ``check_parameters``.
    """
    injected = {name for cell in cells if _is_injected(cell) for name in _assigned(cell)}
    declared = max(
        (_declared(cell) for cell in cells if not _is_injected(cell)), key=len, default={}
    )
    if not declared:
        raise ConfigError(
            "the parameters cell has not run; run the notebook's cells in their order"
        )
    if unknown := sorted(injected - declared.keys()):
        raise ConfigError(
            f"unknown parameter {', '.join(map(repr, unknown))}; known: {', '.join(declared)}"
        )
    return {name: convert(name, values[name], *how) for name, how in declared.items()}


def convert(name: str, value, kinds: str, default=None):
    """Convert one value.

    Args:
        name: The parameter's name, for the error message.
        value: The value, as text or of its type.
        kinds: The types it may have, such as "int" or "list[int]|None".
        default: The parameter's default. If it is empty, "none" gives it.

    Returns:
        The value in the first type of KINDS that fits.

    Raises:
        ConfigError: No type fits.
    """
    wanted = kinds.split("|")
    nothing = (
        value is None
        or isinstance(value, str)
        and value.lower() in ("none", "null")
        and "plan" not in wanted
    )
    if nothing and ("None" in wanted or default in ("", [], {})):
        return None if "None" in wanted else default
    # In the order of KINDS, so that "3" of "int|str" is a number.
    for kind in sorted(
        set(wanted) - {"None"}, key=lambda kind: list(KINDS).index(kind.split("[")[0])
    ):
        try:
            return _read(value, *kind.removesuffix("]").split("["), alone=len(wanted) == 1)
        except ValueError:
            continue
    ways = [KINDS[kind.split("[")[0]] if kind != "None" else "none" for kind in wanted]
    if "[" in kinds:
        ways[0] += f", each {KINDS[kinds.split('[')[1].split(']')[0]]}"
    raise ConfigError(f"{name} must be {' or '.join(ways)}, not {value!r}")


def _read(value, kind: str, each: str | None = None, alone: bool = True):
    """``value`` as ``kind``, and elements of a list as ``each``; ValueError if it does not fit.

    ``alone``: no other type is possible, so that a single value stands for a list of one.
    """
    if kind in ("list", "dict"):
        if isinstance(value, str) and value.strip().startswith("[" if kind == "list" else "{"):
            value = parse_yaml(value, "text")
        if kind == "list" and alone and isinstance(value, str | int | float):
            value = [value]
        if type(value).__name__ == kind:
            return [_read(element, each) for element in value] if each else value
    elif kind == "bool" and str(value).lower() in ("true", "false"):
        return str(value).lower() == "true"
    elif kind in ("plan", "str") and isinstance(value, str):
        return expand(value)  # a path may begin with ~
    elif (
        kind in ("int", "float")
        and isinstance(value, str | int | float)
        and not isinstance(value, bool)
    ):
        number = float(value)
        if kind == "float" and math.isfinite(number):
            return number
        if kind == "int" and number.is_integer() and number >= 0:
            return int(number)
    raise ValueError


def _is_injected(cell: str) -> bool:
    return cell.lstrip().startswith("# Parameters")  # papermill begins its cell so


def _assigned(cell: str) -> dict[str, ast.expr]:
    """The assigned expressions of a cell by name; empty if the cell does anything else."""
    try:
        body = ast.parse(cell).body
    except SyntaxError:  # such as IPython's %magic
        return {}
    plain = all(
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) for node in body
    )
    return {node.targets[0].id: node.value for node in body} if plain else {}


def _declared(cell: str) -> dict[str, tuple[str, object]]:
    """Types and default by parameter, if ``cell`` assigns literals only; else empty."""
    found = {}
    for name, node in _assigned(cell).items():
        try:
            default = ast.literal_eval(node)
        except ValueError:
            return {}
        # The comment stands on the last line of the assignment.
        written = re.search(r"#\s*type:\s*(\S+)", cell.splitlines()[node.end_lineno - 1])
        kinds = written[1] if written else type(default).__name__
        # A list's elements have the type of the default's first one.
        if isinstance(default, list) and default and not written:
            kinds = f"list[{type(default[0]).__name__}]"
        found[name] = kinds + "|None" * (default is None), default
    return found
