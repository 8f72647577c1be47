"""Every parameter of every notebook as ``papermill -p`` and the shell give it, without running a notebook."""

import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llavolta.notebook import ParameterError

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("0*.ipynb"))


def cells_of(notebook: Path) -> tuple[str, str]:
    """The parameters cell, and the call of check_parameters alone."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    declared = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
    source = next("".join(cell["source"]) for cell in cells if "check_parameters(" in "".join(cell["source"]))
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return declared, next(ast.unparse(call) for call in calls if ast.unparse(call.func) == "check_parameters")


def inject(notebook: Path, monkeypatch, **injected) -> dict:
    """What the notebook's variables hold behind check_parameters; the returned dict has to agree."""
    declared, call = cells_of(notebook)
    cells = ["", declared, "# Parameters\n" + "".join(f"{name} = {value!r}\n" for name, value in injected.items())]
    space: dict = {}
    exec("from llavolta.notebook import check_parameters", space)
    for cell in cells:
        exec(cell, space)
    space["In"] = cells
    monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(user_ns=space))
    returned = eval(call, space)
    assert returned == {name: space[name] for name in returned}
    return returned


def defaults(notebook: Path) -> dict:
    space: dict = {}
    exec(cells_of(notebook)[0], {}, space)
    return space


PARAMETERS = [(notebook, name) for notebook in NOTEBOOKS for name in defaults(notebook)]
EVERY = pytest.mark.parametrize("notebook, name", PARAMETERS, ids=[f"{file.stem}-{name}" for file, name in PARAMETERS])


@EVERY
def test_every_parameter_given_as_text_is_of_its_default_s_type(notebook, name, monkeypatch):
    default = defaults(notebook)[name]
    values = {
        bool: {"false": False, "true": True, "False": False, "no": False, 1: True},
        int: {"2": 2, 3: 3, 4.0: 4},
        float: {"0.5": 0.5, 1: 1.0},
        str: {"some/file": "some/file", 2026: "2026"},
        dict: {'{"lora_rank": 8}': {"lora_rank": 8}, "{'bf16': True}": {"bf16": True}, '{"a": null}': {"a": None}},
        type(None): {"some": "some", 8: 8, '["a"]': ["a"]},
    }.get(type(default))
    if values is None:
        item = default[0] if default else 2
        values = {json.dumps([item, item]): [item, item], str([item]): [item], str(item): [item], item: [item]}
    if not default and not isinstance(default, (bool, int, float)) and name != "plan":
        values |= {"none": default, "None": default, None: default}
    for given, wanted in values.items():
        found = inject(notebook, monkeypatch, **{name: given})[name]
        assert found == wanted and type(found) is type(wanted), given
    unchanged = inject(notebook, monkeypatch, **{name: default})[name]
    assert unchanged == default and type(unchanged) is type(default)


@EVERY
def test_every_parameter_of_another_type_is_refused_in_one_line(notebook, name, monkeypatch):
    default = defaults(notebook)[name]
    if default is None:
        wrong = ["[1, 2", "{a"]
    elif isinstance(default, (list, str)):
        wrong = [{"a": 1}, "[1, 2"] + [None] * bool(default)
    else:
        wrong = {bool: ["maybe", 2, None], int: ["two", 1.5, True, "[1]"], float: ["much", True], dict: ["a", 8, [1]]}
        wrong = wrong[type(default)]
    for given in wrong:
        with pytest.raises(ParameterError, match=rf"^parameter {name} = [^\n]+$"):
            inject(notebook, monkeypatch, **{name: given})


def test_what_a_parameter_takes_beside_its_default_s_type(monkeypatch):
    by_name = {notebook.stem: notebook for notebook in NOTEBOOKS}
    for file, name, given, wanted in (
        ("03_train_stage", "plan", "none", "none"),  # the plan that compresses nothing
        ("04_compare_schemes", "seeds", '{"three-stage": 5}', {"three-stage": 5}),
        ("06_video", "seeds", {"three-stage": 5}, {"three-stage": 5}),
        ("02_compressor_design", "layer", "vision", "vision"),
        ("07_cost_planner", "budget_hours", "none", None),
        ("07_cost_planner", "budget_hours", None, None),
        ("01_redundancy", "layers", "[0, 2]", [0, 2]),
        ("08_benchmarks", "columns", "GQA", ["GQA"]),
    ):
        assert inject(by_name[file], monkeypatch, **{name: given})[name] == wanted
