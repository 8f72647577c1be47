"""StageCallback in a stock Trainer: plans in training steps alone, checkpoints that resume, what is refused."""

from __future__ import annotations

import re
from types import SimpleNamespace

import families_tiny
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ragged_batch, tiny_llava
from transformers import Trainer, TrainerCallback, TrainingArguments

from llavolta import SCHEMES, Scheme, Stage, StageCallback, compress
from llavolta.compression.families import find_parts
from llavolta.errors import ConfigError
from llavolta.train.callback import check_shards, check_trainer

HALVES = Scheme.equal("halves", "1:avgpool:4", "none")
EXAMPLE = {key: value[0] for key, value in ragged_batch([[3, 4]]).items()}


class Rows:
    """Tokens that the last decoder layer saw in each pass with gradients or in evaluation."""

    def __init__(self, model):
        self.seen = []
        find_parts(model).layers[-1].register_forward_hook(self._note)

    def _note(self, layer, args, hidden):
        if torch.is_grad_enabled() or not layer.training:
            self.seen.append((layer.training, hidden.shape[1]))


def trainer(model, tmp_path, scheme, *callbacks, example=EXAMPLE, **settings):
    settings = dict(max_steps=6, per_device_train_batch_size=2, save_strategy="no") | settings
    arguments = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True, **settings
    )
    callbacks = ([StageCallback(scheme)] if scheme else []) + list(callbacks)
    data = dict(train_dataset=[example] * 12, eval_dataset=[example])
    return Trainer(model, arguments, **data, callbacks=callbacks)


def hooks(model) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_a_stock_trainer_trains_the_stages_and_evaluates_on_all_tokens(tmp_path):
    model = tiny_llava(layers=4)
    before = Rows(model)
    whole = ragged_batch([[3, 4]])["input_ids"].shape[1]
    scheme = SCHEMES["three-stage"].scaled(4)
    trainer(model, tmp_path, scheme, eval_strategy="steps", eval_steps=1).train()
    trained = [rows for training, rows in before.seen if training]
    assert len(trained) == 6 and trained[4:] == [whole] * 2
    assert all(rows < whole for rows in trained[:4])
    assert {rows for training, rows in before.seen if not training} == {whole}
    model.eval()(**ragged_batch([[3, 4]]))
    assert before.seen[-1] == (False, whole)  # nothing is left in force


class Evaluates(TrainerCallback):
    """Evaluates behind each step, and by itself within each event; notes both losses and that of the bare model."""

    def __init__(self):
        self.losses = []

    def on_step_end(self, args, state, control, **kwargs):
        control.should_evaluate = True

    def on_evaluate(self, args, state, control, model=None, metrics=None, **kwargs):
        with torch.no_grad():
            own = model.eval()(**{key: value[None] for key, value in EXAMPLE.items()}).loss.item()
        self.losses.append((metrics["eval_loss"], own))

    def own_loss(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            self.losses.append((model(**{key: value[None] for key, value in EXAMPLE.items()}).loss.item(),) * 2)
        assert not any(module._forward_pre_hooks for module in model.modules())

    on_step_begin = on_pre_optimizer_step = on_optimizer_step = on_epoch_end = own_loss


def test_evaluation_in_training_is_of_the_model_that_is_shipped(tmp_path):
    after, when = Evaluates(), dict(eval_strategy="epoch", eval_on_start=True)
    trainer(tiny_llava(), tmp_path, Scheme.equal("all", "0:avgpool:8"), after, max_steps=3, **when).train()
    assert len(after.losses) > 9
    for found, own in after.losses:
        assert found == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize("where, error", [
    ("forward", KeyboardInterrupt), ("backward", RuntimeError),
    ("on_optimizer_step", KeyboardInterrupt), ("install", KeyboardInterrupt),
])  # fmt: skip
def test_a_model_is_stock_after_an_error_anywhere_in_a_step(tmp_path, monkeypatch, where, error):
    model, batch = tiny_llava(), ragged_batch([[3, 4]])
    model(**batch)  # transformers adds hooks of its own
    before, callback = hooks(model), TrainerCallback()
    last, layers = find_parts(model).layers[-1], find_parts(model).layers

    def stop(*args, **kwargs):
        raise error

    def fails(module, args, output):
        if torch.is_grad_enabled():
            output.register_hook(stop) if where == "backward" else stop()

    if where.startswith("on_"):
        setattr(callback, where, stop)
    elif where == "install":
        monkeypatch.setattr(layers[2], "register_forward_pre_hook", stop)
    stopping = last.register_forward_hook(fails) if where in ("forward", "backward") else None
    running = trainer(model, tmp_path, HALVES, callback, max_steps=2)
    with pytest.raises(error):
        running.train()
    if stopping:
        stopping.remove()
    monkeypatch.undo()
    assert hooks(model) == before and "save_pretrained" not in vars(model)
    callback.__dict__.clear()
    with compress(model, "0:avgpool:2"):  # no handle stands in the way
        model(**batch)
    running.train()  # nor does the same trainer mind
    assert running.state.global_step == 2


def test_slow_steps_need_the_trainer_of_the_package(tmp_path):
    with pytest.raises(ConfigError, match="trains a mode isolator; train it by python -m llavolta.train"):
        trainer(tiny_llava(), tmp_path, Scheme("d", (Stage("0:random:0.1", 1, slow_every=2),))).train()


def of_family(name: str, tmp_path, scheme, *callbacks, **settings):
    family = families_tiny.FAMILIES[name]()
    batch = {**family.batch, "labels": family.batch["input_ids"].clone()}
    running = trainer(family.model, tmp_path, scheme, *callbacks, **settings)
    running.data_collator = lambda examples: dict(batch)
    return running


@pytest.mark.parametrize("name, plan, reason", [
    ("qwen2_5_vl", "vision:avgpool:2", "projector"), ("aya_vision", "1:fastv:0.5|0.2", "Cohere2Attention"),
])  # fmt: skip
def test_a_later_plan_that_the_model_cannot_do_ends_the_run_before_its_first_step(tmp_path, name, plan, reason):
    running = of_family(name, tmp_path, Scheme.equal("late", "1:avgpool:2", "none", plan))
    with pytest.raises(ConfigError, match=f"^stage 3 of scheme 'late', plan {re.escape(plan)}: .*{reason}"):
        running.train()
    assert running.state.global_step == 0


def test_the_plans_of_a_later_run_are_tried_as_well(tmp_path):
    running = of_family("qwen2_5_vl", tmp_path, None)
    later = Scheme.equal("tuning", "none", "vision:avgpool:2")
    running.add_callback(StageCallback(Scheme.equal("now", "1:avgpool:2"), later=later))
    with pytest.raises(ConfigError, match="^stage 2 of scheme 'tuning', plan vision:avgpool:2: "):
        running.train()


def test_trying_the_plans_draws_no_random_numbers(tmp_path, monkeypatch):
    scheme, weights = Scheme.equal("drawn", "0:random:0.5|0.25", "1:random:0.3"), []
    for tries in (True, False):
        if not tries:
            monkeypatch.setattr(StageCallback, "_try_stages", lambda *_: None)
        model = tiny_llava()
        trainer(model, tmp_path, scheme, max_steps=2).train()
        weights.append(model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("by", ["the callback", "Trainer alone"])
def test_a_stock_trainer_resumes_a_llava(tmp_path, by):
    """Trainer alone saves it under names that it does not find again, and warns of that only."""
    settings = dict(save_strategy="steps", save_steps=2, max_steps=4, learning_rate=1e-2)
    scheme = HALVES if by == "the callback" else Scheme.equal("stock", "none")
    whole = trainer(tiny_llava(), tmp_path, scheme if by == "the callback" else None, **settings)
    whole.train()
    resumed = trainer(tiny_llava(seed=1), tmp_path, scheme, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, msg=name)


def test_the_best_checkpoint_is_what_training_ends_with(tmp_path):
    settings = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=4)
    running = trainer(
        tiny_llava(), tmp_path, HALVES, learning_rate=1e-2, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True, **settings,
    )  # fmt: skip
    running.train()
    assert running.state.best_global_step < 4
    assert running.evaluate()["eval_loss"] == pytest.approx(running.state.best_metric)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    running = trainer(tiny_llava(), tmp_path, HALVES, max_steps=2)
    running.train()
    file = tmp_path / "checkpoint-1" / "model.safetensors"
    save_file(
        {name: value for name, value in load_file(file).items() if "layers.2" not in name}, file, {"format": "pt"}
    )
    with pytest.raises(ConfigError, match=r"checkpoint-1 lacks weights of the model, such as .*layers\.2"):
        trainer(tiny_llava(), tmp_path, HALVES, max_steps=2).train(str(tmp_path / "checkpoint-1"))


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
    with pytest.raises(ConfigError, match="2 GPUs.*one process a GPU .*--num-processes 2"):
        trainer(tiny_llava(), tmp_path, HALVES)
    late = trainer(tiny_llava(), tmp_path, None)
    late.add_callback(StageCallback(HALVES))
    with pytest.raises(ConfigError, match="--num-processes 2"):
        late.train()


def test_compiled_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="leave torch.compile out"):
        trainer(torch.compile(tiny_llava(), backend="eager"), tmp_path, HALVES)


def test_a_trainer_with_a_reference_model_is_refused(tmp_path):
    class Preferences(Trainer):
        ref_model = None

    running = trainer(tiny_llava(), tmp_path, None)
    running.__class__ = Preferences
    with pytest.raises(ConfigError, match="^Preferences compares passes of a policy .* serves Trainer and SFTTrainer"):
        check_trainer(running)


@pytest.mark.parametrize(
    "images, sharded, fits", [(1, True, False), (2, True, True), (0, True, True), (1, False, True)]
)
def test_processes_that_share_a_tower_all_have_images_or_none(images, sharded, fits):
    args = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    accelerator = SimpleNamespace(reduce=lambda here: torch.tensor(images))
    one = SimpleNamespace(args=args, accelerator=accelerator, is_fsdp_enabled=sharded)
    if fits:
        return check_shards(one, {})
    with pytest.raises(ConfigError, match="1 of 2 processes have images .* wait for one another for ever"):
        check_shards(one, {})


def test_without_a_trainer_it_names_what_to_use():
    with pytest.raises(ConfigError, match="works in transformers' Trainer; elsewhere, use compress"):
        StageCallback(HALVES).on_train_begin(None, None, None)
