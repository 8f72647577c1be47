"""Every registered compressor through the same tests, and each method against a slow reference of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from math import inf, nan
from pathlib import Path

import pytest
import torch
from families_tiny import FAMILIES
from tiny import IMAGE, Watched, example, places, ragged_batch, tiny_llava

from llavolta import (
    AveragePool,
    AveragePool2d,
    AveragePool3d,
    Compressor,
    Downsample,
    FastV,
    KeepRatio,
    KMeans,
    PlanError,
    PyramidDrop,
    RandomDrop,
    UnsupportedModel,
    VisualTokens,
    compress,
    format_plan,
    keep_tokens,
    parse_plan,
    tokens_per_layer,
)
from llavolta.compression.compressors import COMPRESSORS
from llavolta.train.schemes import scale_plan

RAGGED = [[3, 4], [2, 0, 5], [6], [1, 3, 2]]  # one image, two in a row, none, two apart
NO_ATTENTION = ("aya_vision",)  # Cohere 2 rotates in its sliding-window layers only
GREEDY = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
GREEDY["suppress_tokens"] = [IMAGE]


# The README's compressor in twenty lines, as it stands there.
README = (Path(__file__).parents[2] / "README.md").read_text()
exec(re.search(r"```python\n([^`]*class KeepLoudest(?:[^`]|`(?!``))*)```", README).group(1))


every_compressor = pytest.mark.parametrize("name", sorted(COMPRESSORS))
every_place = pytest.mark.parametrize(("name", "place"), [(n, p) for n in sorted(COMPRESSORS) for p in places(n)])


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


@pytest.fixture(scope="module")
def training():
    return tiny_llava().train()


@pytest.fixture(scope="module")
def half():
    return tiny_llava(dtype=torch.bfloat16).train()


def test_the_matrix_has_every_compressor_of_the_package_and_a_users():
    methods = {
        "avgpool",
        "avgpool2d",
        "avgpool3d",
        "downsample",
        "kmeans",
        "random",
        "fastv",
        "pyramiddrop",
        "prumerge",
        "prumerge+",
        "cls",
        "visionzip",
        "vispruner",
        "divprune",
        "cdpruner",
        "dart",
        "tome",
        "sparsevlm",
        "vscan",
        "holov",
        "pact",
        "restore",
        "withdraw",
    }
    assert methods | {"loudest"} <= COMPRESSORS.keys()
    assert parse_plan("2:loudest:7") == {2: COMPRESSORS["loudest"](7)}


@every_compressor
def test_plan_text_and_bad_options(name):
    place = places(name)[0]
    plan = {place: example(name)}
    assert parse_plan(format_plan(plan)) == plan
    for bad in ("-1", "0", "many") if name != "loudest" else ("1:1",):  # the README leaves checks out
        with pytest.raises(PlanError, match=re.escape(name)):
            parse_plan(f"{place}:{name}:{bad}")


WILD = (nan, inf, -inf, 1e30, 1e-30, 10**30, -(10**30), 2**32 - 1, -1, 0, True, False, "x", None)


@every_compressor
def test_wild_options_are_refused_in_one_line_or_work(model, name):
    """Each option of its kind; what a method takes is not found out by a traceback in a run."""
    if name == "loudest":  # the README leaves checks out
        return
    kind, place, batch = COMPRESSORS[name], places(name)[0], ragged_batch([[3, 4], [2, 0, 5]])
    refused = 0
    for option in fields(kind):
        for value in WILD:
            try:
                compressor = replace(example(name), **{option.name: value})
            except ValueError as error:
                refused += 1
                assert option.name in str(error) and "\n" not in str(error)
                assert str(error).endswith(f"not {value!r}")
                continue
            with torch.no_grad(), compress(model, {place: compressor}):
                assert model(**batch).logits.isfinite().all(), compressor
    assert refused >= 8 * len(fields(kind))


@every_place
def test_what_is_left_of_each_picture(model, name, place):
    compressor, watched = example(name), Watched()
    with compress(model, {place: compressor}, observe=watched):
        out = model(**ragged_batch(RAGGED))
    assert torch.isfinite(out.logits).all()
    [(tokens, left)] = watched.calls
    count = left.mask.sum(1)
    assert tokens.hidden.shape[:2] == (5, 16) and count.min() >= (name != "withdraw") and count.max() < 16
    if name == "pact":
        assert count.max() <= compressor.num_tokens(16)
    elif getattr(compressor, "keep", None) != "adaptive":
        assert count.double().mean() == pytest.approx(compressor.num_tokens(16))
    assert (left.mask.long().diff(dim=1) <= 0).all()  # padding at the end
    for picture, (anchor, mask) in enumerate(zip(left.anchor, left.mask, strict=True)):
        assert (anchor[mask].diff() > 0).all() and (anchor[mask] < 16).all()
        if left.positions is not None:
            old, new = tokens.positions[picture], left.positions[picture][mask]
            assert (
                old.min() <= new.min()
                and new.max() <= old.max()
                and (name == "restore" or (new.diff(dim=0) >= 0).all())
            )


@every_place
def test_text_before_the_first_image_is_untouched_and_rows_do_not_mix(model, name, place):
    batch = ragged_batch([[3, 4], [3, 0, 5]])
    alone = {key: value[:1] for key, value in batch.items()}
    stock = model(**batch).logits
    with compress(model, {place: example(name)}):
        out = model(**batch).logits
        torch.testing.assert_close(model(**alone).logits[0], out[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[:, :3], stock[:, :3], rtol=1e-5, atol=1e-5)
    assert (out[:, -1] - stock[:, -1]).abs().max() > 1e-3


def gradients(model, batch, seed: int = 0, mixed: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        loss = model(**batch).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    return found


@every_place
def test_training_reaches_tower_and_projector_and_repeats_under_a_seed(training, name, place):
    batch = ragged_batch(RAGGED)
    twice = {place: example(name), 3: example(name) if place == 1 else RandomDrop(0.5)}
    if name == "withdraw":  # once for all
        twice = {place: example(name)}
    with compress(training, twice):
        first, second = gradients(training, batch), gradients(training, batch)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert first["model.multi_modal_projector.linear_1.weight"].abs().max() > 0
    assert any(n.endswith("layers.0.mlp.fc1.weight") and "tower" in n and g.abs().max() > 0 for n, g in first.items())


@every_compressor
def test_training_in_bfloat16_and_under_autocast(training, half, name):
    plan = {places(name)[0]: example(name)}
    with compress(half, plan):
        gradients(half, ragged_batch(RAGGED, dtype=torch.bfloat16))
    with compress(training, plan):
        gradients(training, ragged_batch(RAGGED), mixed=True)


@every_place
def test_generation(model, name, place):
    batch = ragged_batch([[3, 4], [2, 0, 5]], side="left")
    del batch["labels"]
    with compress(model, {place: example(name)}):
        torch.manual_seed(0)
        first = model.generate(**batch, **GREEDY)
        # those that rank by the decoder choose anew for each token without a cache
        use_cache = "vision" not in places(name)
        assert torch.equal(model.generate(**batch, **GREEDY, use_cache=use_cache), first)
        beams = model.generate(**batch, **GREEDY, num_beams=2)
    assert first.shape == beams.shape == (2, batch["input_ids"].shape[1] + 3)


@pytest.mark.parametrize("kind", [RandomDrop, FastV, PyramidDrop])
def test_keeping_everything_is_stock(model, kind):
    batch = ragged_batch(RAGGED)
    with compress(model, {1: kind(1.0)}):
        assert torch.equal(model(**batch).logits, tiny_llava()(**batch).logits)


# --- each method against a reference of its own ---


def test_average_pooling_in_squares_by_hand():
    torch.manual_seed(0)
    height, width, k = 5, 7, 3
    hidden, positions = torch.randn(2, 40, 8), torch.arange(100, 140)[None, :, None].expand(2, -1, 2).clone()
    mask = torch.arange(40) < torch.tensor([[height * width], [4]])
    grid = torch.tensor([[height, width], [2, 2]])
    out = AveragePool2d(k)(VisualTokens(hidden, mask, positions, grid))
    windows = []
    for top in range(0, height, k):
        for left in range(0, width, k):
            down, across = range(top, min(top + k, height)), range(left, min(left + k, width))
            windows.append([row * width + column for row in down for column in across])
    assert out.mask.sum(1).tolist() == [len(windows), 1] and out.grid.tolist() == [[2, 3], [1, 1]]
    for place, window in enumerate(windows):
        torch.testing.assert_close(out.hidden[0, place], hidden[0, window].mean(0))
        assert out.positions[0, place, 0] == sum(100 + w for w in window) // len(window)
        assert out.anchor[0, place] in window and all(out.group[0, w] == place for w in window)
    torch.testing.assert_close(out.hidden[1, 0], hidden[1, :4].mean(0))


@pytest.mark.parametrize("lead", [0, 1])
def test_average_pooling_in_blocks_of_a_clip_by_hand(lead):
    """Frame by frame, token by token: lead is 1 with a class token before each frame's patches."""
    torch.manual_seed(0)
    length, height, width, t, k = 5, 3, 4, 2, 3
    each = lead + height * width
    hidden, positions = torch.randn(2, 70, 8), torch.arange(100, 170)[None, :, None].expand(2, -1, 2).clone()
    mask = torch.arange(70) < torch.tensor([[length * each], [4 + lead]])
    grid, frames = torch.tensor([[height, width], [2, 2]]), torch.tensor([length, 1])
    out = AveragePool3d(t, k)(VisualTokens(hidden, mask, positions, grid, frames=frames))
    windows, anchors = [], []
    for first in range(0, length, t):
        block = range(first, min(first + t, length))
        middle = block[(len(block) - 1) // 2] * each
        if lead:
            windows.append([frame * each for frame in block])
            anchors.append(middle)
        for top in range(0, height, k):
            for left in range(0, width, k):
                down, across = range(top, min(top + k, height)), range(left, min(left + k, width))
                windows.append([f * each + lead + r * width + c for f in block for r in down for c in across])
                row, column = down[(len(down) - 1) // 2], across[(len(across) - 1) // 2]
                anchors.append(middle + lead + row * width + column)
    assert out.mask.sum(1).tolist() == [len(windows), 1 + lead]
    assert out.anchor[0, : len(anchors)].tolist() == anchors
    for place, window in enumerate(windows):
        torch.testing.assert_close(out.hidden[0, place], hidden[0, window].mean(0))
        assert out.positions[0, place, 0] == sum(100 + w for w in window) // len(window)
        assert all(out.group[0, w] == place for w in window)
    torch.testing.assert_close(out.hidden[1, lead], hidden[1, lead : 4 + lead].mean(0))


def test_how_many_tokens_blocks_of_a_clip_leave():
    assert [AveragePool3d(2, 2).num_tokens(n) for n in (16, 8 * 36, 8 * 37, 7)] == [4, 4 * 9, 4 * 10, 4]
    with pytest.raises(ValueError, match="per_frame must be true or false"):
        AveragePool(2, 1)
    assert (
        str(AveragePool(2, True)) == "avgpool:2:per_frame=true"
        and parse_plan("1:avgpool:2:per_frame=true")[1].per_frame
    )


def test_resizing_by_area_by_hand():
    """Every token repeated h x w times, then the mean over H x W blocks: exact area weights in whole numbers."""
    torch.manual_seed(0)
    hidden, sizes = torch.randn(2, 40, 8), [(5, 7), (2, 3)]
    mask = torch.arange(40) < torch.tensor([[5 * 7], [2 * 3]])
    out = Downsample(0.3)(
        VisualTokens(hidden, mask, torch.arange(40)[None, :, None].expand(2, -1, 1), torch.tensor(sizes))
    )
    assert out.grid.tolist() == [[3, 4], [1, 2]] and out.mask.sum(1).tolist() == [12, 2]
    for image, ((height, width), (down, across)) in enumerate(zip(sizes, out.grid.tolist(), strict=True)):
        fine = hidden[image, : height * width].view(height, width, 8)
        fine = fine.repeat_interleave(down, 0).repeat_interleave(across, 1)
        expected = fine.view(down, height, across, width, 8).mean((1, 3)).flatten(0, 1)
        torch.testing.assert_close(out.hidden[image, : down * across], expected)
        for cell, anchor in enumerate(out.anchor[image, : down * across].tolist()):
            row, column = cell // across, cell % across
            assert anchor // width == int((row + 0.5) * height / down)
            assert anchor % width == int((column + 0.5) * width / across)
            assert out.group[image, anchor] == cell
    assert [Downsample(keep).num_tokens(576) for keep in (0.05, 0.11, 0.25, 0.5, 1)] == [25, 64, 144, 289, 576]


def lloyd(points: torch.Tensor, start: list[int], iterations: int) -> list[list[int]]:
    """The clusters of points (L, C), one by one; without empty ones, in the order of the members nearest their mean."""
    centres = [points[i] for i in start]
    for _ in range(iterations + 1):
        clusters = [[] for _ in centres]
        for i, point in enumerate(points):
            distance = [((point - centre) ** 2).sum().item() for centre in centres]
            clusters[distance.index(min(distance))].append(i)
        centres = [points[c].mean(0) if c else old for c, old in zip(clusters, centres, strict=True)]
    return sorted((c for c in clusters if c), key=lambda c: nearest_to_mean(points, c))


def nearest_to_mean(points: torch.Tensor, members: list[int]) -> int:
    return min(members, key=lambda i: (points[i] - points[members].mean(0)).norm().item())


@pytest.mark.parametrize("iterations", [0, 1, 6])
def test_k_means_by_hand(iterations):
    generator = torch.Generator().manual_seed(iterations)
    hidden, counts = torch.randn(3, 20, 6, generator=generator), [20, 13, 1]
    mask = torch.arange(20) < torch.tensor(counts)[:, None]
    positions = torch.arange(20)[None, :, None].expand(3, -1, 1)
    out = KMeans(0.3, iterations, seed=5)(VisualTokens(hidden, mask, positions))
    draw = torch.rand(20, generator=torch.Generator().manual_seed(5)).tolist()
    for image, count in enumerate(counts):
        start = sorted(range(count), key=lambda i: -draw[i])[: max(1, round(0.3 * count))]
        clusters = lloyd(hidden[image, :count], start, iterations)
        assert out.mask[image].sum() == len(clusters)
        for number, members in enumerate(clusters):
            torch.testing.assert_close(out.hidden[image, number], hidden[image, members].mean(0))
            assert out.anchor[image, number] == nearest_to_mean(hidden[image], members)
            assert all(out.group[image, member] == number for member in members)


def test_k_means_of_equal_tokens_leaves_one():
    hidden, mask = torch.ones(2, 9, 4), torch.ones(2, 9, dtype=torch.bool)
    out = KMeans(0.5)(VisualTokens(hidden, mask, torch.arange(9)[None, :, None].expand(2, -1, 1)))
    assert out.mask.tolist() == [[True], [True]] and torch.equal(out.hidden, hidden[:, :1])


def test_squares_stay_a_grid_for_the_next_layer(model):
    watched = Watched()
    with compress(model, {0: AveragePool2d(2), 1: AveragePool2d(2)}, observe=watched):
        model(**ragged_batch(RAGGED))
    [_, (tokens, out)] = watched.calls
    assert tokens.grid.tolist() == [[2, 2]] * 5 and out.mask.shape == (5, 1)


def test_plans_before_the_projector():
    plan = parse_plan("2:random:0.5;vision:avgpool2d:2")
    assert list(plan) == ["vision", 2] and format_plan(plan) == "vision:avgpool2d:2;2:random:0.5:0"
    assert parse_plan(plan) == plan
    assert tokens_per_layer(plan, 4, 576) == [144, 144, 72, 72]
    assert scale_plan("vision:avgpool:2;16:avgpool:8", 8) == "vision:avgpool:2;4:avgpool:8"
    for bad in ("video:avgpool:2", "vision:avgpool:2;vision:random:0.5"):
        with pytest.raises(PlanError):
            parse_plan(bad)


def test_squares_need_a_rectangle(model):
    with compress(model, "0:avgpool:2;1:avgpool2d:2"), pytest.raises(UnsupportedModel, match="rectangle"):
        model(**ragged_batch(RAGGED))


def kept_columns(model, batch, plan, layer) -> list[list[int]]:
    """Per picture the columns of the input that the compressor at ``layer`` keeps."""
    watched = Watched()
    with compress(model, plan, labelled_only=False, observe=watched):
        model(**batch)
    tokens, out = watched.calls[watched.layers.index(layer)]
    first = tokens.probe.images % batch["input_ids"].shape[1]
    return [f[a[m]].tolist() for f, a, m in zip(first, out.anchor, out.mask, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [FastV, PyramidDrop])
def test_ranking_by_attention_equals_ranking_by_the_stock_attention_maps(kind, side):
    model, layer = tiny_llava(attention="eager"), 2
    batch = ragged_batch([[3, 4], [2, 0, 5], [1, 3, 2]], side=side)
    maps = model(**batch, output_attentions=True).attentions[layer - 1 if kind is FastV else layer].mean(1)
    labelled = batch.pop("labels") != -100
    got = kept_columns(model, batch, {layer: kind(0.5)}, layer)
    expected = by_attention(batch, maps, lambda row: [max(batch["attention_mask"][row].nonzero()).item()])
    assert got == expected
    if kind is PyramidDrop:  # with labels: the tokens just before each answer
        batch["labels"] = torch.where(labelled, batch["input_ids"], -100)
        batch["labels"][0, -2:-1] = -100  # two answers in the first row
        answers = batch["labels"] != -100
        queries = lambda row: [c - 1 for c in range(1, answers.shape[1]) if answers[row, c] and not answers[row, c - 1]]  # noqa: E731
        assert kept_columns(model, batch, {layer: kind(0.5)}, layer) == by_attention(batch, maps, queries)


def by_attention(batch, maps, queries) -> list[list[int]]:
    kept = []
    for row, ids in enumerate(batch["input_ids"].tolist()):
        columns = [column for column, token in enumerate(ids) if token == IMAGE]
        score = sum(maps[row, query] for query in queries(row))
        for first in range(0, len(columns), 16):
            picture = columns[first : first + 16]
            kept.append(sorted(sorted(picture, key=lambda column: -score[column].item())[:8]))
    return kept


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("gemma3", *NO_ATTENTION)])
def test_attention_rows_equal_the_stock_maps_of_every_family(family):
    """Also behind query and key norms and 3-D rotary positions. Gemma 3's layer 0 has a sliding window."""
    tiny = FAMILIES[family]("left", "eager")
    maps = [layer.mean(1) for layer in tiny.model(**tiny.batch, output_attentions=True).attentions]
    watched = Watched()
    with compress(tiny.model, {2: FastV(0.5)}, observe=watched):
        tiny.model(**tiny.batch)
        [(tokens, _)] = watched.calls
        for previous in (True, False):
            got = tokens.attention("last", previous=previous)
            expected = maps[1 if previous else 2][:, -1].reshape(-1)[tokens.probe.images]
            torch.testing.assert_close(got[tokens.mask], expected[tokens.mask], rtol=1e-4, atol=1e-6)


def test_a_random_subset_is_fresh_in_training_and_fixed_in_evaluation(model):
    batch = ragged_batch([[3, 4], [2, 0, 5]])
    plan = {1: RandomDrop(0.25, seed=3)}
    fixed = kept_columns(model, batch, plan, 1)
    assert fixed == kept_columns(model, batch, plan, 1) != kept_columns(model, batch, {1: RandomDrop(0.25, seed=4)}, 1)
    assert [len(picture) for picture in fixed] == [4, 4, 4]
    model.train()
    torch.manual_seed(0)
    draws = [kept_columns(model, batch, plan, 1) for _ in range(3)]
    torch.manual_seed(0)
    assert draws[0] == kept_columns(model, batch, plan, 1) and draws[0] != draws[1] != draws[2]
    model.eval()


def test_what_a_compressor_may_ask_for(model):
    batch, seen = ragged_batch(RAGGED, side="left"), []

    @dataclass(frozen=True)
    class Asks(KeepRatio):
        def scores(self, tokens):
            hidden, mask = tokens.rows()
            seen.append((tokens.keys(), hidden, mask, tokens.probe.row()))
            return tokens.attention("instruction")

    with compress(model, {2: Asks(0.5)}):
        model(**batch)
    keys, hidden, mask, row = seen[0]
    assert row.tolist() == [0, 1, 1, 3, 3] and keys.shape == (5, 16, 2 * 8)
    text = (batch["input_ids"] != IMAGE) & batch["attention_mask"].bool() & (batch["labels"] == -100)
    column = torch.arange(text.shape[1])
    for of, found in zip(row, mask, strict=True):
        behind = text[of] & (column > (batch["input_ids"][of] == IMAGE).nonzero().max())
        assert torch.equal(found, behind if behind.any() else text[of])
    states = model(**batch, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(hidden, states[row], rtol=1e-4, atol=1e-4)
    layer = model.model.language_model.layers[2]
    visual = states[batch["input_ids"] == IMAGE].view(5, 16, -1)
    torch.testing.assert_close(keys, layer.self_attn.k_proj(layer.input_layernorm(visual)), rtol=1e-4, atol=1e-4)


def test_compressors_say_where_they_can_stand(model):
    @dataclass(frozen=True)
    class Asks(KeepRatio):
        def scores(self, tokens):
            return tokens.attention("class")

    for plan in ("0:fastv:0.5", "vision:fastv:0.5"):
        with pytest.raises(PlanError, match="from layer 1"):
            compress(model, plan)
    with pytest.raises(PlanError, match="from layer 0, not at 'vision'"):
        compress(model, "vision:pyramiddrop:0.5")
    with pytest.raises(PlanError, match="write 'vision:prumerge'"):
        compress(model, "2:prumerge")
    with compress(model, {"vision": Asks()}), pytest.raises(ValueError, match='lists "tower" in needs'):
        model(**ragged_batch(RAGGED))
    with (
        compress(model, {1: Asks()}),
        pytest.raises(ValueError, match=r"at .vision. and layer 0, for a compressor that"),
    ):
        model(**ragged_batch(RAGGED))

    class Forgets(FastV):
        name = ""
        needs = frozenset()

    with compress(model, {1: Forgets(0.5)}), pytest.raises(ValueError, match="previous_layer"):
        model(**ragged_batch(RAGGED))


def test_different_numbers_of_tokens_for_each_image(model):
    """Rows of the batch are padded again, and equal what each gives alone."""

    @dataclass(frozen=True)
    class AboveMean(Compressor):
        def num_tokens(self, num_tokens):
            return num_tokens / 2

        def __call__(self, tokens):
            norm = tokens.hidden.norm(dim=-1)
            return keep_tokens(tokens, norm >= norm.mean(1, keepdim=True))

    batch, watched = ragged_batch([[3, 4], [4, 3]]), Watched()
    alone = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(2)]
    with compress(model, {1: AboveMean()}, observe=watched):
        both, single = model(**batch).logits, [model(**row).logits[0] for row in alone]
        slow = model.generate(**{k: v for k, v in batch.items() if k != "labels"}, **GREEDY, use_cache=False)
        fast = model.generate(**{k: v for k, v in batch.items() if k != "labels"}, **GREEDY)
    counts = watched.calls[0][1].mask.sum(1)
    assert counts[0] != counts[1] and torch.equal(slow, fast)
    torch.testing.assert_close(both, torch.stack(single), rtol=1e-4, atol=1e-4)


def test_results_of_the_wrong_kind(model):
    class Broken(Compressor):
        def __init__(self, change):
            object.__setattr__(self, "change", change)

        def __call__(self, tokens):
            return self.change(keep_tokens(tokens, torch.arange(16).expand_as(tokens.mask) % 2 == 0))

        def num_tokens(self, num_tokens):
            return num_tokens

    def fails(change, error, match):
        with compress(model, {1: Broken(change)}), pytest.raises(error, match=match):
            model(**ragged_batch(RAGGED))

    fails(lambda out: replace(out, hidden=out.hidden[:, :3]), ValueError, "returned hidden")
    fails(lambda out: replace(out, anchor=out.anchor.T), ValueError, "returned hidden")
    fails(lambda out: replace(out, anchor=out.anchor.flip(1)), ValueError, "do not rise")
    fails(lambda out: replace(out, mask=out.mask & (out.anchor > 99)), ValueError, "no token")
    fails(lambda out: replace(out, hidden=out.hidden / 0), FloatingPointError, "NaN")


def test_only_a_class_with_a_name_of_its_own_is_registered():
    built_in = COMPRESSORS["avgpool"]

    class Mine(AveragePool):
        pass

    assert COMPRESSORS["avgpool"] is built_in
    assert type(parse_plan("2:avgpool:8")[2]) is built_in


def test_a_name_that_another_class_holds_is_refused():
    built_in = COMPRESSORS["avgpool"]
    with pytest.raises(ValueError, match="'avgpool'.*AveragePool"):

        class Thief(AveragePool):
            name = "avgpool"

    assert COMPRESSORS["avgpool"] is built_in


@pytest.mark.parametrize("name", sorted(COMPRESSORS))
def test_a_malformed_plan_gets_one_line_with_the_options(name):
    for options in ([], ["x"], ["no=1"], ["1"] * 9, ["true"], ["nan"], [""], ["-1"], ["0"]):
        text = ":".join(["2", name, *options])
        try:
            parse_plan(text)
        except PlanError as error:
            assert "\n" not in str(error) and "__init__" not in str(error)
            for field in fields(COMPRESSORS[name]):
                assert field.name in str(error), (text, str(error))


@pytest.mark.parametrize("mode", ["eval", "train", "checkpointing"])
def test_an_observer_sees_what_each_compressor_got_and_returned(mode):
    """In the order of the layers, by the plan's own keys; what removes nothing is not in force."""
    model, watched = tiny_llava(), Watched()
    model.train(mode != "eval")
    if mode == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plan = {"vision": AveragePool2d(2), 0: AveragePool(1), 1: AveragePool(2), 2: FastV(0.5)}
    with compress(model, plan, observe=watched):
        model(**ragged_batch(RAGGED)).loss.backward()
    assert watched.layers == ["vision", 1, 2]
    sizes = [(tokens.mask.sum(1).tolist(), out.mask.sum(1).tolist()) for tokens, out in watched.calls]
    assert sizes == [([16] * 5, [4] * 5), ([4] * 5, [2] * 5), ([2] * 5, [1] * 5)]


def test_an_observers_error_ends_the_pass_and_leaves_the_model_stock():
    model, batch = tiny_llava(), ragged_batch(RAGGED)
    stock = model(**batch).logits

    def fail(layer, tokens, out):
        raise RuntimeError(f"on purpose at {layer}")

    with pytest.raises(RuntimeError, match="on purpose at 1"), compress(model, "1:avgpool:2", observe=fail):
        model(**batch)
    assert torch.equal(model(**batch).logits, stock)
