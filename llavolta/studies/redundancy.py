"""The paper's two studies of redundancy, and where each visual token goes.

Study 1: accuracy against the share of visual tokens kept, by layer and stride (``redundancy_sweep``).
Study 2: how much of the answer's attention goes to visual tokens, by layer (``answer_attention``).
Source of both: LLaVolta, arXiv 2406.20092, section 3.
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
from llavolta.paths import PUBLISHED
from llavolta.studies import evaluation, opening, statistics

WAY = 1  # of sweeping; raised when what is kept of an interrupted sweep is no longer what it would answer
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
    """Answers to the first ``limit`` questions with average pooling at each layer K with each stride S, at test time.

    One row per point and question: layer, stride, kept (the share of an image's visual tokens that layer K and those
    behind it work on), question, type, answer, prediction, correct; equal to ``evaluate(plan="K:avgpool:S")``.
    Stride 1 is the model without compression, at whatever layer. max_new_tokens: see ``evaluation.evaluate``.

    Pictures and the layers below K are computed once per batch, for all strides and deeper layers. With ``cache``, a
    folder, every point is a JSON file there, brought up to date after each batch and kept per model weights, questions,
    pictures and code, so that an interrupted sweep continues. Raises StudyError, PlanError, DataError.
    """
    if not layers or not strides or limit is not None and limit < 1:
        raise opening.StudyError("a sweep needs at least one layer, one stride and one question")
    depth = len(families.find_parts(model).layers)
    points = {(layer, stride): _plan(layer, stride) for layer in layers for stride in strides}
    for layer, stride in points:
        check_layers(parse_plan(f"{layer}:avgpool:{stride}"), depth)
    questions = list(islice(data.questions(), limit))
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
    todo = [(start, [plan for plan in plans if missing(plan, start)]) for start in batches]
    total = sum(len(rest) for _, rest in todo)
    with (
        opening.answering(model),
        tqdm(total=total, desc="sweep", disable=not progress, leave=False) as bar,
    ):
        for start, rest in todo:
            if not rest:
                continue
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
    """The share of an image's tokens that pooling leaves; where their number varies, but for the last window."""
    tokens = getattr(families.unwrap(model).config, "image_seq_length", None)
    return math.ceil(tokens / stride) / tokens if tokens else 1 / stride


def _answers_by_plan(
    model, processor, asked, plans: list[str], max_new_tokens: int
) -> Iterator[tuple[str, list[str]]]:
    """(plan, answers) for one batch; ``plans`` from the shallowest to the deepest."""
    batch = evaluation.prompts(model, processor, asked)
    with torch.no_grad():
        batch = families.encode_pictures(families.find_parts(model).base, (), dict(batch))
    with shared_layers(model) as shared:
        for plan in plans:
            shared.below = min(parse_plan(plan), default=shared.depth)
            with patch.compress(model, plan):
                yield plan, evaluation.answer(model, processor, batch, max_new_tokens)[0]


@contextmanager
def shared_layers(model) -> Iterator[SimpleNamespace]:
    """While it is open, decoder layers under ``.below`` compute the first pass of one and the same batch only once.

    For several generations on one batch under different plans, each with ``below`` set to the plan's first layer: what
    stands below that layer is the stock model's, whatever comes after. Later passes, on a cache that holds something,
    are computed as ever.
    """
    modules = families.find_parts(model).layers
    shared = SimpleNamespace(below=0, depth=len(modules))
    memory: dict[int, tuple] = {}

    def once(number: int, forward):
        def recall(*args, **kwargs):
            cache = kwargs.get("past_key_values")
            if number >= shared.below or cache is None or cache.get_seq_length(number):
                return forward(*args, **kwargs)
            if number not in memory:
                output = forward(*args, **kwargs)
                memory[number] = (
                    output,
                    copy.copy(cache.layers[number]),
                )  # updates replace its tensors
            output, held = memory[number]
            cache.layers[number : number + 1] = [copy.copy(held)]
            return output

        return recall

    own = [
        vars(module).get("forward") for module in modules
    ]  # such as accelerate's, of a model on several devices
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
    """A name for everything that the answers depend on."""
    digest = hashlib.blake2b(digest_size=12)
    for name, weight in families.unwrap(model).state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
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
    except (ValueError, AttributeError):  # damaged; answered again
        return {}


def _write_point(folder: Path | None, plan: str, answers: dict[int, str]) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    part = _point_file(folder, plan).with_suffix(f".part{os.getpid()}")
    part.write_text(json.dumps(answers))
    part.replace(_point_file(folder, plan))  # at once, so that an interruption leaves no half file


def sweep_table(sweep: pd.DataFrame) -> pd.DataFrame:
    """Per layer, stride and type (and "overall"): kept, questions, accuracy and its 95% bootstrap interval."""
    points = sweep.drop_duplicates(["layer", "stride"])[["layer", "stride", "kept"]]
    table = statistics.accuracy_table(sweep.drop(columns="answer"), by=("layer", "stride"))
    return table.merge(points, how="left", on=["layer", "stride"]).sort_values(
        ["type", "layer", "stride"]
    )


def accuracy_lost(sweep: pd.DataFrame, removed: float = 0.7) -> pd.DataFrame:
    """Per layer: accuracy with every visual token, with the share ``removed`` of them gone, and the loss (0 to 1).

    Between the two nearest strides each question's result is interpolated linearly in the share kept, and the 95%
    interval is that of the paired differences, by bootstrap over the questions. Raises StudyError where the strides
    do not reach from no compression to that share.
    """
    rows = []
    for layer, part in sweep.groupby("layer"):
        grid = part.pivot_table(
            index="question", columns="kept", values="correct", aggfunc="first"
        ).astype(float)
        kept = grid.columns.to_numpy()
        if kept[0] > 1 - removed or kept[-1] < 1:
            raise opening.StudyError(
                f"strides {sorted(set(part.stride))} do not reach from 1 to {removed:.0%} of the tokens removed"
            )
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
    """Per layer, the share of visual tokens that can go before accuracy has fallen by ``lost`` (0 to 1).

    Interpolated linearly between strides; the largest share of the sweep where accuracy never falls so far.
    """
    shares = {}
    for layer, part in sweep.groupby("layer"):
        mean = part.groupby("kept").correct.mean().sort_index(ascending=False)
        fallen = mean.iloc[0] - mean.to_numpy() - lost
        first = int(np.argmax(fallen > 0)) if (fallen > 0).any() else None
        if first is None:
            shares[layer] = 1 - mean.index[-1]
        else:
            between = np.interp(0, fallen[first - 1 : first + 1], mean.index[first - 1 : first + 1])
            shares[layer] = 1 - between
    return pd.Series(shares, name="removable").rename_axis("layer")


def published_reading() -> dict[str, float]:
    """The paper's headline: {"removed": share of visual tokens, "lost": share of accuracy on GQA}."""
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
    """Study 1 in words, from its figures: what is lost at each layer when the published share of tokens goes."""
    paper = published_reading()
    lost, room = accuracy_lost(sweep, paper["removed"]), removable(sweep, paper["lost"])
    lines = [
        f"With {paper['removed']:.0%} of the visual tokens pooled away at test time, accuracy changes"
    ]
    for layer, row in lost.iterrows():
        change, low, high = (statistics.points(-share) for share in (row.lost, row.high, row.low))
        lines.append(
            f"- at layer {layer}: from {row.full:.1%} to {row.compressed:.1%}, "
            f"**{change} points** (95% interval {low} to {high}); "
            f"{room[layer]:.0%} can go before {100 * paper['lost']:.0f} points are lost"
        )
    published = f"Published, LLaVA-1.5-7B on GQA: {paper['removed']:.0%} pooled away, {-100 * paper['lost']:+.0f}%."
    return "\n".join(lines) + f"\n\n{published}"


# --- study 2: where the answer's attention goes ---


@torch.no_grad()
def attention_shares(model, batch, query: Tensor, kinds: Tensor) -> Tensor:
    """(N, B, G) per decoder layer, the share of the attention of column ``query`` (B,) that goes to each kind of token.

    kinds: (B, T) the kind, 0 .. G - 1, of each token of ``batch``, which is padded on the right. Mean over heads, in
    float32. One row of attention is computed per layer and example, from the layer's own norm, projections and rotary
    embeddings; no map is kept, and the model runs with whatever attention it has. Raises UnsupportedModel as
    ``LayerProbe`` does.
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
        near = valid if window is None else valid & (column > query[:, None] - window)
        weights = probe.attention_rows(
            at, query[:, None], near, torch.zeros_like(near, dtype=torch.long)
        )  # (B, 1, T)
        shares.append((weights @ groups)[:, 0])

    hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in parts.layers]
    try:
        parts.base(**batch)  # without the head
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
    """The share of attention that goes from the answer position to each kind of token, per layer and question.

    The answer position [ANS] is the last token of the prompt, which predicts the answer's first token. Columns:
    question, layer, kind ("visual", "system and prompt", "question"), share (the three sum to 1), tokens (how many of
    the kind the prompt holds). See ``attention_shares``.
    """
    questions = list(islice(data.questions(), limit))
    evaluation.check_questions(processor, questions, data)
    ids = set(families.find_parts(model).visual_ids.values())
    frames, starts, collate = [], range(0, len(questions), batch_size), Collator(processor)
    with opening.answering(model):
        for start in tqdm(starts, desc="attention", disable=not progress, leave=False):
            asked = evaluation.pictured(data, questions[start : start + batch_size])
            batch = evaluation.prompts(model, processor, asked, padding_side="right")
            last = batch["attention_mask"].sum(1) - 1
            messages = [question for question, _ in asked]
            rows = zip(
                messages, batch["input_ids"].cpu(), batch["attention_mask"].cpu(), strict=True
            )
            kinds = torch.stack([_kinds(collate, *row, ids) for row in rows]).to(last.device)
            shares = attention_shares(model, batch, last, kinds).cpu()
            counts = (
                (torch.nn.functional.one_hot(kinds, 3) * batch["attention_mask"][..., None])
                .sum(1)
                .cpu()
            )
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
    """(T,) the index in KINDS of each token of one prompt that asks ``messages``, padded on the right."""
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
    """Per layer and kind: the mean share of attention, its 95% bootstrap interval, and the share of the tokens."""
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
    """Study 2 in words, from its figures."""
    visual = attention_table(attention).query("kind == 'visual'").set_index("layer")
    first, last = visual.index[0], visual.index[-1]
    low, high = visual.share.idxmin(), visual.share.idxmax()
    return (
        f"Visual tokens are {visual.tokens_share[first]:.0%} of the prompt. They get {visual.share[first]:.0%} of the "
        f"answer position's attention in layer {first} and {visual.share[last]:.0%} in layer {last}; most "
        f"({visual.share[high]:.0%}) in layer {high}, least ({visual.share[low]:.0%}) in layer {low}. "
        f"Rank correlation with depth: {visual.share.corr(pd.Series(visual.index, visual.index), 'spearman'):+.2f}. "
        "Published, LLaVA-1.5-7B: the share falls with depth."
    )


# --- where each token goes ---


# --- one plan and one question ---
