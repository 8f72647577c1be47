"""Every parameter of every notebook: documented, converted from what papermill's command line gives, or refused."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from papermill.cli import _resolve_type
from papermill.translators import PythonTranslator

from llavolta.errors import ConfigError
from llavolta.show.notebook import convert, converted

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def parameters_cell(file: Path) -> str:
    cells = json.loads(file.read_text())["cells"]
    return next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))


def injected(cell: str, given: dict) -> dict:
    """The notebook's parameters after papermill has put the values ``given`` behind its parameters ``cell``."""
    names: dict = {}
    exec(cell, names)
    more = PythonTranslator.codify(given) if given else ""
    exec(more, names)
    return converted(["", cell, more], names)


CELLS = {file.stem: parameters_cell(file) for file in NOTEBOOKS}


@pytest.mark.parametrize("notebook", CELLS)
def test_defaults_stay_what_they_are_and_each_says_what_it_is_for(notebook):
    cell = CELLS[notebook]
    names: dict = {}
    exec(cell, names)
    assert json.dumps(injected(cell, {})) == json.dumps({n: v for n, v in names.items() if n != "__builtins__"})
    for node in ast.parse(cell).body:
        around = [cell.splitlines()[number] for number in (node.lineno - 2, node.end_lineno - 1)]
        assert any("# " in line for line in around), f"{node.targets[0].id} is not explained"
        unknown = isinstance(node.value, ast.Constant) and node.value.value is None
        assert not unknown or re.search(r"  # type: \S", around[1]), f"{node.targets[0].id} has no type"


# By type: what papermill's -p makes of an argument, and the value that it must become; None where it must be refused.
REFUSED = object()
GIVEN = {
    "bool": {"false": False, "False": False, "true": True, "2": REFUSED, "no": REFUSED, "[true]": REFUSED},
    "int": {"2": 2, "3.0": 3, "two": REFUSED, "2.5": REFUSED, "-1": REFUSED, "True": REFUSED, "[2, 4]": REFUSED},
    "float": {"2": 2.0, "1e-3": 0.001, "inf": REFUSED, "much": REFUSED, "true": REFUSED, "{a: 1}": REFUSED},
    "int|float": {"2": 2, "2.5": 2.5, "many": REFUSED},
    "int|dict": {"2": 2, "{heavy: 3}": {"heavy": 3}, '{"heavy": 3}': {"heavy": 3}, "few": REFUSED, "[2]": REFUSED},
    "int|str": {"2": 2, "vision": "vision", "2.5": REFUSED, "True": REFUSED},
    "plan": {"none": "none", "1:avgpool:4": "1:avgpool:4", "2": REFUSED},
    "str": {"text": "text", "2": REFUSED, "True": REFUSED},
    "str|list": {
        "heavy": "heavy",
        "[none]": ["none"],
        '["1:avgpool:4"]': ["1:avgpool:4"],
        "2": REFUSED,
        "True": REFUSED,
    },
    "dict": {"{}": {}, '{"a": 2}': {"a": 2}, "{a: {b: none}}": {"a": {"b": "none"}}, "2": REFUSED, "{a": REFUSED},
    "list[int]": {"2": [2], "[2, 4]": [2, 4], "[2.0]": [2], "[a]": REFUSED, "a": REFUSED, "{a: 2}": REFUSED},
    "list[float]": {"0.5": [0.5], "[1, 0.5]": [1.0, 0.5], "[half]": REFUSED, "True": REFUSED},
    "list[str]": {"heavy": ["heavy"], "[heavy, light]": ["heavy", "light"], "2": REFUSED, "[2]": REFUSED},
}


@pytest.mark.parametrize("notebook", CELLS)
def test_every_parameter_is_converted_or_refused(notebook):
    for name, default in injected(CELLS[notebook], {}).items():
        is_converted_or_refused(CELLS[notebook], name, default)


def is_converted_or_refused(cell: str, name: str, default: object) -> None:
    kind = type(default).__name__ if default is not None else ""
    if written := re.search(rf"(?m)^{name} = .*?# type: (\S+)", cell):
        kind = written[1].removesuffix("|None")
    elif kind == "list":
        kind = f"list[{type(default[0]).__name__}]"
    for text, wanted in GIVEN[kind].items():
        given = {name: _resolve_type(text)}  # as papermill -p injects it
        if wanted is REFUSED:
            with pytest.raises(ConfigError, match=f"^{name} must be .*, not ") as error:
                injected(cell, given)
            assert "\n" not in str(error.value)
        else:
            value = injected(cell, given)[name]
            assert value == wanted and type(value) is type(wanted), (name, text)
    for nothing in (None, "none", "null") if kind != "plan" else (None,):
        if default in (None, "", [], {}) or name == "budget_hours":
            wanted = None if name == "budget_hours" else default
            assert injected(cell, {name: nothing})[name] == wanted
        elif nothing is None or kind not in ("str", "int|str", "list[str]"):
            with pytest.raises(ConfigError, match=f"^{name} must be"):
                injected(cell, {name: nothing})


def test_a_misspelt_name_and_a_cell_that_has_not_run_are_one_line():
    cell = "stage = 2  # which\nplan = None  # type: str"
    with pytest.raises(ConfigError, match="unknown parameter 'stgae'; known: stage, plan"):
        converted([cell, "# Parameters\nstgae = float('inf')\n"], {"stage": 2, "plan": None})
    with pytest.raises(ConfigError, match="the parameters cell has not run"):
        converted(["", "import pandas", "%matplotlib inline"], {})
    live = ["x = 1", cell, "import pandas", "stage = 3  # edited and run again\nplan = None  # type: str"]
    assert converted(live, {"stage": 3, "plan": "none", "x": 1}) == {"stage": 3, "plan": None}
    with pytest.raises(ConfigError, match="true or false"):
        convert("bf16", "yes", "bool")


def test_a_text_that_is_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert convert("output", "~/runs/x", "str|None", None) == "/home/me/runs/x"
    assert convert("model", "a/b~c", "str") == "a/b~c"
