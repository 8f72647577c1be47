"""StageCallback in a stock Trainer."""

from __future__ import annotations

import pytest
from tiny import ragged_batch, tiny_llava
from transformers import Trainer, TrainingArguments

from llavolta import SCHEMES, Scheme, Stage, StageCallback
from llavolta.compression.families import find_parts
from llavolta.train.schemes import SchemeError


class Rows:
    """Tokens that the last decoder layer saw in each forward pass, and whether it was in training."""

    def __init__(self, model):
        self.seen = []
        find_parts(model).layers[-1].register_forward_hook(
            lambda layer, args, hidden: self.seen.append((layer.training, hidden.shape[1]))
        )


def trainer(model, tmp_path, scheme, **settings):
    example = {key: value[0] for key, value in ragged_batch([[3, 4]]).items()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=2, report_to=[], use_cpu=True, save_strategy="no",
        remove_unused_columns=False, disable_tqdm=True, **settings,
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=[example] * 12, eval_dataset=[example], callbacks=[StageCallback(scheme)]
    )


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


def test_slow_steps_need_the_trainer_of_the_package(tmp_path):
    with pytest.raises(SchemeError, match="trains a mode isolator; train it by python -m llavolta.train"):
        trainer(tiny_llava(), tmp_path, Scheme("d", (Stage("0:random:0.1", 1, slow_every=2),))).train()
