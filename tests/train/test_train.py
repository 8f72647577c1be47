"""Training: stages, resumption by weights, what a run writes, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, get_cosine_schedule_with_warmup
from two_processes import train_together

from llavolta.data import DataError
from llavolta.train.__main__ import main
from llavolta.train.build import prepare, stage_model
from llavolta.train.config import ConfigError, TrainConfig
from llavolta.train.launch import launch
from llavolta.train.models import load_model
from llavolta.train.run import WANTED_PROCESSES, train
from llavolta.train.trainer import StageTrainer, read_metrics


@pytest.fixture(scope="module")
def settings(scenes, small_model):
    """Parameters of a run of nine steps, three a stage, after two of alignment."""
    return dict(
        model=str(small_model),
        data=str(scenes / "train.json"),
        align_data=str(scenes / "align.json"),
        align_steps=2,
        max_steps=9,
        batch_size=4,
        log_steps=1,
    )


def weights(folder) -> dict[str, torch.Tensor]:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").state_dict()


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The whole scheme in one go."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    return train(TrainConfig(output=str(output), **settings), progress=False)


@pytest.fixture(scope="module")
def first(settings, tmp_path_factory):
    """Alignment and stage 1, one by one; tests go on from copies."""
    config = TrainConfig(output=str(tmp_path_factory.mktemp("runs") / "first"), **settings)
    for stage in (0, 1):
        run = train(config.changed(stage=stage), progress=False)
    return run


def test_stages_one_by_one_equal_the_whole_scheme_bit_for_bit(whole, first, settings, tmp_path):
    shutil.copytree(first, tmp_path / "run")
    assert not same(weights(whole), weights(tmp_path / "run"))
    for stage in (2, 3):
        train(TrainConfig(output=str(tmp_path / "run"), stage=stage, **settings), progress=False)
    assert same(weights(whole), weights(tmp_path / "run"))


def test_an_earlier_stage_can_still_be_looked_at(whole, settings):
    """Asking for stage 1 of a finished run trains nothing and gives the model as it was then."""
    config = TrainConfig(output=str(whole), stage=1, **settings)
    final = weights(whole)
    assert train(config, progress=False) == whole and same(final, weights(whole))
    assert stage_model(config, prepare(config)) == whole / "checkpoint-3"
    assert not same(final, weights(whole / "checkpoint-3"))
    AutoProcessor.from_pretrained(whole / "checkpoint-3")
    assert same(weights(whole), weights(stage_model(TrainConfig(output=str(whole), **settings), prepare(config))))


class Interrupt(Exception):
    pass


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(whole, settings, tmp_path, monkeypatch):
    """From within a stage; the run whose loss is not finite goes on from the end of one."""
    at = 5
    step, count = StageTrainer.training_step, []

    def failing(self, *args):
        count.append(1)
        if len(count) == 2 + at + 1:  # after two steps of alignment
            raise Interrupt
        return step(self, *args)

    monkeypatch.setattr(StageTrainer, "training_step", failing)
    config = TrainConfig(output=str(tmp_path / "run"), save_steps=1, **settings)
    with pytest.raises(Interrupt):
        train(config, progress=False)
    assert (tmp_path / "run" / f"checkpoint-{at}").exists()
    train(config, progress=False)
    assert same(weights(whole), weights(tmp_path / "run"))
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 10))


def test_a_run_of_drawn_plans_resumes_bit_for_bit(settings, tmp_path, monkeypatch):
    stages = [{"plan": "0:avgpool2d:1|2|3|4", "share": 1}]
    drawn = {**settings, "scheme": stages, "align_steps": 0, "max_steps": 4}
    seen, step, count = [], StageTrainer.training_step, []

    def watched(self, model, inputs, *args):
        count.append(1)
        if len(count) == 4 + 2 + 1:
            raise Interrupt
        seen.append(self.callback_handler.callbacks)
        seen[-1] = next(c.stage.plan for c in seen[-1] if hasattr(c, "stop_after"))
        return step(self, model, inputs, *args)

    monkeypatch.setattr(StageTrainer, "training_step", watched)
    train(TrainConfig(output=str(tmp_path / "whole"), **drawn), progress=False)
    config = TrainConfig(output=str(tmp_path / "run"), save_steps=1, **drawn)
    with pytest.raises(Interrupt):
        train(config, progress=False)
    train(config, progress=False)
    assert seen[:4] == seen[4:] and len(set(seen)) > 1
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))


def test_a_stage_warms_up_anew_and_resumes_bit_for_bit(settings, tmp_path, monkeypatch):
    """Each step's learning rate is the plain run's, times its stage's, times how far that has warmed up."""
    stages = [{"plan": "1:avgpool:8", "share": 1 / 3}, {"plan": "none", "share": 2 / 3, "warmup": 0.5, "lr_scale": 2}]
    warmed = {**settings, "scheme": stages, "align_steps": 0, "max_steps": 6}
    config = TrainConfig(output=str(tmp_path / "warmed"), **warmed)
    whole = train(config, progress=False)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], config.learning_rate)
    plain = get_cosine_schedule_with_warmup(optimizer, 1, 6)  # of 6 steps, 3% are one
    rates = []
    for _ in range(6):
        rates.append(plain.get_last_lr()[0])
        optimizer.step()
        plain.step()
    found = [row["learning_rate"] for row in read_metrics(whole / "metrics.jsonl")]
    factors = [1, 1, 1, 2, 2, 2]
    assert found == pytest.approx([a * b for a, b in zip(rates, factors, strict=True)])
    for stage in (1, 2):
        train(TrainConfig(output=str(tmp_path / "run"), stage=stage, **warmed), progress=False)
    assert same(weights(whole), weights(tmp_path / "run"))


def test_what_a_run_writes(whole):
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["scheme"] == "three-stage" and config["resolved_stages"][0]["plan"] == "1:avgpool:8"
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["stage"] for row in rows] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert rows[0]["tokens_per_layer"] == [144, 18, 18, 18] and rows[-1]["tokens_per_layer"] == [144] * 4
    assert all(row["seconds"] > 0 and row["loss"] > 0 for row in rows)
    scheme = json.loads((whole / "checkpoint-3" / "scheme.json").read_text())
    assert scheme["step"] == 3 and scheme["next_stage"] == 2 and len(scheme["stages"]) == 3
    assert sorted(path.name for path in whole.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]


def test_the_result_is_a_plain_hugging_face_folder(whole):
    model, info = AutoModelForImageTextToText.from_pretrained(whole, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert same(model.state_dict(), weights(whole / "checkpoint-9"))
    held, config = load_file(whole / "model.safetensors"), json.loads((whole / "config.json").read_text())
    assert "language_model.model.embed_tokens.weight" in held  # as public checkpoints call it
    assert config["dtype"] == "float32"
    assert len({file.stat().st_mode for file in whole.glob("*.*") if file.is_file()}) == 1
    prompt = AutoProcessor.from_pretrained(whole).apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a 3?"}]}],
        add_generation_prompt=True,
    )
    assert prompt == "USER: <image>\nIs there a 3? ASSISTANT:"


@pytest.mark.parametrize("rank", [0, 2])
def test_a_model_that_came_in_bfloat16_leaves_in_it(settings, small_model, tmp_path, rank):
    """What is trained and merged in float32 is rounded once; stage 0 too, but not what is trained on."""
    shutil.copytree(small_model, tmp_path / "source")
    held = AutoModelForImageTextToText.from_pretrained(small_model, dtype=torch.bfloat16)
    held.save_pretrained(tmp_path / "source")
    values = {**settings, "model": str(tmp_path / "source"), "max_steps": 3, "lora_rank": rank}
    config = TrainConfig(output=str(tmp_path / "run"), **values)
    if rank:  # alignment trains no adapters
        config = config.changed(align_steps=0)
    for stage in (3,) if rank else (0, 3):
        run = train(config.changed(stage=stage), progress=False)
        finished = weights(run)
        assert {value.dtype for value in finished.values()} == {torch.bfloat16}
        source = run / ("checkpoint-3" if stage else "align")
        trained = load_model(str(source))[0].to(torch.bfloat16).state_dict()
        assert same(trained, finished)
    if not rank:
        assert {value.dtype for value in weights(run / "align").values()} == {torch.float32}


def test_alignment_trains_the_projector_alone_and_tuning_leaves_the_tower(whole, small_model):
    def changed(before, after):
        return {name.split(".")[1] for name in after if not torch.equal(before[name], after[name])}

    start = weights(small_model)
    assert changed(start, weights(whole / "align")) == {"multi_modal_projector"}
    moved = changed(weights(whole / "align"), weights(whole))
    assert "vision_tower" not in moved and {"multi_modal_projector", "language_model"} <= moved


def test_no_hooks_are_left_after_training_failed(settings, tmp_path, monkeypatch):
    from llavolta.compression import patch

    monkeypatch.setattr(StageTrainer, "compute_loss", lambda self, *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(TrainConfig(output=str(tmp_path / "run"), **settings), progress=False)
    assert not len(patch._active)


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing_over(whole, first, settings, tmp_path, monkeypatch):
    output = shutil.copytree(first, tmp_path / "run")
    before = weights(output)
    loss = StageTrainer.compute_loss
    monkeypatch.setattr(StageTrainer, "compute_loss", lambda self, *a, **k: loss(self, *a, **k) * float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss became nan at step 4 \(stage 2.*Lower learning_rate"):
        train(TrainConfig(output=str(output), stage=2, **settings), progress=False)
    assert same(before, weights(output)) and (output / "checkpoint-3").exists()
    monkeypatch.undo()
    train(TrainConfig(output=str(output), **settings), progress=False)
    assert same(weights(whole), weights(output))


class TestRefusals:
    def test_another_run_in_the_folder(self, whole, settings):
        before = weights(whole)
        with pytest.raises(ConfigError, match=r"another run \(learning_rate 0.0015 -> 0.01"):
            train(TrainConfig(output=str(whole), learning_rate=0.01, **settings), progress=False)
        assert same(before, weights(whole))

    def test_a_folder_with_something_else(self, settings, tmp_path):
        (tmp_path / "thesis.tex").write_text("do not overwrite")
        with pytest.raises(ConfigError, match="not empty"):
            train(TrainConfig(output=str(tmp_path), **settings), progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
        (tmp_path / "config.yaml").write_text("of: something else\n")
        with pytest.raises(ConfigError, match="another run"):
            train(TrainConfig(output=str(tmp_path), **settings), progress=False)
        assert (tmp_path / "config.yaml").read_text() == "of: something else\n"

    def test_a_refused_configuration_does_not_claim_the_folder(self, settings, scenes, tmp_path):
        broken = json.loads((scenes / "train.json").read_text())
        broken[0]["image"] = "images/none.png"
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        short = {**settings, "align_steps": 0, "max_steps": 1, "scheme": ["none"]}
        refused = [
            dict(data=str(tmp_path / "broken.json"), images=str(scenes), max_length=50),
            dict(data=str(tmp_path / "broken.json"), images=str(scenes), max_length=50, bad_entries="skip"),
            dict(stage=0),
        ]
        for change in refused:
            with pytest.raises(ValueError):
                train(TrainConfig(output=str(tmp_path / "run"), **{**short, **change}), progress=False)
        train(TrainConfig(output=str(tmp_path / "run"), **short), progress=False)
        with pytest.raises(ConfigError, match="another run"):
            train(TrainConfig(output=str(tmp_path / "run"), **{**short, "seed": 1}), progress=False)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"scheme": "three-stages"}, "unknown scheme 'three-stages'; choose from single-stage"),
            ({"stage": 4}, r"stage must be 0 .* 3"),
            ({"stage": -1}, "stage must be 0"),
            ({"stage": 0, "align_steps": 0}, "^stage 0 is projector alignment, which align_steps 0 skips"),
            ({"stage": "2"}, "stage must be a valid integer, not '2'"),
            ({"stage": 1, "plan": "9:avgpool:2"}, r"layer 9.*0\.\.3"),
            ({"stage": 1, "plan": "1:avgpool:0"}, "stride must be a whole number of at least 1"),
            ({"stage": 1, "plan": "1:averagepool:2"}, "unknown compressor 'averagepool'"),
            ({"stage": 1, "plan": "avgpool"}, "cannot read 'avgpool'"),
            ({"plan": "1:avgpool:2"}, "say which with stage"),
            ({"epochs": 1.0}, "not both"),
            ({"batch_size": 0}, "batch_size"),
            ({"learning_rate": 0}, "learning_rate must be greater than or equal to 0.000000000001, not 0"),
            ({"learning_rate": "fast"}, "learning_rate must be a valid number, not 'fast'"),
            ({"learning_rate": float("nan")}, "learning_rate must be a finite number, not nan"),
            ({"bf16": 1}, "bf16 must be a valid boolean or 'auto', not 1"),
            ({"scheme": 3}, "scheme must be a valid string or a valid list, not 3"),
            ({"max_steps": 0}, "max_steps must be greater than or equal to 1, not 0"),
            ({"seed": 1.5}, "seed must be a valid integer, not 1.5"),
            ({"seed": True}, "seed must be a valid integer, not True"),
            ({"scheme": [{"plan": "none", "share": 0.5}]}, "sum to 0.5, not to 1"),
            ({"scheme": [{"plan": "none"}]}, "stages must be a list of plans or"),
            ({"model": "./nowhere"}, "nowhere"),
            ({"data": "nowhere.json"}, "no data file"),
            ({"max_steps": 2}, "too few for the 3 stages"),
        ],
    )
    def test_bad_parameters(self, settings, tmp_path, change, match):
        with pytest.raises(ValueError, match=match):
            train(TrainConfig(output=str(tmp_path / "run"), **{**settings, **change}), progress=False)

    def test_engines(self, tmp_path):
        own = tmp_path / "own.json"
        for text, match in (("{", "cannot be read as JSON"), ('{"optimizer": {}}', "sets the optimizer or scheduler")):
            own.write_text(text)
            with pytest.raises(ConfigError, match=match):
                TrainConfig(output="x", deepspeed=str(own))
        with pytest.raises(ConfigError, match="fsdp must be fsdp2 or a JSON file, not 'zero2'"):
            TrainConfig(output="x", fsdp="zero2")
        with pytest.raises(ConfigError, match="both shard the model"):
            TrainConfig(output="x", fsdp="fsdp2", deepspeed="zero2")
        with pytest.raises(ConfigError, match="--nnodes must be one number, not 1:4"):
            launch(TrainConfig(output=str(tmp_path / "run")), 2, "--nnodes 1:4")

    def test_unknown_parameter(self):
        with pytest.raises(ConfigError, match="unknown parameter 'lerning_rate'; known: output"):
            TrainConfig(output="x", lerning_rate=1)

    def test_weights_that_are_missing(self, settings, small_model, tmp_path):
        import shutil

        from safetensors.torch import save_file

        shutil.copytree(small_model, tmp_path / "damaged")
        held = load_file(tmp_path / "damaged" / "model.safetensors")
        held.pop(next(name for name in held if "projector" in name))
        save_file(held, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match="lacks 1 weights"):
            train(TrainConfig(output=str(tmp_path / "r"), **{**settings, "model": str(tmp_path / "damaged")}), False)


def test_the_command_line_does_the_same(whole, settings, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**settings, "output": str(tmp_path / "run")}) + "learning_rate: 15e-4\n")
    assert main([str(file)]) == 0
    assert same(weights(whole), weights(tmp_path / "run"))
    file.write_text("outptu: x\n")
    capsys.readouterr()
    assert main([str(file)]) == 1
    assert capsys.readouterr().err.startswith("error: unknown parameter 'outptu'")


def test_bad_entries_stop_a_run_or_are_left_out_of_it(settings, scenes, tmp_path):
    """A run that skips equals one on a file without the bad entries, bit for bit, also when it is resumed."""
    entries = json.loads((scenes / "train.json").read_text())[:22]
    bad = {3: {"id": "no turns"}, 20: {**entries[0], "image": "images/none.png"}}
    mixed = [bad.get(number) or entries.pop() for number in range(len(entries) + 2)]
    for name, held in (("mixed", mixed), ("clean", [entry for entry in mixed if entry not in bad.values()])):
        (tmp_path / f"{name}.json").write_text(json.dumps(held))
    values = {**settings, "images": str(scenes), "epochs": 1, "batch_size": 8, "align_steps": 0}
    values.pop("max_steps")

    def run(name: str, data: str, **changes):
        config = TrainConfig(
            output=str(tmp_path / name), **{**values, "data": str(tmp_path / f"{data}.json"), **changes}
        )
        return train(config, progress=False)

    with pytest.raises(DataError, match="mixed.json entry 3 has no 'conversations'"):
        run("fail", "mixed")
    clean = run("clean", "clean")
    run("skip", "mixed", bad_entries="skip", stage=1)
    (tmp_path / "mixed.json").write_text(json.dumps([*mixed, {}]))
    with pytest.raises(DataError, match="has 3 bad entries, not the 2 that the run"):
        run("skip", "mixed", bad_entries="skip")
    (tmp_path / "mixed.json").write_text(json.dumps(mixed))
    skipping = run("skip", "mixed", bad_entries="skip")
    assert json.loads((skipping / "skipped.json").read_text()) == [3, 20]
    assert read_metrics(clean / "metrics.jsonl")[-1]["step"] == 3 and same(weights(clean), weights(skipping))


@pytest.mark.parametrize("aligned", [True, False])
def test_entries_that_max_length_makes_unusable_are_known_at_the_start(settings, scenes, tmp_path, aligned, capsys):
    entries = json.loads((scenes / "train.json").read_text())
    long = dict(entries[5], conversations=[dict(turn) for turn in entries[5]["conversations"]])
    long["conversations"][0]["value"] += " is there a 3 ?" * 200
    entries[5] = entries[7] = long
    file = tmp_path / "data.json"
    file.write_text(json.dumps(entries))
    values = {**settings, "data": str(file), "images": str(scenes), "max_length": 300, "align_steps": 0}
    values |= dict(scheme=["none"], max_steps=1)
    if aligned:  # told before the alignment, too
        values |= dict(align_data=str(scenes / "align.json"), align_steps=1)
    begun = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StageTrainer, "train", lambda *_, **__: begun.append(1))
        with pytest.raises(DataError, match=r"entry 5 .* no answer is left within max_length 300; .* 2 of 48; 'bad_"):
            train(TrainConfig(output=str(tmp_path / "fail"), **values), progress=False)
        assert not begun
    run = train(TrainConfig(output=str(tmp_path / "skip"), bad_entries="skip", **values))
    assert json.loads((run / "skipped.json").read_text()) == [5, 7]
    assert "skipping 2 bad of 48 entries" in capsys.readouterr().out


def test_a_run_folder_with_a_damaged_record_is_told_of(settings, tmp_path):
    short = {**settings, "max_steps": 2, "align_steps": 0, "scheme": ["1:avgpool:8", "none"]}
    config = TrainConfig(output=str(tmp_path / "run"), bad_entries="skip", **short)
    run = train(config.changed(stage=1), progress=False)
    good = (run / "config.yaml").read_text()
    for damaged in ("", "{a: [", "- 1", "\0\0\0"):
        (run / "config.yaml").write_text(damaged)
        with pytest.raises(ConfigError, match=r"run/config.yaml (holds no run's parameters|cannot be read)"):
            train(config, progress=False)
    (run / "config.yaml").write_text(good)
    (run / "skipped.json").write_text("[1,")
    with pytest.raises(DataError, match="run/skipped.json cannot be read"):
        train(config, progress=False)
    (run / "skipped.json").unlink()
    train(config, progress=False)


def test_processes_that_do_not_come_up_are_an_error(settings, tmp_path, monkeypatch):
    monkeypatch.setenv(WANTED_PROCESSES, "2")
    with pytest.raises(ConfigError, match="2 processes were asked for, but 1 came up"):
        train(TrainConfig(output=str(tmp_path / "run"), **settings), progress=False)


@pytest.mark.slow
def test_a_bad_picture_met_by_a_worker_of_two_processes_is_named(settings, scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "data")
    entry = json.loads((tmp_path / "data" / "train.json").read_text())[5]
    (tmp_path / "data" / entry["image"]).write_bytes(b"nonsense")
    data = dict(data=str(tmp_path / "data" / "train.json"), align_steps=0, max_steps=30, num_workers=1)
    config = TrainConfig(output=str(tmp_path / "run"), **{**settings, **data})
    told = f"DataError: train.json entry 5 .*{entry['image']}' cannot be read"
    with pytest.raises(RuntimeError, match=told):
        train_together(config)


def test_the_command_line_shows_a_traceback_only_of_programming_errors(tmp_path, monkeypatch, capsys):
    def raising(error):
        def train(config):
            raise error

        return train

    command = ["embedded", "--output", str(tmp_path / "run")]
    for error in (ValueError("boom"), TypeError("boom"), KeyError("boom"), RuntimeError("boom")):
        monkeypatch.setattr("llavolta.train.__main__.train", raising(error))
        with pytest.raises(type(error), match="boom"):
            main(command)
    for error in (ConfigError("boom"), DataError("boom"), FloatingPointError("boom"), FileNotFoundError("boom")):
        monkeypatch.setattr("llavolta.train.__main__.train", raising(error))
        assert main(command) == 1 and capsys.readouterr().err == "error: boom\n"
    file = tmp_path / "latin.yaml"
    file.write_bytes("output: é".encode("latin-1"))
    assert main([str(file)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file} is not UTF-8") and said.count("\n") == 1
    for change in ("stage=1.0", "scheme=nowhere", "plan=2:nothing", "deepspeed=none.json", "scheme=[2:avgpool:x]"):
        assert main([*command, "--set", change]) == 1, change
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1


def test_a_path_may_begin_with_the_home_folder(settings, scenes, small_model, tmp_path, monkeypatch):
    """It is trained where it is asked to be, once, and no folder is called ~."""
    for name, target in (("data", scenes), ("model", small_model)):
        (tmp_path / name).symlink_to(target)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    short = {**settings, "align_steps": 0, "max_steps": 3}
    home = dict(model="~/model", data="~/data/train.json", images="~/data", align_data=None)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**short, **home, "output": "~/runs/x"}))
    assert main(["~/run.yaml"]) == 0
    assert (tmp_path / "runs/x/scheme.json").exists() and not (tmp_path / "~").exists()
    monkeypatch.setattr(StageTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert main([str(file), "--set", "output=~/runs/x"]) == 0


def test_every_path_of_a_configuration_may(tmp_path, monkeypatch):
    (tmp_path / "engine.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = ["output", "model", "vision_tower", "language_model", "data", "images"]
    paths += ["align_data", "align_images"]
    for given in ([*paths, "deepspeed"], [*paths, "fsdp"]):
        config = TrainConfig(**dict.fromkeys(given, "~/engine.json"))
        assert {getattr(config, name) for name in given} == {str(tmp_path / "engine.json")}


def test_a_stage_is_a_whole_number():
    for stage in (1.0, "1", True):
        with pytest.raises(ConfigError, match="stage must be a valid integer, not"):
            TrainConfig(output="x", stage=stage)
