"""The package as a wheel installs it: without the checkout around it, from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # builds a wheel, and trains with it
ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys
from pathlib import Path

import llavolta
from llavolta import paths
from llavolta.train import config, run, trainer
from llavolta.cost import planner
from llavolta.harness import table, video

assert Path(llavolta.__file__).is_relative_to(sys.argv[1]), llavolta.__file__
assert paths.ROOT is None and paths.DATA == Path("written").resolve()
assert len(config.PRESETS) >= 6 and len(config.ENGINES) >= 4 and list(video.TEMPLATES.glob("*.yaml"))
assert planner.published_hours()
settings = dict(scenes=64, align_steps=1, max_steps=3, batch_size=4, log_steps=1)
folder = run.train(config.TrainConfig(output="run", **settings), progress=False)
assert len(trainer.read_metrics(folder / "metrics.jsonl")) == 3
assert sorted(path.name for path in Path().iterdir()) == ["run", "written"]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the package as pip would install it."""
    folder = tmp_path_factory.mktemp("wheel")
    away = shutil.ignore_patterns(".*", "cache", "runs", "build", "*.egg-info", "__pycache__", "notebooks", "tests")
    shutil.copytree(ROOT, folder / "source", ignore=away)  # building leaves files behind
    source = str(folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*build, "--wheel-dir", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("llavolta-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_it_trains_away_from_the_checkout(site, tmp_path):
    given = {"PYTHONPATH": str(site), "LLAVOLTA_DATA": str(tmp_path / "written"), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-P", "-c", PROGRAM, str(site)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({}, ".cache/llavolta"),
        ({"XDG_CACHE_HOME": "/else"}, "/else/llavolta"),
        ({"LLAVOLTA_DATA": "~/mine"}, "mine"),
    ],
)
def test_without_a_folder_given_it_writes_to_the_users_cache(site, tmp_path, given, where):
    environment = {name: value for name, value in os.environ.items() if name not in ("LLAVOLTA_DATA", "XDG_CACHE_HOME")}
    environment |= {"PYTHONPATH": str(site), "HOME": str(tmp_path)} | given
    command = [sys.executable, "-P", "-c", "from llavolta.paths import DATA; print(DATA)"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / where), done.stderr
    assert not list(tmp_path.iterdir())
