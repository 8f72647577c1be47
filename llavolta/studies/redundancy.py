"""Reproduce the paper's two studies of visual redundancy (LLaVolta, arXiv 2406.20092, section 3).

Study 1: accuracy by the share of visual tokens left, layer and stride (``redundancy_sweep``).
Study 2: the answer position's attention to visual tokens, by layer (``answer_attention``).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm

from llavolta.compression import families, masks, patch, probe
from llavolta.compression.plan import check_layers, parse_plan
from llavolta.data import Collator, LlavaData, chat
from llavolta.errors import ConfigError
from llavolta.paths import PUBLISHED
from llavolta.studies import evaluation, opening, statistics

# Version of the saved answers. Raise it when a change of the code makes older ones invalid.
WAY = 1
KINDS = ("visual", "system and prompt", "question")


# --- study 1: accuracy against the share of visual tokens kept ---


def redundancy_sweep(
    model,
    processor,
    data: LlavaData,
    layers: Sequence[int],
    strides: Sequence[int],
    limit: int | None = None,
    cache: str | Path | None = None,
    batch_size: int = 64,
    progress: bool = True,
    max_new_tokens: int | None = None,
) -> pd.DataFrame:
    """Answer questions with average pooling at each layer K and stride S, at test time (study 1).

    The images and the layers before K are computed once per batch, for all strides and all later
    layers. The answers equal those of ``evaluate`` under "K:avgpool:S".

    Args:
        model: A supported vision-language model.
        processor: The model's processor.
        data: The questions.
        layers: Decoder layers K.
        strides: Strides S. Stride 1 is the model without compression, at every layer.
        limit: Number of questions to ask, from the first; None: all.
        cache: Folder for saved answers. Each point of the sweep has a JSON file there, which is
            updated after each batch, so that an interrupted sweep continues. Its subfolder is
            named by a digest of the weights, the processor, the questions, the images, the limit
            of tokens, WAY, and the versions of torch and transformers.
        batch_size: Questions in a batch.
        progress: Show a progress bar.
        max_new_tokens: See ``evaluation.evaluate``.

    Returns:
        One row per point and question: layer, stride, kept (the share of an image's visual tokens
        that layer K and the later ones process), question (its number from 0), type, answer,
        prediction, correct.

    Raises:
        ConfigError: No layer, no stride, or ``limit`` below 1.
        PlanError: A layer that the model does not have, or a stride below 1.
        DataError: The tokenizer does not know the words, or an image cannot be read.
    """
    if not layers or not strides or limit is not None and limit < 1:
        raise ConfigError("a sweep needs at least one layer, one stride and one question")
    depth = len(families.find_parts(model).layers)
    points = {(layer, stride): _plan(layer, stride) for layer in layers for stride in strides}
    for layer, stride in points:
        check_layers(parse_plan(f"{layer}:avgpool:{stride}"), depth)
    questions = list(islice(data.questions(), limit))
    # Several points have the plan "none", which is answered once.
    plans = sorted(
        set(points.values()), key=lambda plan: (min(parse_plan(plan), default=depth), plan)
    )
    evaluation.check_questions(processor, questions, data)
    length = evaluation.answer_limit(
        processor, (question["answer"] for question in questions), max_new_tokens
    )
    folder = (
        Path(cache) / _fingerprint(model, processor, data, questions, length) if cache else None
    )
    answers = {plan: _read_point(folder, plan) for plan in plans}

    def missing(plan: str, start: int) -> bool:
        return any(number not in answers[plan] for number in batches[start])

    batches = {
        s: range(s, min(s + batch_size, len(questions)))
        for s in range(0, len(questions), batch_size)
    }
    # Points that saved answers do not cover, by batch.
    todo = [(start, [plan for plan in plans if missing(plan, start)]) for start in batches]
    total = sum(len(rest) for _, rest in todo)
    with (
        opening.answering(model),
        tqdm(total=total, desc="sweep", disable=not progress, leave=False) as bar,
    ):
        for start, rest in todo:
            if not rest:
                continue
            # Images are opened once per batch, for all points that still lack an answer.
            asked = evaluation.pictured(data, [questions[number] for number in batches[start]])
            for plan, said in _answers_by_plan(model, processor, asked, rest, length):
                answers[plan] |= dict(zip(batches[start], said, strict=True))
                _write_point(folder, plan, answers[plan])
                bar.set_postfix_str(plan)
                bar.update()
    frames = [
        _point_frame(questions, answers[plan]).assign(
            layer=layer, stride=stride, kept=_kept(model, stride)
        )
        for (layer, stride), plan in points.items()
    ]
    columns = ["layer", "stride", "kept", "question", "type", "answer", "prediction", "correct"]
    return pd.concat(frames, ignore_index=True)[columns]


def _plan(layer: int, stride: int) -> str:
    return "none" if stride == 1 else f"{layer}:avgpool:{stride}"


def _point_frame(questions: list[dict], answers: dict[int, str]) -> pd.DataFrame:
    frame = pd.DataFrame(questions)[["type", "answer"]]
    frame["question"] = range(len(frame))
    frame["prediction"] = [answers[number] for number in frame.question]
    return frame.assign(correct=list(map(evaluation.is_right, frame.prediction, frame.answer)))


def _kept(model, stride: int) -> float:
    """The share of an image's visual tokens that pooling leaves.

    It is 1 / stride where the number of tokens varies, which neglects a shorter last window.
    """
    tokens = getattr(families.unwrap(model).config, "image_seq_length", None)
    return math.ceil(tokens / stride) / tokens if tokens else 1 / stride


def _answers_by_plan(
    model, processor, asked, plans: list[str], max_new_tokens: int
) -> Iterator[tuple[str, list[str]]]:
    """Yield (plan, answers) for one batch, in the order of ``plans``."""
    batch = evaluation.prompts(model, processor, asked)
    # The images are encoded once: every plan gets the encoder's output in place of pixels.
    with torch.no_grad():
        batch = families.encode_pictures(families.find_parts(model).base, (), dict(batch))
    with shared_layers(model) as shared:
        for plan in plans:
            shared.below = min(parse_plan(plan), default=shared.depth)
            with patch.compress(model, plan):
                yield plan, evaluation.answer(model, processor, batch, max_new_tokens)[0]


@contextmanager
def shared_layers(model) -> Iterator[SimpleNamespace]:
    """Compute the prefill of a batch only once in the decoder layers before a plan's first layer.

    This is for several generations on one batch under different plans. Layers before a plan's
    first layer compute the same as in the stock model, so their outputs and caches are saved and
    used again. Passes with tokens in the cache are computed as usual.

    Args:
        model: A supported vision-language model.

    Yields:
        A namespace. below: set it to the first layer of the plan before each generation. depth:
        the number of decoder layers.
    """
    modules = families.find_parts(model).layers
    shared = SimpleNamespace(below=0, depth=len(modules))
    memory: dict[int, tuple] = {}

    def once(number: int, forward):
        def recall(*args, **kwargs):
            cache = kwargs.get("past_key_values")
            # The plan works here or before, or this is no prefill: compute as usual.
            if number >= shared.below or cache is None or cache.get_seq_length(number):
                return forward(*args, **kwargs)
            if number not in memory:
                output = forward(*args, **kwargs)
                # A shallow copy does: the cache replaces its tensors on update.
                memory[number] = (output, copy.copy(cache.layers[number]))
            output, held = memory[number]
            cache.layers[number : number + 1] = [copy.copy(held)]
            return output

        return recall

    # A module may have a forward of its own, such as accelerate's of a model on several devices.
    own = [vars(module).get("forward") for module in modules]
    for number, module in enumerate(modules):
        module.forward = once(number, module.forward)
    try:
        yield shared
    finally:
        for module, forward in zip(modules, own, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _fingerprint(
    model, processor, data: LlavaData, questions: list[dict], max_new_tokens: int
) -> str:
    """A digest of everything that the answers depend on."""
    digest = hashlib.blake2b(digest_size=12)
    for name, weight in families.unwrap(model).state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        # As bytes, because numpy has no bfloat16.
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    digest.update(processor.to_json_string().encode())
    digest.update(
        json.dumps(
            [processor.tokenizer.get_vocab(), processor.chat_template], sort_keys=True
        ).encode()
    )
    digest.update(evaluation.asked_digest(data, questions))
    digest.update(f"{max_new_tokens} {WAY} {torch.__version__} {transformers.__version__}".encode())
    return digest.hexdigest()


def _point_file(folder: Path, plan: str) -> Path:
    return folder / f"{plan.replace(':', '-')}.json"


def _read_point(folder: Path | None, plan: str) -> dict[int, str]:
    if folder is None or not (file := _point_file(folder, plan)).exists():
        return {}
    try:
        return {int(number): str(said) for number, said in json.loads(file.read_text()).items()}
    except (ValueError, AttributeError):  # a damaged file: its questions are answered again
        return {}


def _write_point(folder: Path | None, plan: str, answers: dict[int, str]) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = _point_file(folder, plan).with_suffix(f".part{os.getpid()}")
    part.write_text(json.dumps(answers))
    part.replace(_point_file(folder, plan))  # atomic: an interruption leaves no partial file


def sweep_table(sweep: pd.DataFrame) -> pd.DataFrame:
    """Measure the accuracy per layer, stride and question type.

    Args:
        sweep: From ``redundancy_sweep``.

    Returns:
        One row each: layer, stride, type ("overall" among them), questions, accuracy, its 95%
        bootstrap interval (low, high), and kept.
    """
    points = sweep.drop_duplicates(["layer", "stride"])[["layer", "stride", "kept"]]
    table = statistics.accuracy_table(sweep.drop(columns="answer"), by=("layer", "stride"))
    return table.merge(points, how="left", on=["layer", "stride"]).sort_values(
        ["type", "layer", "stride"]
    )


def accuracy_lost(sweep: pd.DataFrame, removed: float = 0.7) -> pd.DataFrame:
    """Measure the accuracy lost at each layer when a given share of visual tokens is removed.

    Each question's result is interpolated linearly between the two nearest strides, by the share
    of tokens left.

    Args:
        sweep: From ``redundancy_sweep``, with stride 1.
        removed: The share of visual tokens removed (0 to 1).

    Returns:
        One row per layer: full and compressed (accuracies, 0 to 1), lost (their difference), and
        its 95% interval (low, high), by bootstrap over the paired questions.

    Raises:
        ConfigError: The strides do not reach from no compression to that share.
    """
    rows = []
    for layer, part in sweep.groupby("layer"):
        grid = part.pivot_table(
            index="question", columns="kept", values="correct", aggfunc="first"
        ).astype(float)
        kept = grid.columns.to_numpy()  # shares of tokens left, rising
        if kept[0] > 1 - removed or kept[-1] < 1:
            raise ConfigError(
                f"strides {sorted(set(part.stride))} do not reach from 1 to {removed:.0%} "
                "of the tokens removed"
            )
        # The two measured shares around 1 - removed, and the weight of the upper one.
        upper = int(np.searchsorted(kept, 1 - removed))
        lower = max(upper - 1, 0)
        weight = (
            1.0 if upper == lower else (1 - removed - kept[lower]) / (kept[upper] - kept[lower])
        )
        less = weight * grid[kept[upper]] + (1 - weight) * grid[kept[lower]]
        lost = grid[1.0] - less
        low, high = statistics.interval(lost)
        rows.append(
            dict(
                layer=layer,
                full=grid[1.0].mean(),
                compressed=less.mean(),
                lost=lost.mean(),
                low=low,
                high=high,
            )
        )
    return pd.DataFrame(rows).set_index("layer")


def removable(sweep: pd.DataFrame, lost: float = 0.03) -> pd.Series:
    """Find the share of visual tokens that each layer can lose before accuracy falls too far.

    Args:
        sweep: From ``redundancy_sweep``, with stride 1.
        lost: The tolerated fall of accuracy (0 to 1).

    Returns:
        By layer, the share removed (0 to 1), interpolated linearly between strides. If accuracy
        never falls that far, it is the largest share of the sweep.
    """
    shares = {}
    for layer, part in sweep.groupby("layer"):
        mean = part.groupby("kept").correct.mean().sort_index(ascending=False)
        # Above 0 where accuracy has fallen by more than ``lost``; from all tokens to the fewest.
        fallen = mean.iloc[0] - mean.to_numpy() - lost
        first = int(np.argmax(fallen > 0)) if (fallen > 0).any() else None
        if first is None:
            shares[layer] = 1 - mean.index[-1]
        else:
            between = np.interp(0, fallen[first - 1 : first + 1], mean.index[first - 1 : first + 1])
            shares[layer] = 1 - between
    return pd.Series(shares, name="removable").rename_axis("layer")


def published_reading() -> dict[str, float]:
    """Read the paper's main result of study 1.

    Returns:
        "removed": the share of visual tokens removed at test time. "lost": the accuracy lost on
        GQA. Both from 0 to 1.
    """
    table = (
        pd.read_csv(PUBLISHED)
        .query("claim == 'redundancy'")
        .set_index("quantity")
        .value.astype(float)
        / 100
    )
    return {
        "removed": table["visual tokens removed at test time"],
        "lost": table["accuracy lost on GQA"],
    }


def headline(sweep: pd.DataFrame) -> str:
    """Summarise study 1 in Markdown.

    Args:
        sweep: From ``redundancy_sweep``, with stride 1.

    Returns:
        Per layer, the accuracy lost when the published share of tokens is removed.

    Raises:
        ConfigError: The strides do not reach the published share.
    """
    paper = published_reading()
    lost, room = accuracy_lost(sweep, paper["removed"]), removable(sweep, paper["lost"])
    lines = [
        f"With {paper['removed']:.0%} of the visual tokens pooled away at test time, "
        "accuracy changes"
    ]
    for layer, row in lost.iterrows():
        change, low, high = (statistics.points(-share) for share in (row.lost, row.high, row.low))
        lines.append(
            f"- at layer {layer}: from {row.full:.1%} to {row.compressed:.1%}, "
            f"**{change} points** (95% interval {low} to {high}); "
            f"{room[layer]:.0%} can go before {100 * paper['lost']:.0f} points are lost"
        )
    published = (
        f"Published, LLaVA-1.5-7B on GQA: {paper['removed']:.0%} pooled away, "
        f"{-100 * paper['lost']:+.0f}%."
    )
    return "\n".join(lines) + f"\n\n{published}"


# --- study 2: where the answer's attention goes ---


@torch.no_grad()
def attention_shares(model, batch, query: Tensor, kinds: Tensor) -> Tensor:
    """Measure the share of one token's attention that goes to each kind of token, per layer.

    One row of attention is computed per layer and example, from the layer's own norm, projections
    and rotary embeddings. The model itself runs with any attention implementation.

    Args:
        model: A supported vision-language model.
        batch: A batch of B examples with T tokens, padded on the right.
        query: (B,) the column of the token whose attention is measured.
        kinds: (B, T) the kind of each token, from 0 to G - 1.

    Returns:
        (N, B, G) shares for N decoder layers, the mean over heads, in float32.

    Raises:
        UnsupportedModel: A layer's attention cannot be computed from outside; see ``probe``.
    """
    parts = families.find_parts(model)
    valid = batch["attention_mask"].bool()
    groups = torch.nn.functional.one_hot(kinds).float()  # (B, T, G)
    column = torch.arange(valid.shape[1], device=valid.device)
    shares: list[Tensor] = []

    def look(layer, args, kwargs):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        at = probe.LayerInput(layer, hidden, kwargs["position_embeddings"])
        window = getattr(
            layer.self_attn, "sliding_window", masks.sliding_window(parts.decoder.config)
        )
        # A layer with a sliding window sees the last ``window`` tokens only: (B, T)
        near = valid if window is None else valid & (column > query[:, None] - window)
        weights = probe.attention_rows(
            at, query[:, None], near, torch.zeros_like(near, dtype=torch.long)
        )  # (B, 1, T)
        shares.append((weights @ groups)[:, 0])  # (B, 1, T) @ (B, T, G) -> (B, G)

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in parts.layers]
    try:
        parts.base(**batch)  # the language-model head is not needed
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(shares)


def answer_attention(
    model,
    processor,
    data: LlavaData,
    limit: int | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure the answer position's attention to each kind of token, per layer (study 2).

    The answer position is the last token of the prompt, which predicts the answer's first token.

    Args:
        model: A supported vision-language model.
        processor: The model's processor.
        data: The questions.
        limit: Number of questions, from the first; None: all.
        batch_size: Questions in a batch.
        progress: Show a progress bar.

    Returns:
        One row per question, layer and kind ("visual", "system and prompt", "question"): question,
        layer, kind, share (the three sum to 1), tokens (of the kind in the prompt).

    Raises:
        UnsupportedModel: A layer's attention cannot be computed from outside; see ``probe``.
        DataError: The tokenizer does not know the words, or an image cannot be read.
    """
    questions = list(islice(data.questions(), limit))
    evaluation.check_questions(processor, questions, data)
    ids = set(families.find_parts(model).visual_ids.values())
    frames, starts, collate = [], range(0, len(questions), batch_size), Collator(processor)
    with opening.answering(model):
        for start in tqdm(starts, desc="attention", disable=not progress, leave=False):
            asked = evaluation.pictured(data, questions[start : start + batch_size])
            batch = evaluation.prompts(model, processor, asked, padding_side="right")
            last = batch["attention_mask"].sum(1) - 1  # (B,) padding stands at the end
            messages = [question for question, _ in asked]
            rows = zip(
                messages, batch["input_ids"].cpu(), batch["attention_mask"].cpu(), strict=True
            )
            kinds = torch.stack([_kinds(collate, *row, ids) for row in rows]).to(last.device)
            shares = attention_shares(model, batch, last, kinds).cpu()
            # Tokens of each kind in the prompt, without padding: (B, T, G) -> (B, G)
            counts = (
                (torch.nn.functional.one_hot(kinds, 3) * batch["attention_mask"][..., None])
                .sum(1)
                .cpu()
            )
            # (N, B, G) -> three index arrays (N B G,), one per column of the table
            layer, row, kind = (axis.ravel() for axis in np.indices(shares.shape))
            frames.append(
                pd.DataFrame(
                    {
                        "question": start + row,
                        "layer": layer,
                        "kind": np.array(KINDS)[kind],
                        "share": shares.numpy().ravel(),
                        "tokens": counts[row, kind],
                    }
                )
            )
    return pd.concat(frames, ignore_index=True)


def _kinds(
    collate: Collator, messages: list[dict], ids: Tensor, mask: Tensor, visual: set[int]
) -> Tensor:
    """(T,) the index in KINDS of each token of one prompt, which is padded on the right."""
    # The last user message is the question: its text is the piece before the last.
    pieces = chat.split_at(collate.processor, messages, "user", add_generation_prompt=True)
    first = len("".join(pieces[:-2]))
    offsets = collate.offsets(ids, mask, "".join(pieces), "a question")
    kinds = torch.full_like(ids, KINDS.index("system and prompt"))
    kinds[chat.within("".join(pieces), [(first, first + len(pieces[-2]))], offsets)] = KINDS.index(
        "question"
    )
    kinds[torch.isin(ids, torch.tensor(sorted(visual)))] = KINDS.index("visual")
    return kinds


def attention_table(attention: pd.DataFrame) -> pd.DataFrame:
    """Summarise study 2 in a table.

    Args:
        attention: From ``answer_attention``.

    Returns:
        One row per layer and kind: layer, kind, share (of the attention, the mean over questions),
        its 95% bootstrap interval (low, high), and tokens_share (the kind's share of the prompt).
    """
    rows = []
    total = attention.groupby(["question", "layer"]).tokens.transform("sum")
    for (layer, kind), part in attention.assign(of=attention.tokens / total).groupby(
        ["layer", "kind"]
    ):
        low, high = statistics.interval(part.share)
        rows.append(
            dict(
                layer=layer,
                kind=kind,
                share=part.share.mean(),
                low=low,
                high=high,
                tokens_share=part.of.mean(),
            )
        )
    return pd.DataFrame(rows)


def attention_headline(attention: pd.DataFrame) -> str:
    """Summarise study 2 in one paragraph.

    Args:
        attention: From ``answer_attention``.

    Returns:
        The visual tokens' share of the attention in the first and the last layer, the extremes,
        and the rank correlation with depth.
    """
    visual = attention_table(attention).query("kind == 'visual'").set_index("layer")
    first, last = visual.index[0], visual.index[-1]
    low, high = visual.share.idxmin(), visual.share.idxmax()
    return (
        f"Visual tokens are {visual.tokens_share[first]:.0%} of the prompt. "
        f"They get {visual.share[first]:.0%} of the "
        f"answer position's attention in layer {first} and {visual.share[last]:.0%} in layer "
        f"{last}; most ({visual.share[high]:.0%}) in layer {high}, "
        f"least ({visual.share[low]:.0%}) in layer {low}. "
        "Rank correlation with depth: "
        f"{visual.share.corr(pd.Series(visual.index, visual.index), 'spearman'):+.2f}. "
        "Published, LLaVA-1.5-7B: the share falls with depth."
    )
