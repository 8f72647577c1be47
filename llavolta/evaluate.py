"""Accuracy of a model on questions about pictures, per question type, beside the best constant answer."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from llavolta.data import LlavaData
from llavolta.patch import compress


def _normal(text: str) -> str:
    return " ".join(text.strip().rstrip(".").lower().split())


def render(processor, question: str, images: int, videos: int = 0) -> str:
    """The prompt that asks ``question`` about so many pictures and clips, by the processor's chat template."""
    content = [{"type": "image"}] * images + [{"type": "video"}] * videos + [{"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def prompts(model, processor, asked: list[tuple[str, list]], padding_side: str = "left"):
    """A batch for ``model`` from pairs of a question and its opened pictures; a list of frames is a clip."""
    clips = [[look for look in looks if isinstance(look, list)] for _, looks in asked]
    images = [[look for look in looks if not isinstance(look, list)] for _, looks in asked]
    texts = [
        render(processor, question, len(pictures), len(videos))
        for (question, _), pictures, videos in zip(asked, images, clips, strict=True)
    ]
    visual = {"images": sum(images, []) or None} | ({"videos": sum(clips, [])} if any(clips) else {})
    batch = processor(text=texts, **visual, padding=True, padding_side=padding_side, return_tensors="pt")
    return batch.to(model.device, model.dtype)


@torch.no_grad()
def greedy(model, processor, batch, max_new_tokens: int = 4, **options):
    """What ``model.generate`` returns for a batch padded on the left, decoding greedily; options go to generate."""
    tokenizer = processor.tokenizer
    return model.generate(
        **batch,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **options,
    )


def answer(model, processor, batch, max_new_tokens: int = 4) -> list[str]:
    """The model's greedy answers to a batch of ``prompts``."""
    ids = greedy(model, processor, batch, max_new_tokens)
    return processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def pictured(data: LlavaData, questions: list[dict]) -> list[tuple[str, list]]:
    """Each of ``questions`` (see LlavaData.questions) with its opened pictures and clips."""
    return [(question["question"], data[question["index"]].looks) for question in questions]


def is_right(prediction: str, truth: str) -> bool:
    """Exact match but for case, blanks and a full stop."""
    return _normal(prediction) == _normal(truth)


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
    questions = list(islice(data.questions(), limit))
    training = model.training
    model.eval()
    predictions: list[str] = []
    with compress(model, plan):
        for start in tqdm(range(0, len(questions), batch_size), desc="answering", disable=not progress, leave=False):
            asked = pictured(data, questions[start : start + batch_size])
            predictions += answer(model, processor, prompts(model, processor, asked))
    model.train(training)
    frame = pd.DataFrame(questions).assign(prediction=predictions)
    return frame.assign(correct=list(map(is_right, frame.prediction, frame.answer)))


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
