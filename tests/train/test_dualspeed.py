"""DualSpeed: both modes against a literal oracle, gradients, cost, training, resumption, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import IMAGE, ragged_batch, tiny_llava
from transformers import AutoModelForImageTextToText

from llavolta import Scheme, Stage, compress
from llavolta.compression.families import unwrap
from llavolta.cost.bench import step_times
from llavolta.cost.flops import CostModel
from llavolta.cost.planner import Speed, scheme_table
from llavolta.cost.references import reference_config
from llavolta.errors import ConfigError, PlanError
from llavolta.studies.compare import contestants
from llavolta.train import run as run_module
from llavolta.train.build import prepare, stage_model
from llavolta.train.config import TrainConfig
from llavolta.train.dualspeed import add_isolator, fast_mode, slow_mode
from llavolta.train.run import train
from llavolta.train.schemes import BASELINE_SCHEMES, ISOLATOR
from llavolta.train.trainer import StageTrainer, read_metrics

RAGGED = [[3, 4], [2, 0, 5], [6]]  # one picture, two, none
PLANS = ["0:avgpool:8", "0:random:0.25", "vision:avgpool:8"]
SEED = 5


def made() -> torch.nn.Module:
    model = tiny_llava().train()
    add_isolator(model)
    return model


def left_of(model, batch: dict, plan: str) -> list[torch.Tensor]:
    """What ``plan`` leaves of each picture, (M, C), one by one."""
    pixels, base = batch["pixel_values"], model.model
    whole = list(base.get_image_features(pixel_values=pixels).pooler_output)
    if plan == "0:avgpool:8":
        return [torch.stack([tokens[:8].mean(0), tokens[8:].mean(0)]) for tokens in whole]
    if plan == "0:random:0.25":
        torch.manual_seed(SEED)
        draws = torch.rand(len(whole), 16)
        return [tokens[draw.topk(4).indices.sort().values] for tokens, draw in zip(whole, draws, strict=True)]
    found = base.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    return [base.multi_modal_projector(torch.stack([t[:8].mean(0), t[8:].mean(0)])) for t in found]


def fast_oracle(model, batch: dict, plan: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (M, vocabulary) at the labelled tokens and those labels: every row alone, put together by hand."""
    pictures = iter(left_of(model, batch, plan)) if "pixel_values" in batch else iter(())
    logits, targets = [], []
    for ids, labels, real in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True):
        ids, labels = ids[real].tolist(), labels[real].tolist()
        row, row_labels, place = [], [], 0
        while place < len(ids):
            if ids[place] == IMAGE:
                left = next(pictures)
                row += [*model.mode_isolator.weight, *left]
                row_labels += [-100] * (4 + len(left))
                place += 16
            else:
                row.append(model.get_input_embeddings()(torch.tensor(ids[place])))
                row_labels.append(labels[place])
                place += 1
        hidden = model.model.language_model(inputs_embeds=torch.stack(row)[None]).last_hidden_state
        for at in range(1, len(row)):
            if row_labels[at] != -100:
                logits.append(model.lm_head(hidden[0, at - 1]))
                targets.append(row_labels[at])
    return torch.stack(logits), torch.tensor(targets)


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_fast_mode_is_the_stock_model_on_embeddings_put_together_by_hand(plan, side):
    model, batch = made(), ragged_batch(RAGGED, side=side)
    logits, targets = fast_oracle(model, batch, plan)
    expected = F.cross_entropy(logits, targets)
    by_hand = gradients(model, expected)
    torch.manual_seed(SEED)
    with fast_mode(model, Stage(plan, 1, slow_every=2)):
        out = model(**batch)
    torch.testing.assert_close(out.logits[0, :-1], logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, expected)
    found = gradients(model, out.loss)
    assert found["mode_isolator.weight"].abs().min() > 0
    torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("items", [None, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_slow_mode_adds_the_divergence_from_the_fast_mode(side, items):
    model, batch, plan = made(), ragged_batch(RAGGED, side=side), "0:random:0.25"
    fast = fast_oracle(model, batch, plan)[0].detach()
    row, column = (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)
    slow = model(**batch).logits[row, column]
    divergence = torch.zeros(())
    for p, q in zip(fast.softmax(-1), slow.softmax(-1), strict=True):
        divergence = divergence + (p * (p / q).log()).sum()
    cross_entropy = F.cross_entropy(slow, batch["labels"][row, column + 1], reduction="sum")
    assert divergence > 0.1
    expected = (cross_entropy + divergence) / (items or len(row))
    by_hand = gradients(model, expected)
    torch.manual_seed(SEED)
    with slow_mode(model, Stage(plan, 1, slow_every=2), batch):
        out = model(**batch, num_items_in_batch=items)
    assert out.logits.shape == (1, len(row) + 1, 32)
    torch.testing.assert_close(out.loss, expected)
    found = gradients(model, out.loss)
    assert "mode_isolator.weight" not in found and "lm_head.weight" in found
    torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=1e-5)


def test_rows_without_pictures_have_one_mode():
    model, batch = made(), ragged_batch([[6], [4]])
    stage = Stage("0:random:0.25", 1, slow_every=2)
    stock = model(**batch).loss
    for mode in (fast_mode(model, stage), slow_mode(model, stage, batch)):
        with mode:
            loss = model(**batch).loss
        torch.testing.assert_close(loss, stock)
        assert "mode_isolator.weight" not in gradients(model, loss)


def hooked(model) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_the_model_is_afterwards_as_it_was():
    model, batch = made(), ragged_batch(RAGGED)
    names, stage = set(vars(model)), Stage("0:random:0.25", 1, slow_every=2)
    before, hooks = model(**batch).loss, hooked(model)
    for mode in (fast_mode(model, stage), slow_mode(model, stage, batch)):
        with pytest.raises(KeyError), mode:
            raise KeyError
        assert torch.equal(model(**batch).loss, before) and set(vars(model)) == names
        assert hooked(model) == hooks
    assert model.state_dict().keys() == tiny_llava().state_dict().keys()


def test_half_precision():
    model, batch = made().to(torch.bfloat16), ragged_batch(RAGGED, dtype=torch.bfloat16)
    with fast_mode(model, stage := Stage("0:random:0.25", 1, slow_every=2)):
        model(**batch).loss.backward()
    assert torch.isfinite(model.mode_isolator.weight.grad).all()
    with slow_mode(model, stage, batch):
        assert torch.isfinite(model(**batch).loss)


class TestRefusals:
    @pytest.mark.parametrize("every", [1, -2, 2.0, True, "10"])
    def test_slow_every(self, every):
        with pytest.raises(ConfigError, match="slow_every must be 0"):
            Stage("0:random:0.1", 1, slow_every=every)

    @pytest.mark.parametrize("plan", ["none", "2:avgpool:8"])
    def test_plans_that_work_inside_the_decoder_only(self, plan):
        with pytest.raises(ConfigError, match="at layer 0 or 'vision'"):
            Stage(plan, 1, slow_every=10)
        with pytest.raises(PlanError, match="no room"):
            compress(model := made(), plan, prefix=model.mode_isolator)

    def test_too_little_is_dropped(self):
        with (
            fast_mode(model := made(), Stage("0:random:0.8", 1, slow_every=2)),
            pytest.raises(
                ValueError, match=r"no room for 4 tokens .* random:0.8:0 must drop at least as many of its 16"
            ),
        ):
            model(**ragged_batch(RAGGED))


class TestScheme:
    def test_every_tenth_step_is_slow_whatever_came_before(self):
        scheme = BASELINE_SCHEMES["dualspeed"]
        assert [step for step in range(40) if scheme.is_slow(step, 40)] == [9, 19, 29, 39]
        mixed = Scheme("mixed", (Stage("0:random:0.1", 0.5, slow_every=4), Stage("none", 0.5)))
        assert [step for step in range(16) if mixed.is_slow(step, 16)] == [3, 7]

    def test_it_reads_back_as_written(self):
        scheme = Scheme("mixed", (Stage("0:random:0.1", 0.5, slow_every=4), Stage("none", 0.5)))
        assert Scheme.of("mixed", json.loads(json.dumps(scheme.written))) == scheme
        assert scheme.written[1] == {"plan": "none", "share": 0.5}

    def test_alignment_reads_back_as_written_and_is_scaled(self):
        scheme = Scheme.of("mine", [{"align": {"plan": "0:divprune:0.1;16:avgpool:2", "isolated": True}}, "none"])
        assert scheme.align.isolates and scheme.stages == (Stage("none", 1),)
        assert Scheme.of("mine", scheme.written) == scheme
        assert scheme.scaled(8).align == Stage("0:divprune:0.1;4:avgpool:2", 1, isolated=True)
        assert scheme.reversed("back").align == scheme.align
        config = TrainConfig(output="x", scheme=scheme.written, align_plan="1:avgpool:8")
        assert config.align_stage(config.resolve_scheme(32, 10)) == scheme.align
        plain = TrainConfig(output="x", scheme="three-stage", align_plan="1:avgpool:8")
        assert plain.align_stage(plain.resolve_scheme(8, 10)) == Stage("1:avgpool:8", 1)
        with pytest.raises(PlanError, match="layer 16"):
            config.resolve_scheme(8, 10)
        short = Scheme.of("short", [{"align": {"plan": "none", "share": 0.25}}, "none"])
        assert short.align.share == 0.25 and Scheme.of("short", short.written) == short

    @pytest.mark.parametrize(
        ("stage", "match"),
        [
            (dict(plan="1:avgpool:2", isolated=True), "with isolated, plan"),
            (dict(plan="0:avgpool:2", isolated=1), "isolated must be true or false"),
            (dict(plan="0:avgpool:2", isolated=True, slow_every=2), "leave isolated out"),
            (dict(plan="0:avgpool:1|2", isolated=True), "drawn for each step"),
        ],
    )
    def test_isolation_that_cannot_be(self, stage, match):
        with pytest.raises(ConfigError, match=match):
            Stage(share=1, **stage)

    def test_other_plans_and_pivots_keep_the_modes(self):
        stages = [dict(plan="0:random:0.1", share=0.5, slow_every=4), dict(plan="none", share=0.5)]
        config = TrainConfig(output="x", scheme=stages, pivots=[30], stage=1, plan="0:avgpool:8")
        stage, last = config.resolve_scheme(8, 90).stages
        assert (stage.plan, stage.slow_every, last.slow_every) == ("0:avgpool:8", 4, 0)
        assert stage.share == pytest.approx(1 / 3)

    def test_contestants_know_it(self):
        (stage,) = contestants(["dualspeed"], {}, 8)["dualspeed"].stages
        assert stage == Stage("0:divprune:0.099", 1, slow_every=10)
        align = contestants(["dualspeed"], {}, 8)["dualspeed"].align
        assert align == Stage("0:divprune:0.099", 1, isolated=True) and not align.slow_every

    def test_tokens_and_flops(self):
        """A slow step costs a whole step and the fast mode's forward pass."""
        stage, model = Stage("0:divprune:0.099", 1, slow_every=10), CostModel(reference_config())
        assert stage.tokens_per_layer(32, 576) == pytest.approx([0.9 * (57 + 4) + 0.1 * 576] * 32)  # int(57.6)
        fast, whole = (model.step("none" if k else stage.plan, 80 + 4 * (not k), 1, 20).total for k in (0, 1))
        asked = model.step(stage.plan, 84, 1, 20, phase="forward").total
        expected = 0.9 * fast + 0.1 * (whole + asked)
        assert sum(share * cost.total for share, cost in model.stage(stage, 80, 1, 20)) == pytest.approx(expected)
        table = scheme_table(model, BASELINE_SCHEMES, 1000, Speed(1e-12, 1e-12), text_tokens=80, labelled=20)
        ratios = [table.flops_ratio["dualspeed"], table.time_ratio["dualspeed"]]
        assert ratios == pytest.approx([expected / whole] * 2)
        assert table.ratio["dualspeed"] == pytest.approx(576 / (0.9 * 61 + 57.6))
        (only,) = BASELINE_SCHEMES["dualspeed"].align.passes
        assert only.plan == stage.plan and only.prefix == 4 and only.trains

    def test_step_times(self):
        stage, batch = Stage("0:random:0.25", 1, slow_every=2), ragged_batch([[30, 30]] * 8)
        times = step_times(tiny_llava(), [batch], [stage, stage.plan], 1, progress=False).set_index("plan")
        assert list(times.index) == ["none", "0:random:0.25:0, slow every 2", "0:random:0.25:0"]
        assert times.flops_ratio.iloc[1] > times.flops_ratio.iloc[2] and (times.seconds > 0).all()


@pytest.fixture(scope="module")
def settings(scenes, small_model):
    """Eight steps, of which the third and sixth are slow, then a stage without compression."""
    stages = [dict(plan="0:random:0.1", share=0.8, slow_every=3), dict(plan="none", share=0.2)]
    return dict(
        model=str(small_model), data=str(scenes / "train.json"), align_steps=0, scheme=stages, max_steps=10
    ) | dict(batch_size=4, log_steps=1, keep_checkpoints=10)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    return train(TrainConfig(output=str(output), save_steps=1, **settings), progress=False)


def weights(folder, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_slow_steps_leave_the_isolator_without_gradient(whole):
    """AdamW moves what it has moments of only when there is a gradient."""
    held = [weights(whole / f"checkpoint-{step}", "mode_isolator")["weight"] for step in range(1, 11)]
    moved = [not torch.equal(a, b) for a, b in zip(held, held[1:], strict=False)]
    assert moved == [True, False, True, True, False, True, True, False, False]  # steps 2 to 10


def test_the_result_is_a_plain_llava(whole, settings):
    config = TrainConfig(output=str(whole), stage=1, **settings)
    for folder in (whole, stage_model(config, prepare(config))):
        _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert not any("isolator" in name for name in weights(folder))
    assert not (whole / "mode_isolator.safetensors").exists()


def test_what_a_run_says(whole):
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["stage"] for row in rows] == [1] * 8 + [2] * 2
    assert rows[0]["tokens_per_layer"] == pytest.approx([2 / 3 * (14 + 4) + 1 / 3 * 144] * 4)
    assert rows[-1]["tokens_per_layer"] == [144] * 4
    assert json.loads((whole / "checkpoint-3" / "scheme.json").read_text())["stages"][0]["slow_every"] == 3


class Interrupt(Exception):
    pass


def interrupted(monkeypatch, at: int, **config) -> None:
    step, count = StageTrainer.training_step, []

    def failing(self, *args):
        count.append(1)
        if len(count) > at:
            raise Interrupt
        return step(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(StageTrainer, "training_step", failing)
        train(TrainConfig(**config), progress=False)


@pytest.mark.parametrize("at", [2, 8])  # before a slow step, and at the end of a stage
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, settings, tmp_path, monkeypatch, at):
    run = dict(output=str(tmp_path / "run"), save_steps=1, **settings)
    interrupted(monkeypatch, at, **run)
    train(TrainConfig(**run), progress=False)
    assert same(weights(whole), weights(tmp_path / "run"))
    for step in (5, 10):
        held = [weights(folder / f"checkpoint-{step}", "mode_isolator") for folder in (whole, tmp_path / "run")]
        assert same(*held)


def test_adapters_checkpointing_and_accumulation(settings, tmp_path, monkeypatch):
    more = dict(lora_rank=2, gradient_checkpointing=True, batch_size=2, global_batch=4, max_steps=4, save_steps=1)
    settings = {**settings, **more}
    whole = train(TrainConfig(output=str(tmp_path / "whole"), **settings), progress=False)
    interrupted(monkeypatch, 5, output=str(tmp_path / "run"), **settings)  # in the third step, the slow one
    assert (tmp_path / "run" / "checkpoint-2").exists() and not (tmp_path / "run" / "checkpoint-3").exists()
    again = train(TrainConfig(output=str(tmp_path / "run"), **settings), progress=False)
    assert same(weights(whole), weights(again))


def test_accumulation_of_slow_steps_is_one_large_slow_step():
    """The mean over all labelled tokens of the step, also of the divergence."""
    model, stage = made(), Stage("0:avgpool:8", 1, slow_every=2)
    parts = [ragged_batch([[3, 4]], seed=1), ragged_batch([[3, 4]], seed=2)]
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    items = sum(int((part["labels"] != -100).sum()) for part in parts)
    total = 0.0
    for part in parts:
        with slow_mode(model, stage, part):
            total += model(**part, num_items_in_batch=torch.tensor(items)).loss.item()
    with slow_mode(model, stage, whole):
        assert math.isclose(model(**whole).loss.item(), total, rel_tol=1e-5)


def test_it_learns(settings, tmp_path):
    changes = dict(scheme="dualspeed", max_steps=20, learning_rate=1e-2)
    run = train(TrainConfig(output=str(tmp_path / "run"), **settings).changed(**changes), progress=False)
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl")]
    assert sum(losses[15:]) < 0.7 * sum(losses[:5])


@pytest.fixture
def aligned(settings, scenes, tmp_path):
    """A run whose alignment trains the isolator, too."""
    plan = "0:divprune:0.25"
    scheme = [{"align": {"plan": plan, "isolated": True}}, {"plan": plan, "share": 1, "slow_every": 3}]
    values = {**settings, "scheme": scheme, "align_data": str(scenes / "align.json"), "align_steps": 2, "max_steps": 3}
    return TrainConfig(output=str(tmp_path / "run"), **values)


def test_tuning_starts_from_the_isolator_that_alignment_has_trained(aligned, tmp_path, monkeypatch):
    begun = []
    real, finish = StageTrainer.train, run_module._finish

    def watched(self, *args, **kwargs):
        begun.append(getattr(unwrap(self.model), ISOLATOR).weight.detach().clone())
        return real(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "train", watched)
    out = train(aligned, progress=False)
    held = load_file(out / "align" / f"{ISOLATOR}.safetensors")["weight"]
    assert torch.equal(begun[1], held) and not torch.equal(begun[0], held)
    assert not (out / f"{ISOLATOR}.safetensors").exists()  # the result is plain
    rows = read_metrics(out / "align" / "metrics.jsonl")
    assert {row["plan"] for row in rows} == {"0:divprune:0.25:auto"}
    elsewhere = dict(model=str(out / "align"), align_steps=0)  # as comparisons share an alignment
    again = train(aligned.changed(output=str(tmp_path / "again"), **elsewhere), progress=False)
    assert torch.equal(begun[2], held) and same(weights(out), weights(again))

    def killed(*args):
        finish(*args)
        raise Interrupt

    config = aligned.changed(output=str(tmp_path / "killed"))
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(run_module, "_finish", killed)  # behind alignment
        train(config, progress=False)
    assert same(weights(out), weights(train(config, progress=False)))
    assert torch.equal(begun[4], held)
