"""What happens to a run when the machine, the disk or a process fails: nothing is lost but steps since a checkpoint."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText
from two_processes import forks

from llavolta.errors import Stopped, UserError
from llavolta.train import checkpoints
from llavolta.train.checkpoints import SaveError, find_damage
from llavolta.train.config import ConfigError, TrainConfig
from llavolta.train.launch import _cause
from llavolta.train.run import on_signals, train
from llavolta.train.trainer import StageTrainer, read_metrics


@pytest.fixture(autouse=True)
def in_the_foreground():
    """Signals act, also where these tests run in the background, which ignores some."""
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)}
    for one in before:
        signal.signal(one, signal.default_int_handler if one == signal.SIGINT else signal.SIG_DFL)
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.fixture(scope="module")
def settings(scenes, small_model):
    """Parameters of a run of nine steps, three a stage, with a checkpoint after each."""
    return dict(
        model=str(small_model),
        data=str(scenes / "train.json"),
        align_steps=0,
        max_steps=9,
        batch_size=4,
        log_steps=1,
        save_steps=1,
    )


@pytest.fixture(scope="module")
def first(settings, tmp_path_factory):
    """The run up to the end of its first stage, with checkpoints 1 to 3; tests go on from copies."""
    return run(settings, tmp_path_factory.mktemp("first") / "run", stage=1)


def copied(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The run that nothing disturbed."""
    return run(settings, tmp_path_factory.mktemp("whole") / "run")


def run(settings: dict, output: Path, **changes) -> Path:
    return train(TrainConfig(**{**settings, "output": str(output), **changes}), progress=False)


def same(a: Path, b: Path) -> bool:
    held, other = (AutoModelForImageTextToText.from_pretrained(folder).state_dict() for folder in (a, b))
    return held.keys() == other.keys() and all(torch.equal(held[name], other[name]) for name in held)


def steps(folder: Path) -> list[int]:
    return [checkpoints.step_of(path) for path in checkpoints.checkpoints(folder)]


@pytest.mark.slow
def test_random_kills():
    """Some of what ``make stress`` does: SIGKILL at random moments, then bit-equal weights."""
    script, some = Path(__file__).parents[1] / "stress.py", ["--kinds", "ddp", "--kills", "2"]
    out = subprocess.run([sys.executable, str(script), *some], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    assert "equal to the undisturbed one" in out.stdout


def test_old_checkpoints_go_and_ends_of_stages_stay(whole, first, settings, tmp_path):
    assert steps(whole) == [9, 8, 7, 6, 3] and steps(first) == [3, 2, 1]
    assert steps(run(settings, copied(first, tmp_path), keep_checkpoints=1)) == [9, 8, 6, 3]


def test_a_kill_while_an_old_checkpoint_is_removed(whole, first, settings, tmp_path, monkeypatch):
    """The old one is whole or not there, and the next start clears away what is left of it."""
    output, remove = copied(first, tmp_path), shutil.rmtree

    class Killed(BaseException):
        pass

    def killed(path, ignore_errors=False):
        if (Path(path) / checkpoints.SEAL).exists():
            (Path(path) / "model.safetensors").unlink()
            raise Killed
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        run(settings, output, keep_checkpoints=1)
    left = checkpoints.checkpoints(output)
    assert left and [find_damage(folder) for folder in left] == [None] * len(left)
    assert (output / checkpoints.REMOVED).exists()
    monkeypatch.undo()
    assert same(whole, run(settings, output)) and not (output / checkpoints.REMOVED).exists()


DAMAGES = {
    "cut short": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "a missing file": lambda folder: (folder / "trainer_state.json").unlink(),
    "no seal": lambda folder: (folder / checkpoints.SEAL).unlink(),
    "no readable seal": lambda folder: (folder / checkpoints.SEAL).write_text("{"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(first, tmp_path, damage):
    shutil.copytree(first / "checkpoint-3", tmp_path / "checkpoint-3")
    assert find_damage(tmp_path / "checkpoint-3") is None
    DAMAGES[damage](tmp_path / "checkpoint-3")
    assert find_damage(tmp_path / "checkpoint-3")


def test_a_damaged_newest_checkpoint_is_passed_over(whole, settings, tmp_path, capsys):
    output = copied(whole, tmp_path)
    shutil.rmtree(output / "checkpoint-9")
    os.truncate(output / "checkpoint-8" / "optimizer.pt", 1000)
    (output / checkpoints.RECORD).unlink()  # as if it was killed before the model was written
    run(settings, output)
    said = capsys.readouterr().out
    assert "checkpoint-8 is damaged (" in said and "going on from the checkpoint before it" in said
    assert (output / "damaged-checkpoint-8").exists() and find_damage(output / "checkpoint-8") is None
    assert same(whole, output)


def test_a_model_that_was_not_written_whole_is_written_again(whole, settings, tmp_path, monkeypatch):
    output = copied(whole, tmp_path)
    (output / checkpoints.RECORD).unlink()
    os.truncate(output / "model.safetensors", 1000)
    monkeypatch.setattr(StageTrainer, "training_step", lambda *args: pytest.fail("trained again"))
    assert same(whole, run(settings, output))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_signal_saves_then_stops(whole, first, settings, tmp_path, monkeypatch, name):
    step, output, signum = StageTrainer.training_step, copied(first, tmp_path), signal.Signals[name]

    def ended(self, *args):
        if self.state.global_step == 4:
            os.kill(os.getpid(), signum)
        return step(self, *args)

    monkeypatch.setattr(StageTrainer, "training_step", ended)
    handler = signal.getsignal(signum)
    match = f"{name} stopped training after step 5, saved as checkpoint-5"
    with pytest.raises(Stopped, match=match) as raised:
        run(settings, output, save_steps=0)
    assert steps(output) == [5, 3, 2] and signal.getsignal(signum) is handler
    assert raised.value.signum == signum
    if name == "SIGTERM":
        monkeypatch.undo()
        assert same(whole, run(settings, output, save_steps=0))


def interrupted(file: str, log: str) -> None:
    """The command line, interrupted in its fifth step as a terminal does, twice: also what loads its data."""
    from llavolta.train.__main__ import main

    os.setsid()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    step = StageTrainer.training_step

    def interrupted(self, *args):
        if self.state.global_step == 4:
            os.killpg(0, signal.SIGINT)
            os.killpg(0, signal.SIGINT)
        return step(self, *args)

    StageTrainer.training_step = interrupted
    sys.exit(main([file]))


@pytest.mark.slow
def test_ctrl_c_in_a_process_of_its_own(whole, settings, tmp_path):
    file, output, log = tmp_path / "run.yaml", tmp_path / "run", tmp_path / "log"
    settings = {**settings, "save_steps": 0}
    file.write_text(yaml.safe_dump({**settings, "output": str(output), "num_workers": 1}))
    child = forks().Process(target=interrupted, args=(str(file), str(log)))
    child.start()
    child.join()
    told = log.read_text()
    assert child.exitcode == 128 + signal.SIGINT, told[-3000:]
    last = told.strip().splitlines()[-1]
    assert last == "stopped: SIGINT stopped training after step 5, saved as checkpoint-5; run again to go on"
    assert "Traceback" not in told and steps(output) == [5, 3]
    assert same(whole, run(settings, output))


def test_ctrl_c_again_stops_at_once(monkeypatch):
    got = []
    with pytest.raises(KeyboardInterrupt), on_signals(got.append):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same one, sent twice
        os.kill(os.getpid(), signal.SIGTERM)
        assert got == [signal.SIGINT]
        later = time.monotonic() + 2
        monkeypatch.setattr(time, "monotonic", lambda: later)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("went on")


def test_what_is_ignored_stays_so_and_other_threads_receive_nothing(monkeypatch):
    got, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with on_signals(got.append):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    with ThreadPoolExecutor() as pool:
        pool.submit(lambda: on_signals(got.append).__enter__()).result()
    assert not got and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_disk_that_fills_up_while_saving(whole, first, settings, tmp_path):
    """The file system refuses what is longer than a limit, which lies below the size of a checkpoint's optimizer."""
    output = copied(first, tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, ((output / "checkpoint-3" / "optimizer.pt").stat().st_size // 2, limit[1])
    )
    try:
        with pytest.raises(SaveError, match="checkpoint-4 could not be written to .*checkpoint-3 is safe. Make room"):
            run(settings, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert steps(output) == [3, 2, 1] and not (output / checkpoints.STAGING).exists()
    assert find_damage(output / "checkpoint-3") is None and same(output, output / "checkpoint-3")
    assert same(whole, run(settings, output))


def test_what_is_not_the_disks_fault_is_not_blamed_on_it(tmp_path):
    with pytest.raises(RuntimeError, match="Connection reset by peer"), checkpoints.saving(tmp_path, "checkpoint-3"):
        raise RuntimeError("gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    torn = [f"traceback : Signal {signal} received by PID 7\n" for signal in ("15 (SIGTERM)", "9 (SIGKILL)")]
    for lines in (torn, torn[::-1]):
        assert _cause(lines) == "Signal 9 (SIGKILL) received by PID 7"
    assert _cause(["\r 50%] error: no data file x\n", *torn]) == "no data file x"
    assert _cause(["[rank0]: ValueError: boom\n", torn[0]]) == "ValueError: boom"  # of a programming error


def test_two_trainings_cannot_share_a_folder(settings, tmp_path, monkeypatch):
    output, step, short = tmp_path / "run", StageTrainer.training_step, {**settings, "scheme": ["none"], "max_steps": 1}

    def second(self, *args):
        written = (output / "config.yaml").read_text()
        for change in ({}, {"log_steps": 7}, {"learning_rate": 1e-5}):  # free to change, or another run
            with pytest.raises(UserError, match=f"another training is at work in {output}"):
                run(short, output, **change)
        assert (output / "config.yaml").read_text() == written
        return step(self, *args)

    monkeypatch.setattr(StageTrainer, "training_step", second)
    run(short, output)
    monkeypatch.undo()
    run(short, output)


@pytest.fixture
def begin():
    """A function: a training in two processes that takes its time, some steps into it."""
    started = []

    def begin(settings: dict, output: Path) -> subprocess.Popen:
        values = {**settings, "output": str(output), "max_steps": 3000}
        file = output.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(values))
        command = [sys.executable, "-m", "llavolta.train", str(file), "--num-processes", "2"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        started.append(child)
        while len(read_metrics(output / "metrics.jsonl")) < 3:
            assert child.poll() is None, child.stdout.read()[-3000:]
            time.sleep(0.1)
        return child

    yield begin
    for child in started:
        if child.poll() is None:
            for process in (*psutil.Process(child.pid).children(recursive=True), child):
                process.kill()
            child.wait()


def workers(of: int) -> list[int]:
    """The processes that torchrun, a child of process ``of``, has started."""

    def children(process: int) -> list[int]:
        return [int(text) for text in Path(f"/proc/{process}/task/{process}/children").read_text().split()]

    [torchrun] = children(of)
    return children(torchrun)


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others_with_its_error(begin, settings, tmp_path):
    child = begin(settings, tmp_path / "run")
    ranks = workers(child.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    said = child.communicate(timeout=120)[0]
    assert child.returncode == 1
    assert f"error: training in 2 processes failed: Signal 9 (SIGKILL) received by PID {ranks[1]}" in said
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    newest = checkpoints.newest(tmp_path / "run", lambda text: pytest.fail(text))
    assert checkpoints.step_of(newest) >= 2


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_after_one_checkpoint(begin, settings, tmp_path):
    child = begin({**settings, "save_steps": 0}, tmp_path / "run")
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=120)[0]
    assert child.returncode == 128 + signal.SIGINT, said[-3000:]
    [saved] = checkpoints.checkpoints(tmp_path / "run")
    assert f"stopped: SIGINT stopped training after step {checkpoints.step_of(saved)}, saved as {saved.name}" in said
    assert find_damage(saved) is None


def test_another_number_of_examples_a_step_is_refused(first, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(StageTrainer, "examples_per_step", 8)  # as in two processes
    with pytest.raises(ConfigError, match="was trained on 4 examples a step in 1 processes, this run has 8 in"):
        run(settings, copied(first, tmp_path))
