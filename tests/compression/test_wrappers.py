"""compress() under what people put around a model: DDP, PEFT, gradient checkpointing, torch.compile, the Trainer."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import ragged_batch, tiny_llava
from transformers import Trainer, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from llavolta import compress
from llavolta.compression.families import find_parts, towers
from llavolta.train.models import set_trainable, spare_frozen_towers

RAGGED = [[3, 4], [2, 0, 5], [6], [1, 3, 2]]


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict, expected: dict, tolerance: float = 0):
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


class Wrapped(torch.nn.Module):
    """Like DistributedDataParallel: the model is ``module``."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("outside", [True, False])
def test_a_wrapper_around_the_model(outside):
    """compress() may be given the wrapper, or the model before it is wrapped."""
    model, batch = tiny_llava().train(), ragged_batch(RAGGED)
    with compress(model, "1:avgpool:3"):
        expected = gradients(model, batch)
    wrapper = Wrapped(Wrapped(model))
    with compress(wrapper if outside else model, "1:avgpool:3"):
        got = gradients(wrapper, batch)
    assert_same({name.removeprefix("module.module."): grad for name, grad in got.items()}, expected)
    with compress(wrapper, "1:avgpool:3"), pytest.raises(RuntimeError, match="already"):
        compress(model, "1:avgpool:3")


@pytest.mark.parametrize("plan", ["1:avgpool:3", "2:fastv:0.5", "vision:prumerge:0.5"])
def test_lora(plan):
    model, batch = tiny_llava(), ragged_batch(RAGGED)
    lora = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    peft = get_peft_model(model, lora).train()
    found = []
    for labelled_only in (True, False):
        with compress(peft, plan, labelled_only=labelled_only):
            found.append(gradients(peft, batch))
    assert_same(*found, tolerance=1e-4)
    assert found[0] and all("lora" in name for name in found[0])
    with torch.no_grad():
        stock = peft(**batch).loss
        with compress(peft, plan):
            assert peft(**batch).loss != stock
            assert peft.generate(**{k: v for k, v in batch.items() if k != "labels"}, max_new_tokens=2).shape[0] == 4


@pytest.mark.parametrize(
    "plan",
    ["0:avgpool:2", "1:avgpool:3", "1:fastv:0.5", "2:pyramiddrop:0.5", "vision:avgpool:2", "vision:prumerge:0.5"],
)
def test_gradient_checkpointing_gives_equal_gradients(plan):
    model, batch = tiny_llava().train(), ragged_batch(RAGGED)
    with compress(model, plan):
        plain = gradients(model, batch)
        model.activation_checkpointing_enable()
        assert_same(gradients(model, batch), plain)


@pytest.mark.parametrize(("plan", "is_stock"), [("none", True), ("1:avgpool:3", False)])
def test_the_trainers_label_smoothing_stays_stock(plan, is_stock, tmp_path):
    """It keeps the labels to itself and reads full logits, which it then gets."""
    batch, losses = ragged_batch(RAGGED), []
    model = tiny_llava().train()
    arguments = TrainingArguments(tmp_path, label_smoothing_factor=0.1, use_cpu=True, report_to=[])
    trainer = Trainer(model, arguments)
    if is_stock:
        losses.append(trainer.compute_loss(model, dict(batch)))
    for labelled_only in (True, False):
        with compress(model, plan, labelled_only=labelled_only):
            losses.append(trainer.compute_loss(model, dict(batch)))
    assert torch.isfinite(losses[0]) and all(torch.equal(loss, losses[0]) for loss in losses)


def test_labels_that_were_shifted_ahead_and_outputs_as_tuples():
    """Sequence-parallel trainers pass shift_labels; then the logits stay whole and the loss is stock's."""
    model, batch = tiny_llava().train(), ragged_batch(RAGGED)
    shifted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    with compress(model, "1:avgpool:3"):
        loss = model(**batch).loss
        whole = model(**batch, shift_labels=shifted)
        as_tuple = model(**batch, return_dict=False)
    assert whole.logits.shape[:2] == batch["labels"].shape
    torch.testing.assert_close(whole.loss, loss)
    assert torch.equal(as_tuple[0], loss)


def test_gradient_accumulation_counts_the_items_of_the_whole_batch(tmp_path):
    """The Trainer's num_items_in_batch: two halves of a batch together give the whole batch's gradients."""
    batch = ragged_batch([[3, 4], [2, 5], [1, 9], [6, 2]])
    halves = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
    model = tiny_llava().train()
    items = (batch["labels"][:, 1:] != -100).sum()
    with compress(model, "1:avgpool:3"):
        whole = gradients(model, batch)
        model.zero_grad()
        for half in halves:
            model(**half, num_items_in_batch=items).loss.backward()
    parts = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same(parts, whole, tolerance=1e-4)


@pytest.mark.slow  # tracing alone takes 15 to 20 s
@pytest.mark.parametrize(("in_place", "plan"), [(False, "0:pyramiddrop:0.5"), (True, "vision:prumerge:0.5")])
def test_torch_compile(in_place, plan):
    """A model that was compiled and run before compression starts, and runs on after it ends."""
    batch, plain = ragged_batch([[3, 4], [2, 5]]), tiny_llava(layers=1)
    stock = plain(**batch).loss
    with compress(plain, plan):
        expected = plain(**batch).logits
    model = tiny_llava(layers=1)
    model.compile(backend="eager") if in_place else None
    compiled = model if in_place else torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).loss, stock)
        with compress(compiled, plan):
            torch.testing.assert_close(compiled(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        with torch.compiler.set_stance("eager_on_recompile"):  # or the trace of before, if it fits
            torch.testing.assert_close(compiled(**batch).loss, stock)
    torch.compiler.reset()


@pytest.mark.parametrize("train_tower", [False, True])
def test_checkpointing_spares_a_frozen_tower_and_changes_no_gradient(train_tower):
    model, batch = tiny_llava().train(), ragged_batch(RAGGED)
    set_trainable(model, "instruct", train_tower)
    plain = gradients(model, batch)
    model.activation_checkpointing_enable()
    spare_frozen_towers(model)
    assert_same(gradients(model, batch), plain)
    parts = find_parts(model)
    layers = [m for m in towers(parts)["vision_tower"].modules() if isinstance(m, GradientCheckpointingLayer)]
    assert layers and all(layer.gradient_checkpointing == train_tower for layer in layers)
    assert all(layer.gradient_checkpointing for layer in parts.layers)
