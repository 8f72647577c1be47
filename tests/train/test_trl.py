"""StageCallback in TRL's SFTTrainer, on a data set of messages and images."""

from __future__ import annotations

from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image

from llavolta import SCHEMES, StageCallback
from llavolta.compression.families import find_parts
from llavolta.errors import ConfigError
from llavolta.train.callback import check_trainer
from llavolta.train.models import load_model

trl = pytest.importorskip("trl", reason="no trl; pip install trl")


def trained(small_model, folder, callbacks, steps: int = 6):
    model, processor = load_model(str(small_model))
    rows = []
    find_parts(model).layers[-1].register_forward_hook(
        lambda layer, args, hidden: rows.append(hidden.shape[1]) if torch.is_grad_enabled() else None
    )
    said = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "read all digits ."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "1 2 3"}]},
    ]
    pictures = [[Image.new("RGB", (96, 96), (40 * number, 90, 160))] for number in range(4)]
    data = datasets.Dataset.from_dict({"messages": [said] * 4, "images": pictures})
    data = data.cast_column("images", datasets.List(datasets.Image()))
    settings = trl.SFTConfig(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
        max_length=None,
        logging_steps=1,
    )
    trainer = trl.SFTTrainer(model, settings, train_dataset=data, processing_class=processor, callbacks=callbacks)
    trainer.train()
    return rows, [row["loss"] for row in trainer.state.log_history if "loss" in row], model


def test_stages_in_an_sft_trainer(small_model, tmp_path):
    scheme = SCHEMES["three-stage"].scaled(4)
    rows, losses, model = trained(small_model, tmp_path / "staged", [StageCallback(scheme, labelled_only=False)])
    whole, stock, _ = trained(small_model, tmp_path / "stock", [])
    assert len(rows) == len(whole) == 6 and len(set(whole)) == 1
    assert rows[:4] == [whole[0] - 144 + 18] * 4 and rows[4:] == whole[4:]  # an eighth, and then all
    assert losses[-1] < losses[0] and all(loss > 0 for loss in losses) and losses != stock
    with torch.no_grad():
        assert not find_parts(model).layers[-1]._forward_pre_hooks  # nothing is left in force


@pytest.mark.parametrize("name", ["DPOTrainer", "GRPOTrainer", "KTOTrainer", "RLOOTrainer"])
def test_trainers_that_compare_passes_are_refused_by_name(name):
    kind = type("Own", (getattr(trl, name),), {})
    running = kind.__new__(kind)
    running.args, running.model = SimpleNamespace(n_gpu=1, torch_compile=False), None
    with pytest.raises(ConfigError, match=f"^{name} compares passes .* all visual tokens; StageCallback serves"):
        check_trainer(running)


def test_dpo_is_refused_before_it_computes_reference_probabilities(small_model, tmp_path):
    model, processor = load_model(str(small_model))
    rows = [{"prompt": "read all digits .", "chosen": " 1 2 3", "rejected": " 3 2 1"}] * 2
    settings = trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], precompute_ref_log_probs=True)
    data = dict(train_dataset=datasets.Dataset.from_list(rows), processing_class=processor)
    callback = StageCallback(SCHEMES["three-stage"].scaled(4), labelled_only=False)
    with pytest.raises(ConfigError, match="^DPOTrainer compares passes"):
        trl.DPOTrainer(model, args=settings, callbacks=[callback], **data)
