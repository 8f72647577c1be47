"""Accuracy of a model on questions about pictures, per question type, beside the best constant answer."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from llavolta.data import LlavaData
from llavolta.patch import compress


def _normal(text: str) -> str:
    return " ".join(text.strip().rstrip(".").lower().split())


@torch.no_grad()
def answer(model, processor, data: LlavaData, questions: list[dict], max_new_tokens: int = 4) -> list[str]:
    """The model's greedy answers to ``questions`` (see LlavaData.questions), asked one by one, in one batch."""
    texts, images = [], []
    for question in questions:
        example = data[question["index"]]
        content = [{"type": "image"}] * len(example.images) + [{"type": "text", "text": question["question"]}]
        message = [{"role": "user", "content": content}]
        texts.append(processor.apply_chat_template(message, add_generation_prompt=True))
        images += example.images
    batch = processor(text=texts, images=images or None, padding=True, padding_side="left", return_tensors="pt")
    batch = batch.to(model.device)
    tokenizer = processor.tokenizer
    ids = model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(
    model,
    processor,
    data: LlavaData,
    plan: str = "none",
    limit: int | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> pd.DataFrame:
    """One row per question: index, type, question, answer, prediction, correct (exact match, case ignored).

    plan: compression in force while answering. limit: the first so many questions.
    """
    questions = list(data.questions())[:limit]
    training = model.training
    model.eval()
    predictions: list[str] = []
    with compress(model, plan):
        for start in tqdm(range(0, len(questions), batch_size), desc="answering", disable=not progress, leave=False):
            predictions += answer(model, processor, data, questions[start : start + batch_size])
    model.train(training)
    frame = pd.DataFrame(questions).assign(prediction=predictions)
    pairs = zip(frame.answer, frame.prediction, strict=True)
    return frame.assign(correct=[_normal(truth) == _normal(guess) for truth, guess in pairs])


def interval(correct: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of the mean of ``correct`` (n,)."""
    correct = np.asarray(correct, dtype=float)
    sample = np.random.default_rng(seed).integers(0, len(correct), (draws, len(correct)))
    low, high = np.quantile(correct[sample].mean(1), [0.025, 0.975])
    return float(low), float(high)


def accuracy_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Per question type, and over all: questions, accuracy, its 95% interval (low, high), best constant answer.

    ``constant`` is the accuracy of giving every question of a type that type's most frequent answer.
    """
    best = frame.groupby("type")["answer"].transform(lambda answers: answers.mode()[0])
    frame = frame.assign(constant=frame.answer == best)
    rows = []
    for kind, part in [*frame.groupby("type"), ("overall", frame)]:
        low, high = interval(part.correct)
        row = dict(type=kind, questions=len(part), accuracy=part.correct.mean(), low=low, high=high)
        rows.append({**row, "constant": part.constant.mean()})
    return pd.DataFrame(rows).set_index("type")
