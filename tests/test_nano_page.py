"""papers/nano.py: its page says what its figures say, and what is shipped loads on the model that it names."""

from __future__ import annotations

import json

import nano
import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from llavolta.paths import NANO_TUNED
from llavolta.studies.statistics import accuracy_table


def test_the_page_holds_the_figures_of_the_table():
    rows = []
    for vendor in nano.VENDORS:
        for plan in nano.PLANS:
            right = {("seen", "none"): 9, ("unseen", "none"): 6}.get((vendor, plan), 3)
            for number in range(10):
                kind, answer = ("what", "dog") if number < 6 else ("count", "two")
                rows.append(dict(vendor=vendor, plan=plan, type=kind, answer=answer, correct=number < right))
    table = accuracy_table(pd.DataFrame(rows), by=["vendor", "plan"])
    cost = pd.DataFrame([dict(vendor="seen", difference=0.6, difference_low=0.3, difference_high=0.9)])
    course = pd.DataFrame([dict(step=400, vendor=v, accuracy=0.5, low=0.4, high=0.6) for v in nano.VENDORS])
    text = nano.page(table, cost, course)
    assert "| 400 | 3,200 | 50.0% (40.0% to 60.0%) | 50.0%" in text and "Accuracy" not in nano.page(table, cost)
    overall = next(line for line in text.splitlines() if line.startswith("| overall"))
    assert [cell.split(" ")[1] for cell in overall.split("|")[2:-1]] == ["100.0%", "90.0%", "60.0%", "30.0%", "30.0%"]
    assert "seen 60.0% (30.0% to 90.0%)" in text and "| what | 100.0% | 100.0%" in text


def test_the_last_checkpoint_is_shipped_in_half_the_bytes(tmp_path):
    for step in (9, 40):
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save_file({"a.lora_A.weight": torch.full((2, 3), float(step))}, folder / "adapter_model.safetensors")
        held = dict(base_model_name_or_path="/somewhere/align", r=4, inference_mode=False)
        (folder / "adapter_config.json").write_text(json.dumps(held))
    nano.ship(tmp_path / "run", tmp_path / "out")
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert weights["a.lora_A.weight"].dtype == torch.bfloat16 and weights["a.lora_A.weight"][0, 0] == 40
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "nano"


def test_what_is_shipped_names_no_folder_of_the_machine_that_made_it():
    settings = (NANO_TUNED / "adapter_config.json").read_text()
    assert json.loads(settings)["base_model_name_or_path"] == "nano"
    assert "/" not in settings.replace("https://", "")
    weights = load_file(NANO_TUNED / "adapter_model.safetensors")
    assert any("multi_modal_projector" in name for name in weights)
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_the_committed_page_is_what_its_figures_give():
    assert (nano.FOLDER / "README.md").read_text() == nano.committed_page(nano.FOLDER)
