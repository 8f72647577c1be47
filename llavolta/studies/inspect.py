"""One question looked at under one plan: where each token went, what it cost, what was answered."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from llavolta.compression import families, patch
from llavolta.compression.compressors import CompressedTokens, VisualTokens
from llavolta.compression.plan import VISION, format_plan, parse_plan
from llavolta.cost.flops import step_cost
from llavolta.data import LlavaData
from llavolta.errors import UnsupportedModel, UserError
from llavolta.studies import evaluation, opening
from llavolta.train.schemes import plan_compression_ratio

SHOWN = 64  # tokens of an answer that is shown


def _destination(out: CompressedTokens, tokens: VisualTokens) -> Tensor:
    """(I, L) the output token that each input token ended in; -1 for dropped ones and padding."""
    if out.group is not None:
        group = out.group.expand(tokens.mask.shape)
        stays = torch.nn.functional.pad(out.mask, (0, 1)).expand(
            len(group), -1
        )  # a number behind the last is of none
        return group.masked_fill(
            ~tokens.mask | ~stays.gather(1, group.clamp(0, out.mask.shape[1])), -1
        )
    anchor = out.anchor.expand(out.mask.shape)
    number = torch.where(out.mask, torch.arange(anchor.shape[1], device=anchor.device), -1)
    where = torch.full_like(tokens.mask, -1, dtype=torch.long)
    return where.scatter(1, anchor.masked_fill(~out.mask, 0), -1).scatter_reduce(
        1, anchor.clamp(min=0), number, "amax"
    )


@contextmanager
def recording(model, plan) -> Iterator[SimpleNamespace]:
    """``compress(model, plan)`` that notes where tokens go in its first pass, ready when the block ends.

    maps: see ``token_map``. shape: rows and columns of the first picture, None if nothing was removed. counts: by layer
    of the plan, how many tokens were left of how many.
    """
    plan, seen = parse_plan(plan), {}
    record = SimpleNamespace(maps={}, shape=None, counts={})

    def note(layer, tokens: VisualTokens, out: CompressedTokens) -> None:
        if layer not in seen:  # in the first pass
            counts = int(out.mask.sum()), int(tokens.mask.sum())
            seen[layer] = _destination(out, tokens), tuple(tokens.grid[0].tolist()), counts

    with patch.compress(model, plan, observe=note):
        yield record
    where = None
    for layer in (layer for layer in plan if layer in seen):  # what removes nothing is not seen
        step, shape, record.counts[layer] = seen[layer]
        if where is None:
            where, record.shape = step, shape
        elif len(where) != len(step):
            raise opening.StudyError(
                "a plan that works on frames first and on whole clips later cannot be drawn"
            )
        else:
            padded = torch.nn.functional.pad(
                step, (0, 1), value=-1
            )  # what is gone looks up the last column
            where = padded.gather(1, where.masked_fill(where < 0, step.shape[1]))
        record.maps[layer] = where.cpu().numpy()


@torch.no_grad()
def token_map(model, batch, plan) -> dict[int | str, np.ndarray]:
    """{layer: (I, L)} from each compressed layer of ``plan`` on: of each picture of ``batch``, for each of its L visual
    tokens, which token it is in by then, counted from 0; -1 where it was dropped, and at padding.

    Taken from a real forward pass of ``model``, so it is right for compressors that look at content, too. Tokens of
    entries that remove nothing are left out; {} if nothing is removed at all.
    """
    with recording(model, plan) as record:
        families.find_parts(model).base(**batch)
    return record.maps


@dataclass(frozen=True)
class View:
    """What one plan does with one question.

    plan: its text. maps: see ``token_map``. tokens: how many visual tokens each decoder layer worked on. shape: rows
    and columns of the first picture (or frame). visual: visual tokens in all. ratio: the compression ratio, from these
    tokens. flops: those of a training step relative to no compression, at the plan's mean number of tokens; NaN where
    cost.flops.step_cost does not know the model.
    answer: the model's greedy answer. guesses: the five likeliest first tokens of the answer and their probabilities.
    """

    plan: str
    maps: dict[int | str, np.ndarray]
    tokens: list[int]
    ratio: float
    flops: float
    answer: str
    guesses: dict[str, float]
    shape: tuple[int, int]
    visual: int

    def clip(self, frames: int) -> np.ndarray:
        """(frames, rows, columns) of the first clip's map behind the plan's last layer, without class tokens."""
        where, shape = np.arange(self.visual)[None], (math.isqrt(self.visual // frames),) * 2
        if self.maps:
            where, shape = self.maps[list(self.maps)[-1]], self.shape
        if len(where) > 1:  # each frame counts from 0
            where = np.where(
                where < 0, -1, where + np.arange(len(where))[:, None] * where.shape[1]
            )[:frames]
        return where.reshape(frames, -1)[:, -math.prod(shape) :].reshape(frames, *shape)

    def grid(self, layer=None) -> np.ndarray:
        """(rows, columns) of the first picture's map behind ``layer``, by default the plan's last; for plots."""
        if not self.maps:
            return np.arange(math.prod(self.shape)).reshape(self.shape)
        where = self.maps[list(self.maps)[-1] if layer is None else layer][0]
        return where[: math.prod(self.shape)].reshape(self.shape)


def choose(data: LlavaData, number: int) -> tuple[dict, list]:
    """Question ``number`` of ``data`` (see LlavaData.questions), with its ``messages``, and its opened pictures; of a
    clip the first frame alone. Raises StudyError."""
    question = next(
        (one for count, one in enumerate(data.questions()) if count == number), None
    )  # opens none behind
    if question is None:
        raise opening.StudyError(
            f"{data.file.name} has questions 0..{sum(1 for _ in data.questions()) - 1}, not {number!r}"
        )
    messages, looks = evaluation.alone(data[question["index"]], question["turn"])
    if not looks:
        raise opening.StudyError(
            f"question {number} of {data.file.name} has no picture; choose another"
        )
    content = [
        part | {"type": "image"} if part["type"] == "video" else part
        for part in messages[-1]["content"]
    ]
    messages = [*messages[:-1], {**messages[-1], "content": content}]
    images = [look[0] if isinstance(look, list) else look for look in looks]
    return {**question, "messages": messages}, images


def view(
    model,
    processor,
    question: str | list[dict],
    images: list,
    plan: str,
    text_tokens: float = 64,
    max_new_tokens: int = SHOWN,
) -> View:
    """Ask ``question``, a text or messages, about opened ``images``, or clips (lists of frames), under ``plan``.

    text_tokens: of the training example that FLOPs are of. max_new_tokens: of the answer, which ends in an ellipsis
    where it is cut off. Raises PlanError, UnsupportedModel, or a compressor's own
    ValueError.
    """
    parts = families.find_parts(model)
    batch = evaluation.prompts(model, processor, [(question, images)])
    frames = [
        len(look) if isinstance(look, list) else 1 for look in images
    ]  # each counts as an image in FLOPs
    length = batch["input_ids"].shape[1]
    visual = sum(int((batch["input_ids"] == token).sum()) for token in parts.visual_ids.values())
    with opening.answering(model), recording(model, plan) as record:
        out = evaluation.greedy(
            model,
            processor,
            batch,
            max_new_tokens,
            return_dict_in_generate=True,
            output_logits=True,
        )
    said = out.sequences[0, length:]
    ended = not set(evaluation.end_tokens(model, processor)).isdisjoint(said.tolist())
    likeliest = out.logits[0][0].float().softmax(-1).topk(5)
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    guesses: dict[str, float] = {}
    for token, chance in pairs:  # a word with and without a blank before it is one guess
        word = processor.tokenizer.decode([token]).strip() or "(blank)"
        guesses[word] = guesses.get(word, 0.0) + chance
    tokens = _tokens_left(record.counts, len(parts.layers), visual)
    return View(
        plan=format_plan(parse_plan(plan)),
        maps=record.maps,
        tokens=tokens,
        ratio=len(tokens) * visual / sum(tokens) if sum(tokens) else math.inf,
        flops=_relative_flops(families.unwrap(model).config, plan, text_tokens, sum(frames)),
        answer=f"{processor.decode(said, skip_special_tokens=True).strip()}{'' if ended else ' …'}".strip(),
        guesses=guesses,
        shape=record.shape or _square(visual // max(len(images), 1)),
        visual=visual,
    )


def views(
    model,
    processor,
    question: str | list[dict],
    images: list,
    plans: Sequence[str],
    text_tokens: float = 64,
) -> list[View]:
    """``view`` under each of ``plans``; one that this model cannot do is left out, and a printed line says why."""
    seen = []
    for plan in plans:
        try:
            seen.append(view(model, processor, question, images, plan, text_tokens))
        except (UserError, ValueError) as error:
            print(f"{plan} is left out: {error}")
    return seen


def _tokens_left(counts: dict, depth: int, visual: int) -> list[int]:
    """Of ``visual`` tokens, those that each of ``depth`` layers worked on; see ``recording``."""
    tokens = []
    for layer in range(depth):
        for place in (VISION, layer) if layer == 0 else (layer,):
            left, of = counts.get(place, (1, 1))
            visual = round(visual * left / of)
        tokens.append(visual)
    return tokens


def design_table(
    config, layers: Sequence[int], strides: Sequence[int], text_tokens: float = 64
) -> pd.DataFrame:
    """One row per layer K and stride S of average pooling: compression ratio, and training FLOPs relative to none."""
    depth, tokens = config.get_text_config().num_hidden_layers, config.image_seq_length
    rows = []
    for layer in layers:
        for stride in strides:
            plan = f"{layer}:avgpool:{stride}"
            flops = _relative_flops(config, plan, text_tokens)
            rows.append((layer, stride, plan_compression_ratio(plan, depth, tokens), flops))
    return pd.DataFrame(rows, columns=["layer", "stride", "ratio", "flops"])


def _square(count: int) -> tuple[int, int]:
    side = math.isqrt(count)
    return (side, side) if side * side == count else (1, count)


def _relative_flops(config, plan, text_tokens: float, images: int = 1) -> float:
    try:
        return (
            step_cost(config, plan, text_tokens, images).total
            / step_cost(config, "none", text_tokens, images).total
        )
    except UnsupportedModel:  # its tower cuts images into parts of its own
        return math.nan


def views_table(views: Sequence[View]) -> pd.DataFrame:
    """Per view: plan, tokens left in the last layer, compression ratio, FLOPs relative to none, answer."""
    rows = [(view.plan, view.tokens[-1], view.ratio, view.flops, view.answer) for view in views]
    return pd.DataFrame(
        rows, columns=["plan", "tokens left", "ratio", "flops", "answer"]
    ).set_index("plan")
