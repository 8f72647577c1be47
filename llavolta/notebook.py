"""What the notebooks share: checking and converting the parameters that papermill injects."""

from __future__ import annotations

import ast
import json
import os

from llavolta.errors import UserError


class ParameterError(UserError, ValueError):
    """A notebook parameter that does not exist or cannot be used."""


# What a parameter takes as it is, beside values of its default's type.
ALSO = {"seeds": dict, "layer": str, "budget_hours": type(None)}
SWITCHES = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
NOTHING = ("none", "null", "")


def _assigned(cells: list[str]) -> dict[str, ast.expr]:
    """Name -> expression of the first plain assignment to it in ``cells``."""
    found: dict[str, ast.expr] = {}
    for source in cells:
        try:
            body = ast.parse(source).body
        except SyntaxError:  # the history keeps cells that failed, too
            continue
        for node in body:
            for target in node.targets if isinstance(node, ast.Assign) else []:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, node.value)
    return found


def convert(name: str, value, default):
    """``value`` in the type of ``default``: what ``papermill -p`` gives as text is read, or refused (ParameterError).

    Switches take true and false; lists and dicts JSON or Python, and a list also its only element; parameters that are
    empty by default take "none" for that, but ``plan``, where it is the plan that compresses nothing.
    """
    also = ALSO.get(name, ())
    if isinstance(value, also) and (value is None or isinstance(value, dict) or value == "vision"):
        return value
    text = value.strip() if isinstance(value, str) else None
    empty = value is None or (text is not None and text.lower() in NOTHING)
    if empty and also is type(None):
        return None
    if empty and name != "plan" and not default and not isinstance(default, (bool, int, float)):
        return default
    if text is not None and text[:1] in ("[", "{"):
        value = _literal(name, text)
        if isinstance(value, also):
            return value
    if default is None or (isinstance(default, str) and isinstance(value, (str, os.PathLike))):
        return value
    if isinstance(default, list):
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        if default:
            return [convert(name, item, default[0]) for item in items]
        if not any(item is None or isinstance(item, (bool, dict)) for item in items):
            return [int(item) if isinstance(item, str) and item.isdecimal() else item for item in items]
    elif isinstance(default, dict):
        if isinstance(value, dict):
            return value
    elif isinstance(default, bool):
        if str(value).strip().lower() in SWITCHES:
            return SWITCHES[str(value).strip().lower()]
    elif isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            if isinstance(default, str):
                return str(value)
            number = float(value)
            if isinstance(default, float):
                return number
            if number.is_integer():
                return int(number)
        except (ValueError, OverflowError):
            pass
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(type(default))
    kind = kind or ('a list such as "[2, 4]"' if isinstance(default, list) else """a dict such as '{"name": 8}'""")
    raise ParameterError(f"parameter {name} = {value!r} is not {kind}; its default is {default!r}")


def _literal(name: str, text: str):
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            pass
    raise ParameterError(f"""parameter {name} = {text!r} is neither JSON nor Python; quote its words: '["a", "b"]'""")


def check_parameters(**declared) -> dict:
    """Return the notebook's parameters as a dict; raise ParameterError if papermill injected any other.

    Call it below the parameters cell with every parameter: ``check_parameters(stage=stage, plan=plan)``. papermill
    itself only warns of a misspelt name and runs with the default, and gives "false" and "[2, 4]" as text: injected
    values are converted by the type of their default (see ``convert``), here and in the notebook's own variables.
    """
    from IPython import get_ipython

    shell = get_ipython()
    cells = list(shell.user_ns.get("In", [])) if shell is not None else []
    injected = _assigned([source for source in cells if source.lstrip().startswith("# Parameters")])
    defaults = _assigned([source for source in cells if not source.lstrip().startswith("# Parameters")])
    if unknown := sorted(injected.keys() - declared.keys()):
        raise ParameterError(f"unknown parameter {', '.join(map(repr, unknown))}; known: {', '.join(declared)}")
    converted = {
        name: convert(name, declared[name], ast.literal_eval(defaults[name])) for name in injected if name in defaults
    }
    if converted:
        shell.user_ns.update(converted)
    return declared | converted
