"""What the notebooks share: checking the parameters that papermill injects."""

from __future__ import annotations

import ast

from llavolta.errors import UserError


class ParameterError(UserError, ValueError):
    """A notebook parameter that does not exist or cannot be used."""


def injected_names(cells: list[str]) -> set[str]:
    """The names assigned by the cells that papermill injected (their first line is ``# Parameters``)."""
    names: set[str] = set()
    for source in cells:
        if source.lstrip().startswith("# Parameters"):
            for node in ast.parse(source).body:
                targets = node.targets if isinstance(node, ast.Assign) else []
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def check_parameters(**declared) -> dict:
    """Return the notebook's parameters as a dict; raise ParameterError if papermill injected any other.

    Call it below the parameters cell with every parameter: ``check_parameters(stage=stage, plan=plan)``. papermill
    itself only warns of a misspelt name and runs with the default.
    """
    from IPython import get_ipython

    shell = get_ipython()
    cells = list(shell.user_ns.get("In", [])) if shell is not None else []
    unknown = sorted(injected_names(cells) - set(declared))
    if unknown:
        raise ParameterError(f"unknown parameter {', '.join(map(repr, unknown))}; known: {', '.join(declared)}")
    return declared
