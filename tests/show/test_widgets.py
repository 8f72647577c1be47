"""The explorers without a browser: every control leads to what the package function says, errors to one line."""

from __future__ import annotations

import io
from datetime import datetime

import pytest
from PIL import Image

from llavolta.compression.compressors import COMPRESSORS
from llavolta.cost.flops import cost_model
from llavolta.cost.planner import Speed, scheme_table
from llavolta.cost.references import reference_config
from llavolta.data import LlavaData
from llavolta.show import token_maps, widgets
from llavolta.studies import inspect
from llavolta.train.models import load_model
from llavolta.train.schemes import Scheme

pytestmark = pytest.mark.usefixtures("short_answers")


@pytest.fixture(scope="module")
def loaded(scenes, small_model):
    return *load_model(str(small_model)), LlavaData(scenes / "heldout.json")


@pytest.fixture
def explorer(loaded):
    return widgets.redundancy_explorer(*loaded, layer=1, stride=8)


def shown(explorer, images: list) -> inspect.View:
    """What the explorer must show for its plan and question, asked of the package."""
    view = inspect.view(explorer.model, explorer.processor, explorer.question.value, images, explorer.plan)
    assert explorer.image.value == widgets.png(explorer.draw(images[0], view))
    assert f"compression ratio: {view.ratio:.3f}" in explorer.message.value
    assert f"training FLOPs: {view.flops:.1%}" in explorer.message.value
    return view


def test_sliders_and_choosers(loaded, explorer):
    data = loaded[2]
    assert explorer.plan == "1:avgpool:stride=8" and shown(explorer, data[0].images).tokens[-1] == 18
    explorer.layer.value = 3
    explorer.options["stride"].value = 144
    assert explorer.view.plan == "3:avgpool:144" and shown(explorer, data[0].images).tokens[-1] == 1
    explorer.entry.value = 5
    assert explorer.question.value == next(q for q in data.questions() if q["index"] == 5)["question"]
    shown(explorer, data[5].images)
    explorer.question.value = "Is there a 3?"  # one's own
    shown(explorer, data[5].images)


# One of each place and kind of option; the others are slow.
FEW = {"avgpool", "cls", "fastv", "prumerge+", "restore"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FEW else pytest.mark.slow) for name in sorted(COMPRESSORS)]
)
def test_every_compressor_of_the_registry_has_its_controls(loaded, name):
    explorer = widgets.design_explorer(*loaded, layer=2)
    explorer.compressor.value = name
    place = "vision" if "tower" in COMPRESSORS[name].needs else 2  # the only place where these can stand
    assert explorer.view.plan.startswith(f"{place}:{name}") and explorer.draw is token_maps.picture_with_layers
    shown(explorer, loaded[2][0].images)


def test_options_in_words_and_a_number_of_tokens_that_depends_on_the_picture(loaded):
    explorer = widgets.design_explorer(*loaded, layer="vision", compressor="prumerge+")
    left = len(set(explorer.view.grid().ravel()))
    assert explorer.view.tokens == [left] * 4 and f"{144 / left:.3f}" in explorer.message.value
    explorer.options["keep"].value = "0.25"
    explorer.options["weights"].value = "normalised"
    assert explorer.view.plan == "vision:prumerge+:0.25:normalised:contiguous:32" and explorer.view.tokens == [36] * 4
    explorer.options["keep"].value = "most"
    assert "keep must be" in explorer.message.value and explorer.view is None


def test_a_plan_that_cannot_be_is_one_line(explorer):
    explorer.layer.value = 0
    explorer.compressor.value = "fastv"
    assert "PlanError" in explorer.message.value and "from layer 1" in explorer.message.value
    assert explorer.view is None and bytes(explorer.image.value) == b""
    explorer.layer.value = 1
    assert explorer.view.plan == "1:fastv:0.5" and explorer.image.value


def test_pictures_of_ones_own(explorer, loaded, tmp_path):
    picture = Image.new("RGB", (60, 40), (20, 90, 160))
    picture.save(tmp_path / "mine.png")
    explorer.path.value = str(tmp_path / "mine.png")
    shown(explorer, [picture])
    assert "right:" not in explorer.message.value
    before = explorer.image.value
    explorer.path.value = str(tmp_path / "none.png")
    assert "no image &#x27;none.png&#x27;" in explorer.message.value and explorer.image.value == before
    out = io.BytesIO()
    Image.new("RGB", (30, 30), (200, 0, 0)).save(out, format="png")

    def upload(content: bytes) -> None:
        file = dict(
            name="x.png", type="image/png", size=len(content), last_modified=datetime.now(), content=memoryview(content)
        )
        explorer.upload.value = (file,)

    upload(out.getvalue())
    shown(explorer, [Image.new("RGB", (30, 30), (200, 0, 0))])
    upload(b"no picture")
    assert "the upload is no picture" in explorer.message.value
    explorer.entry.value = 1  # back to the data
    shown(explorer, loaded[2][1].images)


def test_cost_explorer_shows_what_the_planner_says():
    model, speed = cost_model(reference_config()), Speed.of_gpu("H200", 0.4)
    explorer = widgets.CostExplorer(model, speed, 1000, text_tokens=60)
    explorer.layer.value, explorer.stride.value, explorer.share.value, explorer.light.value = 4, 16, 0.5, 0.25
    scheme = Scheme.of(
        "yours",
        [dict(plan="4:avgpool:16", share=0.5), dict(plan="16:avgpool:16", share=0.25), dict(plan="none", share=0.25)],
    )
    wanted = scheme_table(model, {"yours": scheme}, 1000, speed, text_tokens=60).loc["yours"]
    assert explorer.table.hours["yours"] == pytest.approx(wanted.hours)
    assert f"hours: {wanted.hours:.2f}" in explorer.message.value and bytes(explorer.image.value).startswith(b"\x89PNG")
    explorer.share.value = 0.9
    assert "the shares sum to 1.15, above 1" in explorer.message.value and bytes(explorer.image.value) == b""
    explorer.share.value = 0
    assert [stage.plan for stage in explorer.scheme.stages] == ["16:avgpool:16", "none"]


def test_explorers_on_clips(video_model, clip_data):
    loaded = *load_model(str(video_model)), LlavaData(clip_data / "heldout.json")
    for make in (widgets.redundancy_explorer, widgets.design_explorer):
        explorer = make(*loaded, layer=1, stride=8)
        view = inspect.view(*loaded[:2], explorer.question.value, loaded[2][explorer.entry.value].videos, explorer.plan)
        first = loaded[2][explorer.entry.value].videos[0][0]
        assert explorer.view is not None and explorer.image.value == widgets.png(explorer.draw(first, view))


def test_a_placeholder_in_the_question_is_one_line(loaded, explorer):
    for words in ("<image>", "what is in <image>?", "<video>"):
        explorer.question.value = words
        assert explorer.view is None and explorer.image.value == b"" and "placeholder" in explorer.message.value
    explorer.question.value = "Is there a 3?"
    shown(explorer, loaded[2][0].images)


def test_a_path_that_cannot_be_is_one_line(explorer):
    for path in ("~nouser/x.png", "a\0b.png"):
        explorer.path.value = path
        assert "image path" in explorer.message.value and "\n" not in explorer.message.value


def test_words_that_the_model_does_not_know_are_one_line(explorer):
    explorer.question.value = "is a red shape above a green square"
    assert explorer.view is None and not explorer.image.value
    assert "unknown to the tokenizer" in explorer.message.value and "-p model nano-tuned" in explorer.message.value
