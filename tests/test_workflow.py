"""What continuous integration and the commit hooks call is there, and names the versions that pyproject.toml allows."""

from __future__ import annotations

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def commands(job: str) -> str:
    return "\n".join(step.get("run", "") for step in WORKFLOW["jobs"][job]["steps"])


def test_its_commands_are_targets_of_make():
    for text in (*map(commands, WORKFLOW["jobs"]), (ROOT / ".ci" / "run").read_text()):
        called = set(re.findall(r"^\s*(?:- run: )?make ([\w-]+)", text, re.M))
        assert called and called <= TARGETS, called - TARGETS
    assert "make test\n" in commands("test") + "\n" and "make test-all" in commands("all")
    assert WORKFLOW[True]["schedule"]  # YAML reads "on" as true
    assert {"test", "test-rest", "test-all", "mutants", "lint"} <= TARGETS


def test_it_runs_on_the_lowest_and_the_newest_versions():
    matrix = WORKFLOW["jobs"]["test"]["strategy"]["matrix"]
    assert PROJECT["requires-python"] == f">={matrix['python'][0]}" and matrix["python"] == ["3.11", "3.13"]
    wanted = next(one for one in map(Requirement, PROJECT["dependencies"]) if one.name == "transformers")
    lowest = next(part.version for part in wanted.specifier if part.operator == ">=")
    highest = next(part.version for part in wanted.specifier if part.operator == "<")
    assert [part.split(".0")[0] for part in matrix["transformers"]] == [f"=={lowest}", f"<{highest}"]


def test_hooks_call_tools_that_the_test_extra_installs():
    hooks = [
        hook
        for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
        for hook in repo["hooks"]
    ]
    assert [hook["id"] for hook in hooks][:3] == ["ruff", "ruff-format", "codespell"]
    modules = [re.search(r"-m (\w+)", hook.get("entry", "")) for hook in hooks]
    assert all(find_spec(module[1]) for module in modules if module)
    extra = {Requirement(line).name for line in PROJECT["optional-dependencies"]["test"]}
    assert {"ruff", "codespell", "basedpyright"} <= extra


def test_the_changelog_has_the_version_that_comes_and_the_one_that_is():
    versions = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert PROJECT["version"] in versions and versions == sorted(versions, reverse=True)
