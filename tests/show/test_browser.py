"""The explorers in a real JupyterLab, in a real browser, moved by keyboard."""

from __future__ import annotations

import base64
import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from llavolta.compression.compressors import COMPRESSORS
from llavolta.data import LlavaData
from llavolta.paths import DATA
from llavolta.show import token_maps, widgets
from llavolta.studies import inspect
from llavolta.studies.opening import open_study
from llavolta.train.models import load_model

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "data" / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MINUTE = 60_000  # milliseconds

pytestmark = pytest.mark.browser
if CHROMIUM is None:
    pytest.skip("no chromium; apt-get install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install playwright")


@pytest.fixture(scope="module")
def lab(tmp_path_factory, scenes, small_model):
    """(url, folder) of a JupyterLab whose folder holds both notebooks, with parameters that run in seconds."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copy(ROOT / "notebooks" / "my_compressor.py", folder)
    common = dict(model=str(small_model), questions=str(scenes / "heldout.json"))
    for name, settings in {
        "01_redundancy": dict(layers=[0, 2], strides=[1, 8], limit=8, output=str(folder / "sweep")),
        "02_compressor_design": dict(strides=[1, 8]),
    }.items():
        notebook = load_notebook_node(str(ROOT / "notebooks" / f"{name}.ipynb"))
        nbformat.write(parameterize_notebook(notebook, {**common, **settings}), folder / f"{name}.ipynb")
        nano = dict(model="nano-tuned", **({"layers": [2]} if name == "01_redundancy" else {}))
        nbformat.write(parameterize_notebook(notebook, {**settings, **nano}), folder / f"{name}_nano.ipynb")
    settings = folder / ".jupyter" / "lab" / "user-settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')  # cells out of sight stay
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--notebook-dir={folder}"]
    search = {"PYTHONPATH": str(ROOT), "HOME": str(folder), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    log = (folder / "lab.log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **search})
    url = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{url}/api")
            break
        except OSError:
            assert server.poll() is None, (folder / "lab.log").read_text()[-2000:]
            time.sleep(0.25)
    yield url, folder
    server.terminate()
    server.wait(20)
    log.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


@pytest.fixture
def my_compressor():
    """The worked example, known to the registry for one test."""
    runpy.run_path(str(ROOT / "notebooks" / "my_compressor.py"))
    yield
    del COMPRESSORS["unusual"]


class Page:
    """A notebook that has been opened and run; its explorer."""

    def __init__(self, browser, url: str, name: str):
        start = time.perf_counter()
        self.page = page = browser.new_page(viewport={"width": 1500, "height": 1100})
        self.crashes = []
        page.on("pageerror", lambda error: self.crashes.append(str(error)))
        page.goto(f"{url}/lab/tree/{name}.ipynb?reset")  # without the tabs of the notebook before
        page.wait_for_selector(".jp-NotebookPanel-toolbar", timeout=MINUTE)
        self.idle = idle = page.get_by_text("Python 3 (ipykernel) | Idle")  # before that, running asks for a kernel
        idle.wait_for(timeout=MINUTE)
        self.opened = time.perf_counter() - start
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        boxes = page.locator(".jp-OutputArea-output .widget-hbox", has=page.locator("img.widget-image"))
        try:
            boxes.first.locator("img.widget-image").wait_for(timeout=MINUTE)
            self.first_answer = time.perf_counter() - start
        finally:
            self.screenshot(name)
        waiting = "() => [...document.querySelectorAll('.jp-InputPrompt')].some(cell => cell.textContent.includes('*'))"
        while page.evaluate(waiting):  # while cells run, controls wait
            page.wait_for_timeout(100)
        idle.wait_for(timeout=2 * MINUTE)
        self.box = boxes.last

    def screenshot(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=SCREENSHOTS / f"{name}.png")

    def text(self) -> str:
        return self.box.locator(".widget-html-content").last.inner_text()

    def png(self) -> bytes:
        read = """async image => {
            const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
            return btoa(Array.from(bytes, byte => String.fromCharCode(byte)).join(''));
        }"""
        return base64.b64decode(self.box.locator("img.widget-image").evaluate(read))

    def press(self, slider: str, key: str) -> float:
        """Seconds until the numbers have followed one key press on a slider."""
        row = self.box.locator(".widget-slider", has_text=slider)
        row.locator(".noUi-handle").focus()
        return self.follow(lambda: self.page.keyboard.press(key))

    def follow(self, act) -> float:
        """Seconds until the numbers have followed ``act``."""
        before, start = self.text(), time.perf_counter()
        act()
        while self.text() == before:
            assert time.perf_counter() - start < 20, f"nothing changed from {before!r}"
            self.page.wait_for_timeout(20)
        return time.perf_counter() - start

    def ask(self, question: str) -> float:
        """Seconds until a question that is typed is answered, maybe as the one before: the kernel is idle again."""
        field = self.box.locator(".widget-text", has_text="question").locator("input")
        field.fill(question)
        self.page.wait_for_timeout(300)
        start = time.perf_counter()
        field.press("Enter")
        self.page.wait_for_timeout(200)
        self.idle.wait_for(timeout=MINUTE)
        return time.perf_counter() - start

    def errors(self) -> list[str]:
        found = self.page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()
        return found + self.crashes


@pytest.mark.parametrize(
    ("name", "start", "moves", "draw"),
    [
        (
            "01_redundancy",
            "0:avgpool:8",
            [("layer K", "ArrowRight", "1:avgpool:8"), ("stride", "ArrowRight", "1:avgpool:9")],
            token_maps.picture_with_tokens,
        ),
        (
            "02_compressor_design",
            "2:unusual:0.25",
            [("layer K", "ArrowLeft", "1:unusual:0.25"), ("keep", "ArrowRight", "1:unusual:0.26")],
            token_maps.picture_with_layers,
        ),
    ],
)
def test_sliders_move_picture_and_numbers(lab, browser, my_compressor, scenes, small_model, name, start, moves, draw):
    url, _ = lab
    model, processor = load_model(str(small_model))
    question, images = inspect.choose(LlavaData(scenes / "heldout.json"), 0)
    page = Page(browser, url, name)
    seen = []
    for slider, key, plan in [(None, None, start), *moves]:
        if slider:
            assert page.press(slider, key) < 5
        view = inspect.view(model, processor, question["question"], images, plan)
        assert f"compression ratio: {view.ratio:.3f}" in page.text()
        assert f"training FLOPs: {view.flops:.1%} of no compression" in page.text()
        assert f"answer: {view.answer}" in page.text()
        page.page.wait_for_timeout(300)  # the picture is a message of its own
        assert page.png() == widgets.png(draw(images[0], view))
        seen.append((page.text(), page.png()))
    assert len(set(seen)) == len(seen)
    page.box.scroll_into_view_if_needed()
    page.screenshot(name)
    assert page.errors() == []


@pytest.mark.skipif(not (DATA / "cache" / "nano" / "model").is_dir(), reason="make nano, from a package registry")
@pytest.mark.parametrize(
    ("name", "slider"), [("01_redundancy_nano", "stride"), ("02_compressor_design_nano", "layer K")]
)
def test_a_pretrained_model_answers_any_question_about_any_picture(lab, browser, name, slider):
    """On nano-tuned: an upload, questions in plain words and in another language, and sliders."""
    url, _ = lab
    study = open_study("nano-tuned")
    page = Page(browser, url, name)
    page.box = page.page.locator(".widget-hbox", has=page.page.locator("img.widget-image")).first
    picture = study.data[7].images[0].resize((300, 220))  # of no size that the model was trained on
    file = SCREENSHOTS / "own.png"
    picture.save(file)
    with page.page.expect_file_chooser() as chooser:
        page.box.locator(".jupyter-widget-upload, .widget-upload").click()
    chooser.value.set_files(file)
    page.page.get_by_text("upload a picture (1)").wait_for()
    took = {}
    plan, draw = "2:avgpool:8", token_maps.picture_with_tokens
    if slider == "layer K":
        plan, draw = "2:avgpool:4", token_maps.picture_with_layers
    for question in ("What do you see in the top left?", "Was ist oben links zu sehen?"):
        took[question] = page.ask(question)
        view = inspect.view(study.model, study.processor, question, [picture], plan)
        assert f"answer: {view.answer}\n" in page.text() and view.answer and max(view.guesses.values()) > 0.01
        page.page.wait_for_timeout(300)  # the picture is a message of its own
        assert page.png() == widgets.png(draw(picture, view))  # of the upload, not of the entry before
    took[slider] = page.press(slider, "ArrowRight")  # another ratio
    page.screenshot(name)
    took = {"open": page.opened, "first answer": page.first_answer} | took
    print(f"{name}: {', '.join(f'{what} {seconds:.1f} s' for what, seconds in took.items())}")
    assert page.errors() == []
