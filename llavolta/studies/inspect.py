"""Show what a plan does with one question: where each token went, the cost, and the answer.

``view`` answers one question and returns a ``View``, which plots and widgets draw. ``token_map``
gives the maps alone. ``design_table`` and ``views_table`` compare plans.
"""

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
from llavolta.errors import ConfigError, UnsupportedModel, UserError
from llavolta.studies import evaluation, opening
from llavolta.train.schemes import plan_compression_ratio

SHOWN = 64  # longest answer to show, in tokens


def _destination(out: CompressedTokens, tokens: VisualTokens) -> Tensor:
    """(I, L) the output token that each input token ended in; -1 for dropped ones and padding."""
    if out.group is not None:
        # The column of False added at the end stands for numbers that name no output token.
        group = out.group.expand(tokens.mask.shape)
        stays = torch.nn.functional.pad(out.mask, (0, 1)).expand(len(group), -1)  # (I, M + 1)
        return group.masked_fill(
            ~tokens.mask | ~stays.gather(1, group.clamp(0, out.mask.shape[1])), -1
        )
    # Without merging, each output token m stands for the one input token at its anchor.
    anchor = out.anchor.expand(out.mask.shape)
    number = torch.where(out.mask, torch.arange(anchor.shape[1], device=anchor.device), -1)
    where = torch.full_like(tokens.mask, -1, dtype=torch.long)
    # (I, M) -> (I, L). "amax" lets a real token win over padding that shares its anchor.
    return where.scatter(1, anchor.masked_fill(~out.mask, 0), -1).scatter_reduce(
        1, anchor.clamp(min=0), number, "amax"
    )


@contextmanager
def recording(model, plan) -> Iterator[SimpleNamespace]:
    """Compress a model, and record where visual tokens go in its first forward pass.

    Args:
        model: A supported vision-language model.
        plan: The plan in force within the block, as text or parsed.

    Yields:
        A record that is filled when the block ends. maps: see ``token_map``. shape: rows and
        columns of the first image, None if nothing was removed. counts: by layer of the plan, the
        number of visual tokens after and before it.

    Raises:
        ConfigError: The plan compresses frames at one layer and whole clips at a later one.
    """
    plan, seen = parse_plan(plan), {}
    record = SimpleNamespace(maps={}, shape=None, counts={})

    def note(layer, tokens: VisualTokens, out: CompressedTokens) -> None:
        if layer not in seen:  # only the first pass has the whole prompt
            counts = int(out.mask.sum()), int(tokens.mask.sum())
            seen[layer] = _destination(out, tokens), tuple(tokens.grid[0].tolist()), counts

    with patch.compress(model, plan, observe=note):
        yield record
    # Chain the steps: (I, L) of one layer, looked up in the next, gives the map so far.
    where = None
    for layer in (layer for layer in plan if layer in seen):  # no-op entries are not observed
        step, shape, record.counts[layer] = seen[layer]
        if where is None:
            where, record.shape = step, shape
        elif len(where) != len(step):
            raise ConfigError(
                "a plan that works on frames first and on whole clips later cannot be drawn"
            )
        else:
            # The extra column of -1 is where dropped tokens look up: they stay dropped.
            padded = torch.nn.functional.pad(step, (0, 1), value=-1)  # (I, L) -> (I, L + 1)
            where = padded.gather(1, where.masked_fill(where < 0, step.shape[1]))
        record.maps[layer] = where.cpu().numpy()


@torch.no_grad()
def token_map(model, batch, plan) -> dict[int | str, np.ndarray]:
    """Map each visual token to the token that it is part of, after each layer of a plan.

    The maps come from a forward pass of the model, so they hold for compressors that depend on
    content as well.

    Args:
        model: A supported vision-language model.
        batch: A batch of the model's processor.
        plan: The plan, as text or parsed.

    Returns:
        By layer of the plan, (I, L) for I images (tiles or frames) of L tokens: the number of the
        token from 0, or -1 for dropped tokens and padding. Entries that remove nothing are left
        out.

    Raises:
        ConfigError: The plan compresses frames at one layer and whole clips at a later one.
    """
    with recording(model, plan) as record:
        families.find_parts(model).base(**batch)
    return record.maps


@dataclass(frozen=True)
class View:
    """What one plan does with one question.

    Attributes:
        plan: The plan's text.
        maps: The token maps; see ``token_map``.
        tokens: (N,) visual tokens that each decoder layer processed.
        ratio: The compression ratio, from ``tokens`` and ``visual``.
        flops: FLOPs of a training step relative to no compression, at the plan's mean number of
            tokens. NaN if ``cost.flops.step_cost`` does not support the model.
        answer: The model's greedy answer. An ellipsis at the end marks a truncated one.
        guesses: The five most likely first tokens of the answer, with their probabilities. Tokens
            that differ by blanks only are added up.
        shape: Rows and columns of the first image or frame.
        visual: Visual tokens of the prompt without compression.
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
        """Return the first clip's token map after the plan's last layer, without class tokens.

        Args:
            frames: Frames of the clip.

        Returns:
            (frames, rows, columns) the number of each patch's token; -1 if dropped.
        """
        # Without a map, every token is its own: (1, T), in square frames.
        where, shape = np.arange(self.visual)[None], (math.isqrt(self.visual // frames),) * 2
        if self.maps:
            where, shape = self.maps[list(self.maps)[-1]], self.shape
        if len(where) > 1:  # each frame counts from 0; (F, L) with numbers of its own per frame
            where = np.where(
                where < 0, -1, where + np.arange(len(where))[:, None] * where.shape[1]
            )[:frames]
        # A class token stands before the patches of its frame: (F, 1 + R C) -> (F, R, C)
        return where.reshape(frames, -1)[:, -math.prod(shape) :].reshape(frames, *shape)

    def grid(self, layer=None) -> np.ndarray:
        """Return the first image's token map after ``layer``, by default the plan's last.

        Returns:
            (rows, columns) the number of each patch's token; -1 if dropped.
        """
        if not self.maps:
            return np.arange(math.prod(self.shape)).reshape(self.shape)
        where = self.maps[list(self.maps)[-1] if layer is None else layer][0]
        return where[: math.prod(self.shape)].reshape(self.shape)


def choose(data: LlavaData, number: int) -> tuple[dict, list]:
    """Choose one question of a data set.

    Args:
        data: The questions.
        number: The question's number in ``data.questions()``, from 0.

    Returns:
        The question with its ``messages``, and its opened images. A clip is replaced by its first
        frame.

    Raises:
        ConfigError: There is no such question, or it has no image.
    """
    # A generator, so that no entry after the question is opened.
    question = next((one for count, one in enumerate(data.questions()) if count == number), None)
    if question is None:
        raise ConfigError(
            f"{data.file.name} has questions 0..{sum(1 for _ in data.questions()) - 1}, "
            f"not {number!r}"
        )
    messages, looks = evaluation.alone(data[question["index"]], question["turn"])
    if not looks:
        raise ConfigError(f"question {number} of {data.file.name} has no picture; choose another")
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
    """Ask one question under a plan.

    Args:
        model: A supported vision-language model.
        processor: The model's processor.
        question: A text, or messages in transformers' chat format.
        images: Opened images, and clips as lists of frames.
        plan: The plan's text.
        text_tokens: Text tokens of the training example for which FLOPs are given.
        max_new_tokens: Tokens of the answer at most.

    Returns:
        Where each token went, the cost, and the answer.

    Raises:
        PlanError: The plan cannot be read or does not fit the model.
        UnsupportedModel: The model cannot be compressed under this plan.
        ConfigError: The plan compresses frames at one layer and whole clips at a later one.
        ValueError: A compressor cannot work on these images.
    """
    parts = families.find_parts(model)
    batch = evaluation.prompts(model, processor, [(question, images)])
    # In FLOPs every frame counts as an image.
    frames = [len(look) if isinstance(look, list) else 1 for look in images]
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
    for token, chance in pairs:  # add up a word with and without a blank before it
        word = processor.tokenizer.decode([token]).strip() or "(blank)"
        guesses[word] = guesses.get(word, 0.0) + chance
    tokens = _tokens_left(record.counts, len(parts.layers), visual)
    return View(
        plan=format_plan(parse_plan(plan)),
        maps=record.maps,
        tokens=tokens,
        ratio=len(tokens) * visual / sum(tokens) if sum(tokens) else math.inf,
        flops=_relative_flops(families.unwrap(model).config, plan, text_tokens, sum(frames)),
        answer=(
            f"{processor.decode(said, skip_special_tokens=True).strip()}{'' if ended else ' …'}"
        ).strip(),
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
    """Ask one question under several plans; see ``view``.

    A plan that the model does not support is left out, and a printed line says why.
    """
    seen = []
    for plan in plans:
        try:
            seen.append(view(model, processor, question, images, plan, text_tokens))
        except (UserError, ValueError) as error:
            print(f"{plan} is left out: {error}")
    return seen


def _tokens_left(counts: dict, depth: int, visual: int) -> list[int]:
    """(N,) visual tokens that each of ``depth`` layers processed; counts: see ``recording``."""
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
    """Compare average pooling at several layers K with several strides S.

    Args:
        config: The model's configuration.
        layers: Decoder layers K.
        strides: Strides S.
        text_tokens: Text tokens of the training example for which FLOPs are given.

    Returns:
        One row per layer and stride: layer, stride, ratio (the compression ratio), and flops (of a
        training step, relative to no compression).
    """
    depth, tokens = config.get_text_config().num_hidden_layers, config.image_seq_length
    rows = []
    for layer in layers:
        for stride in strides:
            plan = f"{layer}:avgpool:{stride}"
            flops = _relative_flops(config, plan, text_tokens)
            rows.append((layer, stride, plan_compression_ratio(plan, depth, tokens), flops))
    return pd.DataFrame(rows, columns=["layer", "stride", "ratio", "flops"])


def _square(count: int) -> tuple[int, int]:
    """Rows and columns of ``count`` tokens: a square, or one row if they do not form one."""
    side = math.isqrt(count)
    return (side, side) if side * side == count else (1, count)


def _relative_flops(config, plan, text_tokens: float, images: int = 1) -> float:
    """FLOPs of a training step relative to no compression; NaN where they are not known."""
    try:
        return (
            step_cost(config, plan, text_tokens, images).total
            / step_cost(config, "none", text_tokens, images).total
        )
    except UnsupportedModel:  # such as a model that cuts images into tiles
        return math.nan


def views_table(views: Sequence[View]) -> pd.DataFrame:
    """Summarise views in a table.

    Returns:
        One row per view, indexed by plan: tokens left (in the last layer), ratio (the compression
        ratio), flops (relative to no compression), answer.
    """
    rows = [(view.plan, view.tokens[-1], view.ratio, view.flops, view.answer) for view in views]
    return pd.DataFrame(
        rows, columns=["plan", "tokens left", "ratio", "flops", "answer"]
    ).set_index("plan")
