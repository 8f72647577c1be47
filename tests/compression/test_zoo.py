"""Published compressors against literal loops, picture by picture, of their descriptions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from benchmarks.methods import tower_tokens
from families_tiny import FAMILIES
from tiny import IMAGE, Watched, in_turn, ragged_batch, tiny_llava
from transformers import SiglipVisionConfig, SiglipVisionModel

from llavolta import (
    PACT,
    CDPruner,
    ClassAttention,
    DivPrune,
    HoloV,
    PlanError,
    Restore,
    SparseVLM,
    ToMe,
    UnsupportedModel,
    VisionZip,
    VisPruner,
    VisualTokens,
    VScan,
    compress,
    parse_plan,
)
from llavolta.compression.compressors.base import choose_greedily
from llavolta.compression.compressors.sparsevlm import merge_by_density
from llavolta.compression.plan import format_plan
from llavolta.compression.probe import TowerProbe

BUDGETS = [0.5, 7, 0.1, 100]
GRIDS = [3, 6, 7]  # 9 and 49 tokens: odd


def class_attention(tokens, picture: int, layer: str | int = "selected") -> torch.Tensor:
    """(L,) head by head."""
    layer = tokens.probe.layers[layer]
    query, keys = layer.query[picture, 0], layer.key[picture]
    width, given = len(query) // layer.heads, []
    for head in range(layer.heads):
        part = slice(head * width, (head + 1) * width)
        given.append(torch.softmax(torch.stack([query[part] @ key[part] for key in keys]) / width**0.5, 0))
    return (sum(given) / layer.heads)[1:]


def ranked(values) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -float(values[i]))


def cosine(a, b) -> float:
    return float(F.cosine_similarity(a.double(), b.double(), dim=0))


@pytest.mark.parametrize(("grid", "keep"), in_turn(GRIDS, BUDGETS, cases=6))
def test_class_attention(grid, keep):
    tokens = tower_tokens(3, grid, 128)  # two heads
    out = ClassAttention(keep)(tokens)
    for picture in range(3):
        best = ranked(class_attention(tokens, picture))[: ClassAttention(keep).num_tokens(grid * grid)]
        assert out.anchor[picture][out.mask[picture]].tolist() == sorted(best)


@pytest.mark.parametrize(
    ("grid", "keep", "weights"),
    in_turn(GRIDS, BUDGETS, ["sum", "mean", "mean", "sum", "mean", "sum"]),
)
def test_visionzip(grid, keep, weights):
    tokens, compressor = tower_tokens(3, grid, 128), VisionZip(keep, contextual=0.2, weights=weights)
    out, total = compressor(tokens), compressor.num_tokens(grid * grid)
    targets = round(0.2 * total)
    for picture in range(3):
        x, keys = tokens.hidden[picture], tokens.probe.layers["selected"].key[picture, 1:]
        keys = keys.view(len(x), 2, 64).mean(1)
        dominant = sorted(ranked(class_attention(tokens, picture))[: total - targets])
        others = [i for i in range(len(x)) if i not in dominant]
        step = max(1, len(others) // max(targets, 1))
        chosen = others[::step][:targets]
        assigned = {target: [] for target in chosen}
        for i in (i for i in others if i not in chosen):
            if chosen:
                assigned[max(chosen, key=lambda t: cosine(keys[i], keys[t]))].append(i)
        expected = [x[i] for i in dominant]
        for target, more in assigned.items():
            mean = sum(x[i] for i in more) / len(more) if more else 0
            whole = sum((x[i] for i in more), x[target]) / (len(more) + 1)
            expected.append(x[target] + mean if weights == "sum" else whole)
        torch.testing.assert_close(out.hidden[picture], torch.stack(expected), rtol=1e-4, atol=1e-5)
    assert out.mask.all() and (out.anchor.diff(dim=1) > 0).all() and out.anchor.max() < grid * grid


def test_the_published_splits_of_visionzip():
    assert [round(VisionZip().contextual * total) for total in (192, 128, 64)] == [30, 20, 10]


@pytest.mark.parametrize(
    ("grid", "keep", "important", "batch"),
    in_turn([3, 6, 7, 7, 6, 3], [0.5, 7, 0.1, 7, 0.5, 100], [0.5, 0.75, 0.75, 0.5, 1.0], [8, 3, 3]),
)
def test_vispruner(grid, keep, important, batch):
    tokens, compressor = tower_tokens(3, grid, 128), VisPruner(keep, important=important, batch=batch)
    out, total = compressor(tokens), compressor.num_tokens(grid * grid)
    for picture in range(3):
        x = tokens.hidden[picture]
        order = ranked(class_attention(tokens, picture))
        kept, rest = order[: int(total * important)], order[int(total * important) :]
        wanted = total - len(kept)
        while wanted and len(rest) > wanted:
            even, odd = rest[::2], rest[1::2]
            score = {i: max(cosine(x[i], x[j]) for j in odd) for i in even}
            even = sorted(even, key=lambda i: -score[i])[min(batch, len(rest) - wanted) :]
            rest = even + odd
        assert out.anchor[picture].tolist() == sorted(kept + rest[:wanted])


def ragged_tokens(counts=(16, 9, 5), width=12) -> VisualTokens:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    hidden = torch.randn(len(counts), max(counts), width, generator=generator)
    return VisualTokens(hidden, mask, torch.arange(max(counts)).expand(len(counts), -1)[..., None])


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.6, 6, 1])
def test_divprune(keep):
    tokens, compressor = ragged_tokens(), DivPrune(keep)
    out = compressor(tokens)
    for picture, count in enumerate((16, 9, 5)):
        x = tokens.hidden[picture, :count]
        far = [[1 - cosine(a, b) for b in x] for a in x]
        chosen = [max(range(count), key=lambda i: min(far[i][j] for j in range(count) if j != i))]
        while len(chosen) < compressor.num_tokens(count):
            rest = [i for i in range(count) if i not in chosen]
            chosen.append(max(rest, key=lambda i: min(far[i][j] for j in chosen)))
        assert out.anchor[picture][out.mask[picture]].tolist() == sorted(chosen)


def test_equal_tokens_are_chosen_once():
    tokens = ragged_tokens()
    tokens.hidden[:] = tokens.hidden[:, :1]
    for compressor in (DivPrune(6), ToMe(6)):
        assert compressor(tokens).mask.sum(1).tolist() == [6, 6, 5]


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.6, 6])
def test_tome(keep):
    tokens, compressor = ragged_tokens(), ToMe(keep)
    out = compressor(tokens)
    for picture, count in enumerate((16, 9, 5)):
        x = tokens.hidden[picture, :count]
        members = {i: [i] for i in range(count)}
        while len(members) > compressor.num_tokens(count):
            places = sorted(members)
            means = {i: x[members[i]].mean(0) for i in places}
            pairs = []
            for a in places[::2]:
                b = max(places[1::2], key=lambda j: cosine(means[a], means[j]))
                pairs.append((cosine(means[a], means[b]), a, b))
            wanted = min(len(places) - compressor.num_tokens(count), len(places) // 2)
            for _, a, b in sorted(pairs, reverse=True)[:wanted]:
                members[b] += members.pop(a)
        expected = torch.stack([x[members[i]].mean(0) for i in sorted(members)])
        torch.testing.assert_close(out.hidden[picture][out.mask[picture]], expected)
        assert out.anchor[picture][out.mask[picture]].tolist() == sorted(members)


def in_a_model(plan: str, lengths, side: str = "right", grid: int = 4):
    """The tokens and what is left of them; the row, visual columns and text columns behind of each picture; states."""
    model, batch, watched = tiny_llava(grid=grid), ragged_batch(lengths, grid=grid, side=side), Watched()
    del batch["labels"]
    states = model(**batch, output_hidden_states=True).hidden_states
    with compress(model, plan, observe=watched):
        model(**batch)
    pictures = []
    for row, ids in enumerate(batch["input_ids"].tolist()):
        visual = [column for column, token in enumerate(ids) if token == IMAGE]
        behind = [
            column
            for column in range(visual[-1] + 1 if visual else 0, len(ids))
            if batch["attention_mask"][row, column]
        ]
        for first in range(0, len(visual), grid * grid):
            pictures.append((row, visual[first : first + grid * grid], behind))
    [(tokens, out)] = watched.calls
    return model, states, tokens, out, pictures


@pytest.mark.parametrize(("keep", "side"), [(0.2, "left"), (0.5, "right"), (12, "left")])
def test_cdpruner(keep, side):
    _, states, tokens, out, pictures = in_a_model(f"0:cdpruner:{keep}", [[3, 4], [2, 0, 5], [1, 3, 2]], side)
    for number, (row, visual, behind) in enumerate(pictures):
        x, words = states[0][row, visual].double(), states[0][row, behind].double()
        relevance = torch.tensor([sum(cosine(a, b) for b in words) / len(words) for a in x]).double()
        relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
        unit = F.normalize(x, dim=-1)
        kernel = relevance[:, None] * (unit @ unit.T) * relevance
        chosen: list[int] = []
        for _ in range(CDPruner(keep).num_tokens(16)):  # the largest determinant, computed as one
            rest = [i for i in range(16) if i not in chosen]
            chosen.append(max(rest, key=lambda i: torch.linalg.det(kernel[[*chosen, i]][:, [*chosen, i]])))
        assert out.anchor[number][out.mask[number]].tolist() == sorted(chosen)


def test_beyond_the_rank_of_the_kernel_as_many_tokens_are_left():
    model, batch, watched = tiny_llava(grid=8), ragged_batch([[3, 4]], grid=8), Watched()
    with compress(model, "0:cdpruner:50", observe=watched):  # of width 32
        out = model(**batch)
    assert watched.calls[0][1].mask.sum() == 50 and torch.isfinite(out.logits).all()


@pytest.mark.parametrize(
    ("keep", "image", "text", "side"),
    [(0.5, 4, 4, "left"), (12, 2, 3, "right"), (0.2, 3, 0, "left"), (0.5, 4, 4, "right")],
)
def test_dart(keep, image, text, side):
    plan = f"2:dart:{keep}:image_pivots={image}:text_pivots={text}"
    model, states, tokens, out, pictures = in_a_model(plan, [[3, 6], [2, 0, 5], [1, 3, 5]], side)
    language, budget = model.model.language_model, round(16 * keep) if keep < 1 else keep
    hooked = []
    hook = language.layers[1].self_attn.k_proj.register_forward_hook(lambda *call: hooked.append(call[-1]))
    batch = ragged_batch([[3, 6], [2, 0, 5], [1, 3, 5]], side=side)
    model(**{name: value for name, value in batch.items() if name != "labels"})
    hook.remove()
    width = language.config.head_dim
    for number, (row, visual, behind) in enumerate(pictures):
        cos, sin = language.rotary_emb(hooked[0], torch.arange(hooked[0].shape[1])[None])
        key = hooked[0][row].view(len(hooked[0][row]), -1, width)
        half = torch.cat([-key[..., width // 2 :], key[..., : width // 2]], dim=-1)
        norms = (key * cos[0][:, None] + half * sin[0][:, None]).abs().sum((1, 2))
        unit = F.normalize(language.norm(states[2])[row].double(), dim=-1)
        pivots = sorted(sorted(visual, key=lambda i: -norms[i])[:image])
        references = pivots + sorted(sorted(behind, key=lambda i: -norms[i])[:text])
        pool, kept = [i for i in visual if i not in pivots], list(pivots)
        for pivot in references:
            added = sorted(pool, key=lambda i: float(unit[i] @ unit[pivot]))[: budget // (image + text)]
            kept, pool = kept + added, [i for i in pool if i not in added]
        assert out.anchor[number][out.mask[number]].tolist() == sorted(visual.index(i) for i in kept)


def test_what_a_patch_receives_ranks_where_there_is_no_class_token():
    model, watched = tiny_llava(), Watched()
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    torch.manual_seed(0)
    tower = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=4, attn_implementation="eager"))
    model.model.vision_tower = tower.eval()
    for name in ("cls", "visionzip", "vispruner"):
        with compress(model, {"vision": parse_plan(f"vision:{name}:0.5")["vision"]}, observe=watched):
            batch = ragged_batch([[3, 4], [2, 0, 5]])
            model.model.vision_feature_select_strategy = model.config.vision_feature_select_strategy = "full"
            assert torch.isfinite(model(**batch).logits).all()
    maps = tower(batch["pixel_values"], output_attentions=True).attentions[-2]  # (I, heads, L, L)
    tokens = watched.calls[0][0]
    torch.testing.assert_close(tokens.salience(), maps.mean((1, 2)), rtol=1e-4, atol=1e-6)
    with pytest.raises(UnsupportedModel, match="no class token"):
        tokens.attention("class", layer="selected")


def test_patches_that_the_model_merges_are_ranked_by_their_mean():
    """As InternVL's own pixel shuffle merges them: each patch carries its number."""
    base = FAMILIES["internvl"]().model.model
    numbers = torch.arange(64.0).view(1, 8, 8, 1).repeat(1, 1, 1, 4)
    merged = base.pixel_shuffle(numbers, scale_factor=0.5).reshape(16, -1)
    layer = tower_tokens(1, 8, 8).probe.layers["last"]
    probe = TowerProbe({"last": layer}, 16, True)
    whole = TowerProbe({"last": layer}, 64, True).attention("class")[0]
    expected = [whole[row.long().unique()].mean() for row in merged]
    assert probe.fits and torch.allclose(probe.attention("class")[0], torch.stack(expected))
    assert not TowerProbe({"last": layer}, 17, True).fits


def test_a_layer_that_was_not_listed_is_refused():
    with pytest.raises(ValueError, match="list it in tower_layers"):
        tower_tokens(1, 3, 8).attention("class", layer=5)


def test_a_greedy_choice_stops_at_each_pictures_count():
    gain, mask = torch.tensor([[3.0, 1, 2], [1, 2, 3]]), torch.tensor([[True] * 3, [True, True, False]])
    kept = choose_greedily(torch.tensor([2, 1]), mask, gain, lambda step, chosen, gain: gain)
    assert kept.tolist() == [[True, False, True], [False, True, False]]


def test_gaps_close_where_they_can():
    """Positions "auto": at "vision" and layer 0, not from layer 1 on; what cannot be is refused."""
    model, batch = tiny_llava(), ragged_batch([[3, 4]])
    closed, open_ = ("0:divprune:4", "vision:cls:4"), ("0:divprune:4:original", "2:tome:4", "2:dart:8")
    for plan in (*closed, *open_):
        seen = []
        with compress(model, plan) as handle:
            last = model.model.language_model.layers[-1]
            note = last.register_forward_pre_hook(lambda *_, h=handle, s=seen: s.append(h._now.state.rows.positions))
            model(**batch)
            note.remove()
        positions = seen[0][0, :, 0].tolist()
        assert positions[:3] == [0, 1, 2] and sorted(set(positions)) == positions
        assert positions[-1] == (len(positions) - 1 if plan in closed else 3 + 16 + 4 - 1), plan
    for plan in ("2:divprune:4:contiguous", "1:tome:0.5:positions=contiguous"):
        with pytest.raises(PlanError, match="at 'vision' and layer 0 only; deeper, leave positions out"):
            compress(model, plan)


def test_the_question_of_packed_rows_is_refused():
    model, batch = tiny_llava(), ragged_batch([[3, 4]])
    length = batch["input_ids"].shape[1]
    batch["position_ids"] = torch.cat([torch.arange(length - 2), torch.arange(2)])[None]
    for plan in ("0:cdpruner:0.5", "1:dart:8"):
        with compress(model, plan), pytest.raises(UnsupportedModel, match="packed"):
            model(**batch)


def attention_of(model, layer: int, hidden: torch.Tensor) -> torch.Tensor:
    """(heads, T, T) causal attention of one row's states (T, C) in a layer of a tiny Llama, head by head."""
    language = model.model.language_model
    at, normed = language.layers[layer].self_attn, language.layers[layer].input_layernorm(hidden)
    cos, sin = (part[0] for part in language.rotary_emb(hidden[None], torch.arange(len(hidden))[None]))
    width = at.head_dim

    def split(linear):
        heads = linear(normed).view(len(hidden), -1, width).transpose(0, 1)
        return heads * cos + torch.cat([-heads[..., width // 2 :], heads[..., : width // 2]], -1) * sin

    query, key = split(at.q_proj), split(at.k_proj)
    key = key.repeat_interleave(len(query) // len(key), 0)
    scores = (query @ key.transpose(1, 2)) / width**0.5
    return scores.masked_fill(torch.ones(len(hidden), len(hidden)).triu(1).bool(), -torch.inf).softmax(-1)


def density_peaks(x: list[torch.Tensor], groups: int) -> list[list[int]]:
    """Members of each group of x, one by one; of equally dense ones the first is denser."""
    places, width = range(len(x)), len(x[0])
    away = [[float((a.double() - b.double()).norm()) / width**0.5 for b in x] for a in x]
    density = []
    for i in places:
        nearest = sorted(away[i])[:groups]
        density.append((-sum(d * d for d in nearest) / len(nearest), -i))
    score = []
    for i in places:
        denser = [away[i][j] for j in places if density[j] > density[i]]
        score.append(math.exp(density[i][0]) * (min(denser) if denser else max(map(max, away))))
    centres = sorted(places, key=lambda i: -score[i])[:groups]
    members = {centre: [] for centre in centres}
    for i in places:
        members[i if i in members else min(centres, key=lambda c: away[i][c])].append(i)
    return [members[centre] for centre in centres]


def test_clusters_far_apart_are_found():
    """Two of random tokens, and far from all others; alone, and beside a longer row."""
    generator = torch.Generator().manual_seed(0)
    for shift in (2.0, 100.0):
        for trial in range(20):
            which = torch.rand(12, generator=generator) < 0.5
            hidden = 0.1 * torch.randn(2, 40, 8, generator=generator)
            hidden[0, :12] += shift * which[:, None]
            chosen = torch.arange(40) < torch.tensor([[12], [25 if trial % 2 else 40]])
            means, count, cluster = merge_by_density(hidden, chosen)
            assert count.tolist() == [2, 3 if trial % 2 else 5]
            assert len(set(zip(which.tolist(), cluster[0, :12].tolist(), strict=True))) == 2
            expected = hidden[0, :12][which == which[0]].mean(0)
            torch.testing.assert_close(means[0, cluster[0, 0]], expected)


@pytest.mark.parametrize("shift", [1.0, 30.0])
def test_tokens_are_clustered_in_a_batch_as_alone(shift):
    generator = torch.Generator().manual_seed(0)
    hidden = shift * torch.randn(24, 48, 32, generator=generator)
    count = torch.randint(1, 49, (24, 1), generator=generator)
    count[::2] = torch.randint(10, 20, (12, 1), generator=generator)  # two groups
    chosen = torch.rand(24, 48, generator=generator).argsort(1) < count
    means, groups, cluster = merge_by_density(hidden, chosen)
    for row in range(24):
        one, number, of_one = merge_by_density(hidden[row : row + 1], chosen[row : row + 1])
        assert number == groups[row] and torch.equal(of_one[0], cluster[row])
        torch.testing.assert_close(one[0, :number], means[row, :number])
        places = chosen[row].nonzero()[:, 0]
        expected = density_peaks(list(hidden[row, places]), int(number)) if shift < 2 else ()
        for group in expected:
            assert len(cluster[row, places[group]].unique()) == 1


@pytest.mark.parametrize(("keep", "recycle"), [(0.2, True), (0.5, True), (4, True), (0.5, False)])
def test_sparsevlm(keep, recycle):
    plan = f"2:sparsevlm:{keep}:recycle={str(recycle).lower()}"
    lengths, grid = [[3, 6], [2, 0, 5], [1, 3, 5]], 8 if keep == 4 else 6  # two groups, one
    model, states, tokens, out, pictures = in_a_model(plan, lengths, grid=grid)
    batch, whole = ragged_batch(lengths, grid=grid), torch.ones(1, grid**2, dtype=torch.bool)
    for number, (row, visual, behind) in enumerate(pictures):
        v, t = states[0][row, visual], states[0][row, behind]
        weight = (v @ t.T).softmax(-1).mean(0)
        raters = [column for column, w in zip(behind, weight, strict=True) if w > weight.mean()]
        real = batch["attention_mask"][row].bool()
        score = attention_of(model, 2, states[2][row][real])[:, raters].mean((0, 1))[visual]
        best = ranked(score)
        kept = sorted(best[: SparseVLM(keep).budget(whole).item()])
        expected = [states[2][row, visual[i]] for i in kept]
        if recycle:
            dropped = [i for i in best if i not in kept]
            again = sorted(dropped[: int(0.3 * len(dropped)) + 1])
            x = [states[2][row, visual[i]] for i in again]
            groups = density_peaks(x, len(x) // 10 + 1)
            expected += [torch.stack([x[i] for i in group]).mean(0) for group in groups]
        assert len(expected) == SparseVLM(keep, recycle=recycle).num_tokens(grid**2)
        found = out.hidden[number][out.mask[number]]
        torch.testing.assert_close(found[: len(kept)], torch.stack(expected[: len(kept)]), rtol=1e-4, atol=1e-5)
        found, merged = found[len(kept) :], expected[len(kept) :]
        if recycle:
            slots = range(int(out.mask[number].sum()))
            means = [tokens.hidden[number][out.group[number] == slot].mean(0) for slot in slots]
            torch.testing.assert_close(out.hidden[number][out.mask[number]], torch.stack(means), rtol=1e-4, atol=1e-5)
        for mean in merged:  # in any order
            assert (found - mean).abs().amax(1).min() < 1e-4


def test_sparsevlm_in_three_layers_asks_the_same_words():
    model, batch, watched = tiny_llava(grid=6), ragged_batch([[3, 6], [2, 1, 5]], grid=6), Watched()
    with compress(model, "1:sparsevlm:20;2:sparsevlm:9;3:sparsevlm:4", observe=watched):
        loss = model(**batch).loss
    assert torch.isfinite(loss)
    raters = [SparseVLM().raters(tokens) for tokens, _ in watched.calls]
    assert all((one == raters[0]).all() for one in raters)


@pytest.mark.parametrize(
    ("grid", "keep", "window"),
    in_turn(GRIDS, BUDGETS, [2, 6, 6, 2, 6, 2]),
)
def test_vscan(grid, keep, window):
    tokens, compressor = tower_tokens(3, grid, 128), VScan(keep, window=window)
    generator = torch.Generator().manual_seed(1)
    tokens.probe.layers["early"].key += torch.randn(tokens.probe.layers["early"].key.shape, generator=generator)
    out, total = compressor(tokens), compressor.num_tokens(grid * grid)
    for picture in range(3):
        x, early = tokens.hidden[picture], tokens.salience("early")[picture].tolist()
        late, places = tokens.salience("selected")[picture].tolist(), range(grid * grid)
        windows: dict = {}
        for i in places:
            windows.setdefault((i // grid // window, i % grid // window), []).append(i)
        each = total // 2 // len(windows)
        kept = [i for members in windows.values() for i in sorted(members, key=lambda i: -early[i])[:each]]
        kept += sorted((i for i in places if i not in kept), key=lambda i: -early[i])[: total // 2 - len(kept)]
        kept += sorted((i for i in places if i not in kept), key=lambda i: -late[i])[: total - len(kept)]
        kept.sort()
        members = {i: [i] for i in kept}
        for i in (i for i in places if i not in kept):
            members[max(kept, key=lambda k: cosine(x[i], x[k]))].append(i)
        assert out.anchor[picture].tolist() == kept
        expected = torch.stack([x[members[i]].mean(0) for i in kept])
        torch.testing.assert_close(out.hidden[picture], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("grid", "keep", "crops", "shape"),
    in_turn([7, 6, 7, 3, 7, 6], BUDGETS, [4, 9, 5], ["square", "square", "rows"]),
)
def test_holov(grid, keep, crops, shape):
    tokens, compressor = tower_tokens(3, grid, 128), HoloV(keep, crops=crops, shape=shape)
    out, total, places = compressor(tokens), compressor.num_tokens(grid * grid), range(grid * grid)
    side = round(crops**0.5)
    for picture in range(3):
        x, a = tokens.hidden[picture], [1000 * float(v) for v in tokens.salience()[picture]]
        parts: list[list[int]] = [[] for _ in range(crops)]
        for i in places:
            row, column = divmod(i, grid)
            parts[i * crops // len(x) if shape == "rows" else row * side // grid * side + column * side // grid].append(
                i
            )
        variance = {}
        for part in parts:
            for i in part:
                alike = [0 if i == j else cosine(x[i], x[j]) for j in part]
                mean = sum(alike) / len(part)
                variance[i] = sum((s - mean) ** 2 for s in alike) / max(len(part) - 1, 1)
        scale = sum(a) / sum(variance.values()) if sum(variance.values()) else 0
        score = [sum(a[i] + 0.09 * scale * variance[i] for i in part) / max(len(part), 1) for part in parts]
        share = [int(total * s / sum(score)) for s in score]
        best = sorted((c for c in range(crops) if parts[c]), key=lambda c: -score[c])
        for c in best[: total - sum(share)]:
            share[c] += 1
        share = [min(n, len(part)) for n, part in zip(share, parts, strict=True)]
        for c in best:
            share[c] += min(total - sum(share), len(parts[c]) - share[c])
        kept = [i for part, n in zip(parts, share, strict=True) for i in sorted(part, key=lambda i: -a[i])[:n]]
        assert len(kept) == total and out.anchor[picture].tolist() == sorted(kept)


@pytest.mark.parametrize(
    ("keep", "cutoff", "recover", "side"),
    [(0.55, 0.3, 1.5, "left"), (0.8, 0.6, 1.0, "right"), (1.0, 1.0, 1.5, "left")],
)
def test_pact(keep, cutoff, recover, side):
    lengths = [[3, 6], [2, 0, 5], [1, 3, 5]]
    model, states, tokens, out, pictures = in_a_model(f"1:pact:{keep}:{cutoff}:{recover}", lengths, side)
    language, real = model.model.language_model, ragged_batch(lengths, side=side)["attention_mask"].bool()
    at, norm = language.layers[1].self_attn, language.layers[1].input_layernorm
    for number, (row, visual, _) in enumerate(pictures):
        upto = [column for column in range(visual[-1] + 1) if real[row, column]]
        normed = norm(states[1][row])
        query = at.q_proj(normed).view(len(normed), -1, at.head_dim)[upto].mean(0)
        key = at.k_proj(normed).view(len(normed), -1, at.head_dim)
        given = []
        for head in range(len(query)):
            keys = key[upto][:, head * key.shape[1] // len(query)]
            given.append((keys @ query[head] / at.head_dim**0.5).softmax(0))
        given = torch.stack(given).mean(0)[[upto.index(i) for i in visual]]
        h = states[1][row, visual]
        kept = sorted(ranked(given * h.norm(dim=-1))[: round(keep * 16)])
        cos, sin = language.rotary_emb(h[None], torch.arange(len(normed))[None])
        half = torch.cat([-key[..., at.head_dim // 2 :], key[..., : at.head_dim // 2]], dim=-1)
        rotated = (key * cos[0][:, None] + half * sin[0][:, None]).flatten(1)[visual]
        away = [[1 - cosine(a, b) for b in rotated] for a in rotated]
        density = {i: sum(torch.tensor(-((away[i][j] / 2) ** 2)).exp().item() for j in kept) for i in kept}
        centres: list[int] = []
        for i in sorted(kept, key=lambda i: -density[i]):
            if all(away[i][c] > cutoff for c in centres):
                centres.append(i)
        members: dict[int, list[int]] = {c: [] for c in sorted(centres)}
        for i in range(16):
            nearest = i if i in members else min(centres, key=lambda c: away[i][c])
            if i in kept or away[i][nearest] <= recover * cutoff:
                members[nearest].append(i)
        mask = out.mask[number]
        assert out.anchor[number][mask].tolist() == list(members)
        expected = torch.stack([h[group].mean(0) for group in members.values()])
        torch.testing.assert_close(out.hidden[number][mask], expected, rtol=1e-4, atol=1e-5)
        assert out.size[number][mask].tolist() == [len(group) for group in members.values()]


@pytest.mark.parametrize("calibration", [0, 2.0, 3])
def test_restore(calibration):
    tokens = ragged_tokens()
    inner = DivPrune(5)
    out = Restore(inner, calibration=calibration)(tokens)
    for picture, count in enumerate((16, 9, 5)):
        x, chosen = tokens.hidden[picture, :count], inner(tokens)
        kept = chosen.anchor[picture][chosen.mask[picture]].tolist()
        members = {i: [i] for i in kept}
        for i in (i for i in range(count) if i not in kept):
            members[max(kept, key=lambda k: cosine(x[i], x[k]))].append(i)
        mask, groups = out.mask[picture], [sorted(members[i]) for i in kept]
        assert out.anchor[picture][mask].tolist() == kept
        torch.testing.assert_close(out.hidden[picture][mask], torch.stack([x[group].mean(0) for group in groups]))
        assert out.positions[picture, :, 0][mask].tolist() == [group[(len(group) - 1) // 2] for group in groups]
        assert out.size[picture][mask].tolist() == [len(group) for group in groups]
        if calibration:
            marks = out.calibration[picture][mask].tolist()
            assert marks == [calibration if len(group) > 1 else 0 for group in groups]
        else:
            assert out.calibration is None


@pytest.mark.parametrize(
    "plan", ["0:restore:restore:divprune:2", "1:restore:withdraw", "1:restore:calibration=0.5:tome"]
)
def test_what_restore_cannot_go_around(plan):
    with pytest.raises(PlanError, match="restore"):
        parse_plan(plan)


def test_restore_reads_back_as_it_is_written():
    for text in ("0:restore:holov:64:auto:16:0.09:square", "1:restore:calibration=0:divprune:0.3:auto"):
        assert format_plan(parse_plan(text)) == text
        assert parse_plan(format_plan(parse_plan(text))) == parse_plan(text)
    assert parse_plan("0:restore:calibration=3") == {0: Restore(calibration=3)}  # around the default
    assert format_plan({1: PACT(proportional=False)}) == "1:pact:0.55:0.21:1.5:proportional=false"


@torch.no_grad()
def test_what_a_tower_of_packed_patches_gives_is_known_at_layer_0():
    """Qwen2.5-VL: images and clips of unlike sizes, in windows; against attention of its last block, image by image."""
    family = FAMILIES["qwen2_5_vl"]()
    tower, watched, calls, outputs = family.model.model.visual, Watched(), [], []
    attention = tower.blocks[-1].attn
    hooks = [
        attention.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True),
        tower.register_forward_hook(lambda m, args, out: outputs.append((out.last_hidden_state, out.pooler_output))),
    ]
    with compress(family.model, "0:cls:0.5", observe=watched):
        family.model(**family.batch)
    for hook in hooks:
        hook.remove()

    ids = family.batch["input_ids"].reshape(-1)
    expected, config = torch.zeros(len(ids)), family.model.config
    for (args, given), (last, pooled), token in zip(
        calls, outputs, (config.image_token_id, config.video_token_id), strict=True
    ):
        hidden = given.get("hidden_states", args[0] if args else None)
        query, key, _ = attention.qkv(hidden).view(len(hidden), 3, attention.num_heads, -1).unbind(1)
        cos, sin = (part[:, None] for part in given["position_embeddings"])
        width, received = query.shape[-1], torch.zeros(len(hidden))
        query, key = (
            x * cos + torch.cat([-x[..., width // 2 :], x[..., : width // 2]], -1) * sin for x in (query, key)
        )
        ends = given["cu_seqlens"].tolist()
        for start, end in zip(ends, ends[1:], strict=False):
            maps = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) / width**0.5
            received[start:end] = maps.softmax(-1).mean((0, 1))
        pooled = torch.cat(list(pooled)) if isinstance(pooled, tuple) else pooled
        order = torch.cdist(pooled, tower.merger(last)).argmin(1)  # which merged patches became which token
        expected[ids == token] = received.view(-1, tower.spatial_merge_size**2).mean(1)[order]
    [(tokens, _)] = watched.calls
    found, rows = tokens.salience(), tokens.probe.images
    torch.testing.assert_close(found[tokens.mask], expected[rows[tokens.mask]], rtol=1e-4, atol=1e-6)
    assert len(found[tokens.mask].unique()) > 5


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_the_tiles_of_an_image_are_told_apart_at_layer_0(name):
    """Each patch carries its own number through the model's packing, newlines and all."""
    family = FAMILIES[name]()
    if name == "llava_onevision":  # without its clip
        family.batch = {key: value[:1] for key, value in family.batch.items() if "videos" not in key}
    base, watched, numbers = family.model.model, Watched(), []

    def count(module, args, output):  # in place of the projector's output
        n = output.shape[0] * output.shape[1]
        numbers.append(torch.arange(1.0, n + 1).view(*output.shape[:2], 1).expand_as(output) + 0)
        return numbers[-1]

    hook = base.multi_modal_projector.register_forward_hook(count)
    with compress(family.model, "0:cls:0.5", observe=watched):
        family.model(**family.batch)
    hook.remove()
    [(tokens, _)] = watched.calls
    layer = tokens.probe.tower.layers["selected"]
    first = 0 if name == "llava_onevision" else 1  # a class token
    flat = layer.attention(slice(0, first or None), True)[:, first:].reshape(-1)
    which = tokens.hidden[..., 0].round().long()  # the patch that each token was, newlines aside
    isnumber = (which >= 1) & (which <= len(flat)) & (tokens.hidden == tokens.hidden[..., :1]).all(-1) & tokens.mask
    assert isnumber.sum() >= 80 and not isnumber[tokens.mask].all()
    torch.testing.assert_close(tokens.salience()[isnumber], flat[which[isnumber] - 1])
    assert (tokens.salience()[tokens.mask & ~isnumber] == 0).all()
