"""Every notebook runs headless with small parameters, and stops with one clear line at a wrong one.

Their cells run in this process, as those of a kernel would: starting one costs more than most of them. One runs through
papermill, as users run it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import papermill
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from IPython.utils.capture import capture_output
from matplotlib_inline.backend_inline import configure_inline_support
from papermill.exceptions import PapermillExecutionError
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from processors_tiny import write
from tiny import write_results
from traitlets.config import Config

from llavolta.compression.compressors import COMPRESSORS
from llavolta.paths import TINY_LLAVA

pytestmark = pytest.mark.usefixtures("short_answers")

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


INLINE = "module://matplotlib_inline.backend_inline"  # what a kernel draws with


def run(name: str, **parameters) -> dict:
    """The notebook, its cells run to the end."""
    notebook, error = execute(name, parameters)
    if error is not None:
        raise error
    return notebook


def execute(name: str, parameters: dict) -> tuple[dict, Exception | None]:
    """The notebook with the outputs of its cells, up to the first error, and that error."""
    notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb")), parameters)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in cells:
        cell.outputs = []
    main, backend, path = sys.modules["__main__"], plt.get_backend(), [*sys.path]
    shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
    sys.path.insert(0, str(NOTEBOOKS))
    plt.switch_backend(INLINE)
    matplotlib.interactive(True)
    configure_inline_support(shell, INLINE)
    select_figure_formats(shell, {"png"})
    try:
        with contextlib.chdir(NOTEBOOKS):
            for cell in cells:
                with capture_output() as shown:
                    result = shell.run_cell(cell.source, store_history=True)
                given = [output.data for output in shown.outputs]
                if result.result is not None:
                    given.append(shell.display_formatter.format(result.result)[0])
                cell.outputs = [{"text": shown.stdout}, *({"data": data} for data in given)]
                if not result.success:
                    return notebook, result.error_in_exec or result.error_before_exec
    finally:
        plt.close("all")
        plt.switch_backend(backend)
        matplotlib.interactive(False)
        InteractiveShell.clear_instance()
        sys.modules["__main__"], sys.path[:] = main, path
        sys.modules.pop("my_compressor", None)  # what 02 registers
        COMPRESSORS.pop("unusual", None)
    return notebook, None


def run_by_papermill(name: str, folder: Path, **parameters) -> dict:
    """The same in a kernel of its own, as JSON."""
    target = folder / f"{name}.ipynb"
    papermill.execute_notebook(
        str(NOTEBOOKS / f"{name}.ipynb"), str(target), parameters, cwd=str(NOTEBOOKS), progress_bar=False
    )
    return json.loads(target.read_text())


def pictures(notebook: dict) -> int:
    return sum(
        "image/png" in output.get("data", {}) for cell in notebook["cells"] for output in cell.get("outputs", [])
    )


@pytest.fixture
def training(scenes, small_model, tmp_path) -> dict:
    """Parameters of 03_train_stage that run in seconds."""
    return dict(
        model=str(small_model),
        data=str(scenes / "train.json"),
        align_data=str(scenes / "align.json"),
        heldout=str(scenes / "heldout.json"),
        output=str(tmp_path / "run"),
        max_steps=3,
        align_steps=1,
        batch_size=4,
        questions=8,
        timing_rounds=1,
    )


def test_00_backbones_shows_the_shipped_parts(tmp_path):
    assert pictures(run("00_backbones", scenes=20)) == 2
    logs = json.loads((TINY_LLAVA / "backbones.json").read_text())
    for name, last in {"vision tower": 3999, "language model": 3499}.items():
        steps = pd.Series([row["step"] for row in logs[name]])
        assert steps.is_monotonic_increasing and steps.iloc[[0, -1]].tolist() == [0, last]  # one run, drawn as one line


@pytest.mark.slow
def test_00_backbones_trains_them_again(tmp_path):
    settings = dict(retrain=True, tower_steps=2, language_steps=2, output=str(tmp_path / "backbones"), scenes=3)
    run("00_backbones", **settings)
    held = {path.name for path in (tmp_path / "backbones").iterdir()}
    assert {"model.safetensors", "config.json", "backbones.json", "tokenizer.json"} <= held


@pytest.fixture
def study(scenes, small_model) -> dict:
    """Parameters of the notebooks that look at a model's own data."""
    return dict(model=str(small_model), questions=str(scenes / "heldout.json"), images=str(scenes))


def outputs(notebook: dict) -> str:
    """All that the notebook shows but its pictures."""
    shown = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    data = [output.get("data", {"text": output.get("text")}) for output in shown]
    return str([{kind: value for kind, value in one.items() if kind != "image/png"} for one in data])


def test_01_redundancy_shows_both_studies_and_keeps_its_results(study, tmp_path):
    """With what papermill's command line gives: text."""
    given = dict(layers="[0, 2]", strides="[1, 4, 72]", limit="6", bf16="false", pad_to_square="False")
    notebook = run("01_redundancy", **{**study, **given, "output": str(tmp_path / "sweep")})
    assert pictures(notebook) == 4
    assert "With 70% of the visual tokens pooled away" in outputs(notebook)
    assert "at layer 2: from" in outputs(notebook)
    assert "Published, LLaVA-1.5-7B on GQA: 70% pooled away, -3%" in outputs(notebook)
    files = list((tmp_path / "sweep").rglob("*.json"))
    assert {file.stem for file in files} == {"none", *(f"{k}-avgpool-{s}" for k in (0, 2) for s in (4, 72))}


@pytest.mark.slow
def test_01_redundancy_of_a_single_layer(study, tmp_path):
    settings = {**study, "layers": 2, "strides": [1, 4], "limit": 6, "output": str(tmp_path / "sweep")}
    written = None
    for _ in range(2):
        notebook = run("01_redundancy", **settings)
        assert pictures(notebook) == 4 and "at layer 2: from" in outputs(notebook)
        files = {file.stem: file.stat().st_mtime_ns for file in (tmp_path / "sweep").rglob("*.json")}
        assert files.keys() == {"none", "2-avgpool-4"} and written in (None, files)
        written = files


@pytest.mark.slow
def test_02_compressor_design_shows_every_compressor(study, tmp_path):
    notebook = run("02_compressor_design", strides=[1, 8], example=5, layer=1, **study)
    assert pictures(notebook) == 9
    assert all(name in outputs(notebook) for name in ("1:avgpool2d:2", "1:fastv:0.25", "class KeepUnusual"))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("01_redundancy", {"layer": 2}, "ConfigError: unknown parameter 'layer'; known: model, questions"),
        ("01_redundancy", {"layers": [7]}, "PlanError: plan '7:avgpool:1' names layer 7, but this model's 4 decoder"),
        ("01_redundancy", {"strides": []}, "ConfigError: a sweep needs at least one layer"),
        ("01_redundancy", {"strides": 8}, "ConfigError: strides must reach from 1 to at least 4"),
        ("01_redundancy", {"bf16": "no"}, "ConfigError: bf16 must be true or false, not 'no'"),
        ("01_redundancy", {"questions": "nowhere.json"}, "DataError: no data file nowhere.json"),
        ("01_redundancy", {"model": "./nowhere"}, "ConfigError: no model folder ./nowhere"),
        ("02_compressor_design", {"example": 999}, "ConfigError: heldout.json has questions 0..47, not 999"),
        ("02_compressor_design", {"layer": 4}, "PlanError: plan '4:avgpool:1' names layer 4"),
    ],
)
def test_the_studies_stop_with_one_clear_line(study, tmp_path, name, wrong, message):
    assert_one_clear_line(name, {**study, "limit": 4} if name[:2] == "01" else study, wrong, message)


def assert_one_clear_line(name: str, settings: dict, wrong: dict, message: str) -> None:
    _, error = execute(name, {**settings, **wrong})
    assert error is not None, f"{name} ran to its end"
    lines = error._render_traceback_()  # what a notebook shows of it
    assert len(lines) == 1 and lines[0].startswith(message), lines


@pytest.mark.slow
def test_the_line_that_a_kernel_sends_is_the_same(study, tmp_path):
    with pytest.raises(PapermillExecutionError) as error:
        run_by_papermill("01_redundancy", tmp_path, **{**study, "layer": 2})
    lines = [line for line in str(error.value).splitlines() if line.strip()]
    assert lines[-1].startswith("ConfigError: unknown parameter 'layer'")
    assert len(lines) == 3  # a rule, the cell, the message


def test_03_train_stage_trains_what_is_missing_and_then_only_what_is_new(training, tmp_path):
    first = outputs(run_by_papermill("03_train_stage", tmp_path, stage=2, **training))
    assert "stage 0, projector alignment: training" in first
    assert "stage 2 of 3, plan 2:avgpool:8: training (stages 1..1 are missing and come first)" in first
    summary = (tmp_path / "run" / "summary.txt").read_text()
    assert "held-out accuracy after stage 2 of `three-stage`" in summary and "less time" in summary
    second = run("03_train_stage", stage=3, **training)
    assert "stage 0" not in outputs(second)
    assert pictures(second) == 6
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 3


@pytest.mark.slow
def test_03_train_stage_alone_stage_0_and_a_plan_of_ones_own(training, tmp_path):
    run("03_train_stage", stage=0, **training)
    assert "after stage 0" in (tmp_path / "run" / "summary.txt").read_text()
    other = {**training, "output": str(tmp_path / "other")}
    notebook = run("03_train_stage", stage=1, plan="0:avgpool:4", scheme="heavy", **other)
    assert "0:avgpool:4" in outputs(notebook)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next", "smolvlm"])
def test_03_train_stage_takes_other_families(training, mixed, tmp_path, family):
    """Trained and asked on pictures of several shapes."""
    model = str(write(family, tmp_path / "model"))
    notebook = run("03_train_stage", **{**training, "model": model, "heldout": str(mixed), "stage": 2})
    assert pictures(notebook) >= 4
    assert "held-out accuracy after stage 2 of `three-stage`" in (tmp_path / "run" / "summary.txt").read_text()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stgae": 2}, "ConfigError: unknown parameter 'stgae'; known: stage, preset"),
        ({"stage": 7}, "ConfigError: stage must be 0 (projector alignment) .. 3 for this scheme, not 7"),
        ({"scheme": "tree-stage"}, "ConfigError: unknown scheme 'tree-stage'; choose from single-stage"),
        ({"plan": "4:avgpool:8"}, "PlanError: plan '4:avgpool:8' names layer 4, but this model's 4 decoder layers"),
        ({"plan": "1:avgpool:-3"}, "PlanError: plan '1:avgpool:-3': avgpool: stride must be a whole number"),
        ({"num_processes": 0}, "ConfigError: num_processes must be"),
        ({"deepspeed": "zero9"}, "ConfigError: deepspeed must be zero2, zero3, zero3-offload or a JSON file, not"),
    ],
)
def test_03_train_stage_stops_with_one_clear_line(training, tmp_path, wrong, message):
    assert_one_clear_line("03_train_stage", training, wrong, message)


@pytest.fixture
def comparison(scenes, small_model, tmp_path) -> dict:
    """Parameters of 04_compare_schemes that run in seconds."""
    data = dict(data=str(scenes / "train.json"), align_data=str(scenes / "align.json"))
    options = dict(model=str(small_model), max_steps=6, align_steps=2, batch_size=8, log_steps=1, **data)
    chosen = dict(schemes=["heavy", "three-stage-reversed"], own={"mine": ["1:avgpool:4", "none"]}, options=options)
    sizes = dict(heldout=str(scenes / "heldout.json"), questions=16, timing_rounds=1, workers=1)
    return dict(**chosen, **sizes, output=str(tmp_path / "compare"), record=str(tmp_path / "record"))


@pytest.mark.slow
def test_04_compare_schemes_goes_on_where_it_stopped(comparison, tmp_path):
    first = run("04_compare_schemes", **comparison)
    assert pictures(first) == 4 and "`heavy` (1 seed): " in outputs(first)
    finished = "0/*/model.safetensors"
    models = {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "compare").glob(finished)}
    assert models.keys() == {"align", "single-stage", "heavy", "three-stage-reversed", "mine"}
    second = run("04_compare_schemes", seeds=2, **{**comparison, "workers": 2})
    assert "`heavy` (2 seeds): " in outputs(second)
    assert models == {path.parent.name: path.stat().st_mtime_ns for path in (tmp_path / "compare").glob(finished)}
    runs = pd.read_csv(tmp_path / "record" / "compare-runs.csv")
    assert set(runs.scheme) == models.keys() - {"align"} and set(runs.seed) == {0, 1}


def test_04_compare_schemes_of_one_seed_has_intervals_over_questions(comparison, tmp_path):
    short = {**comparison["options"], "max_steps": 3, "align_steps": 0, "batch_size": 4}
    changes = dict(options=short, schemes=["heavy"], own={}, questions=8)
    notebook = run("04_compare_schemes", **{**comparison, **changes})
    assert pictures(notebook) == 4 and "`heavy` (1 seed): " in outputs(notebook)
    right = pd.read_csv(tmp_path / "record" / "compare-correct.csv")
    runs = pd.read_csv(tmp_path / "record" / "compare-runs.csv").query("type == 'overall'").set_index("scheme").accuracy
    assert right[runs.index].mean().tolist() == pytest.approx(runs.tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": 2}, "ConfigError: unknown parameter 'seed'; known: seeds, schemes, controls"),
        ({"seeds": 0}, "ConfigError: seeds must be a whole number of at least 1"),
        ({"schemes": ["heaviest"]}, "ConfigError: unknown scheme 'heaviest'; choose from single-stage"),
        ({"own": {"heavy": ["none"]}}, "ConfigError: a scheme of your own cannot be called 'heavy'"),
        ({"options": {"learningrate": 1}}, "ConfigError: unknown parameter 'learningrate'"),
        ({"workers": 0}, "ConfigError: workers must be a whole number of at least 1"),
    ],
)
def test_04_compare_schemes_stops_with_one_clear_line(comparison, tmp_path, wrong, message):
    assert_one_clear_line("04_compare_schemes", comparison, wrong, message)


def test_07_cost_planner():
    notebook = run("07_cost_planner", timing_rounds=0, own={"mine": ["1:avgpool:4", "none"]}, price=1.5)
    assert pictures(notebook) == 3 and "`mine`" in outputs(notebook)


@pytest.mark.slow
def test_07_cost_planner_measures_a_model():
    measured = run("07_cost_planner", model="embedded", measured={"none": 0.02}, timing_rounds=1)
    assert pictures(measured) == 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"gpu": "A1000"}, "ConfigError: unknown GPU 'A1000'; known: A100-80GB"),
        ({"model": "./nowhere"}, "ConfigError: no model folder ./nowhere"),
        ({"schemes": ["heaviest"]}, "ConfigError: unknown scheme 'heaviest'"),
        ({"budget_hours": 0.01}, "ConfigError: no scheme takes at most 0.01 hours"),
        ({"budget": 1}, "ConfigError: unknown parameter 'budget'"),
    ],
)
def test_07_cost_planner_stops_with_one_clear_line(tmp_path, wrong, message):
    assert_one_clear_line("07_cost_planner", {"timing_rounds": 0}, wrong, message)


def test_05_compare_compressors_without_training(study, tmp_path):
    settings = dict(**study, methods=["downsampling", "PruMerge+"], limit=4, budgets=[0.5], talks=2, timing_rounds=1)
    notebook = run("05_compare_compressors", **settings, train_steps=0, record=str(tmp_path))
    assert "Without compression:" in outputs(notebook)
    assert {"downsampling", "PruMerge+"} <= set(pd.read_csv(tmp_path / "training-free.csv").method)


@pytest.mark.slow
def test_05_compare_compressors(study, scenes, tmp_path):
    data = dict(data=str(scenes / "train.json"), align_data=str(scenes / "align.json"))
    options = dict(model=study["model"], align_steps=2, batch_size=8, **data)
    settings = dict(**study, limit=8, budgets=[0.25, 0.5], timing_rounds=1, train_steps=3, options=options, workers=1)
    folders = dict(output=str(tmp_path / "runs"), record=str(tmp_path))
    notebook = run("05_compare_compressors", **settings, **folders)
    assert pictures(notebook) == 3 and "Without compression:" in outputs(notebook)
    trained = pd.read_csv(tmp_path / "trained.csv", index_col="scheme")
    assert {"single-stage", "three-stage", "PruMerge (adaptive)", "PruMerge+", "STF", "MBTF + STF", "DualSpeed"} <= set(
        trained.index
    )
    assert trained.tokens[["single-stage", "STF", "PruMerge+", "random drop"]].tolist() == [1, 0.25, 0.25, 0.25]
    free = pd.read_csv(tmp_path / "training-free.csv")
    assert set(free.budget) == {0.25, 0.5} and "PyramidDrop" in set(free[free.budget == 0.5].method)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": ["lottery"]}, "ConfigError: unknown method 'lottery'; choose from random drop"),
        ({"budgets": [1.5]}, "ConfigError: a budget is a share of the tokens"),
        ({"budget": 1}, "ConfigError: unknown parameter 'budget'"),
    ],
)
def test_05_compare_compressors_stops_with_one_clear_line(study, tmp_path, wrong, message):
    settings = {**study, "limit": 4, "train_steps": 0}
    assert_one_clear_line("05_compare_compressors", settings, wrong, message)


@pytest.fixture
def video(clip_data, video_model, tmp_path) -> dict:
    """Parameters of 06_video that run in seconds."""
    data = dict(data=str(clip_data / "train.json"), align_data=str(clip_data / "align.json"))
    options = dict(model=str(video_model), max_steps=3, align_steps=2, batch_size=4, log_steps=1, **data)
    sizes = dict(heldout=str(clip_data / "heldout.json"), questions=10, timing_rounds=1, workers=1)
    return dict(options=options, output=str(tmp_path / "video"), record=str(tmp_path), **sizes)


@pytest.mark.slow
def test_06_video(video, tmp_path):
    notebook = run("06_video", **video)
    assert pictures(notebook) == 7
    assert "points above the best constant" in outputs(notebook) and "`three-stage` (1 seed): " in outputs(notebook)
    assert set(pd.read_csv(tmp_path / "video-costs.csv").scheme) == {"single-stage", "three-stage"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schemes": ["tree-stage"]}, "ConfigError: unknown scheme 'tree-stage'"),
        ({"question": 3}, "ConfigError: unknown parameter 'question'"),
        ({"heldout": "no.json"}, "DataError: no data file no.json"),
    ],
)
def test_06_video_stops_with_one_clear_line(video, tmp_path, wrong, message):
    assert_one_clear_line("06_video", video, wrong, message)


def test_08_benchmarks_marks_what_was_not_run(tmp_path):
    empty = run("08_benchmarks", results=str(tmp_path / "none"))
    assert "Nothing was run yet" in outputs(empty) and pictures(empty) == 1
    write_results(tmp_path / "eval" / "a", "some/model", "none", {"gqa": {"exact_match": 0.625}})
    full = run("08_benchmarks", results=str(tmp_path / "eval"), record=str(tmp_path / "table.csv"))
    assert "62.5" in outputs(full) and "not run" in outputs(full) and pictures(full) == 1
    assert pd.read_csv(tmp_path / "table.csv").GQA.tolist() == [62.5]
    assert_one_clear_line(
        "08_benchmarks", {}, {"columns": ["TriviaQA"]}, "ConfigError: unknown column TriviaQA; choose"
    )
