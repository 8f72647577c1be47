"""What the repository says of itself is true: pins, paths, weights, notebooks."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINES = (ROOT / "constraints.txt").read_text().splitlines()
PINS = dict(line.split("==") for line in LINES if line and not line.startswith("#"))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_environment_yml_pins_what_constraints_pin():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(part["pip"] for part in environment["dependencies"] if isinstance(part, dict))
    pins = dict(line.split("==") for line in pip if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    assert {_plain(name) for name in pins} == {_plain(re.match(r"[\w.-]+", line)[0]) for line in wanted}
    constraints = {_plain(name): version for name, version in PINS.items()}
    assert {name: constraints[_plain(name)] for name in pins} == pins
    assert constraints["torch"] == "2.13.0"


def test_shipped_data_are_small_and_never_pickled():
    most = {"tiny-llava": 8e6, "nano-tuned": 12e6, "pictures": 6e6}
    folders = {path.name: path for path in (ROOT / "data").iterdir() if path.is_dir()}
    assert most.keys() <= folders.keys() <= most.keys() | {"cache", "runs", "screenshots"}
    for name, bytes in most.items():
        files = [path for path in folders[name].rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) <= bytes, name
        assert name == "pictures" or any(path.suffix == ".safetensors" for path in files)
        assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".npy")]


def test_paths_and_targets_in_the_readme_exist():
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(((?!http|#)[^)]+)\)", readme):
        assert (ROOT / target.split("#")[0]).exists(), target
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make (\w+)", readme)) <= targets
    tree = re.search(r"```text\n(.*?)```", readme, re.S)[1]
    for line in tree.splitlines():
        path = line.split()[0] if line.split() else ""
        assert not path or (ROOT / path).exists(), path


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_committed_notebooks_are_whole(file):
    notebook = json.loads(file.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    tags = [tag for cell in code for tag in cell["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1
    assert "injected-parameters" not in tags, "a user's run would begin with the committed run's parameters"
    assert file.stat().st_size <= 1_500_000
    pictures = 0
    for cell in code:
        source = "".join(cell["source"])
        assert not re.search(r"^(def|class) ", source, re.M), "a function is defined in a notebook"
        outputs = json.dumps(cell["outputs"])
        assert not any(output["output_type"] == "error" for output in cell["outputs"])
        assert not re.search(r"(/home/|/root/|/work/|/tmp/|/Users/)", outputs), "an absolute path"
        if re.search(r"\b(plots|token_maps)\.", source) and "import" not in source:
            assert "image/png" in outputs, f"an empty plot cell: {source[:60]}"
            pictures += outputs.count('"image/png"')
    assert pictures
