"""PruMerge and PruMerge+ against a slow loop, the stock tower and the stock language model."""

from __future__ import annotations

import pytest
import torch
from benchmarks.methods import prumerge_loop, tower_tokens
from families_tiny import FAMILIES
from tiny import IMAGE, Watched, ragged_batch, tiny_llava
from transformers import CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from llavolta import PruMerge, PruMergePlus, UnsupportedModel, compress, parse_plan, tokens_per_layer
from llavolta.compression.probe import TowerLayer, TowerProbe

RAGGED = [[3, 4], [2, 0, 5], [6], [1, 3, 2]]  # one image, two in a row, none, two apart
both = pytest.mark.parametrize("kind", [PruMerge, PruMergePlus])


def assert_like_loop(compressor: PruMerge, tokens) -> torch.Tensor:
    """Returns how many tokens are left of each image."""
    out = compressor(tokens)
    expected = prumerge_loop(tokens, isinstance(compressor, PruMergePlus), compressor.neighbours)
    assert out.mask.sum(1).tolist() == [len(merged) for merged in expected]
    for hidden, mask, merged in zip(out.hidden, out.mask, expected, strict=True):
        torch.testing.assert_close(hidden[mask], merged, rtol=1e-5, atol=1e-5)
    assert ((out.anchor.diff(dim=1) > 0) | ~out.mask[:, 1:]).all()
    return out.mask.sum(1)


@both
@pytest.mark.parametrize(
    ("images", "grid", "width", "neighbours"),
    [(8, 8, 12, 32), (1, 5, 40, 32), (8, 6, 7, 3)],
)
def test_equals_the_loop(kind, images, grid, width, neighbours):
    left = assert_like_loop(kind(neighbours=neighbours), tower_tokens(images, grid, width))
    assert images == 1 or left.min() < left.max()  # ragged


@pytest.mark.parametrize(("kind", "grid"), [(PruMerge, 24), (PruMergePlus, 12)])
def test_equals_the_loop_at_as_many_tokens_as_models_have(kind, grid):
    assert_like_loop(kind(), tower_tokens(1, grid, 16))


@both
def test_equals_the_loop_without_outliers(kind):
    tokens = tower_tokens(3, 8, 12)
    last = tokens.probe.layers["last"]
    last.query[0, 0] = 0  # all attention equal
    last.key[1, :, 0], last.query[1, 0] = torch.arange(65) / 65, torch.eye(12)[0]  # rising evenly
    left = assert_like_loop(kind(), tokens).tolist()
    uniform = 4 if kind is PruMergePlus else 0  # of 64: every 21st
    assert left[:2] == [uniform + 1] * 2 and left[2] > uniform + 1
    if kind is PruMerge:
        out = kind(weights="normalised")(tokens)
        torch.testing.assert_close(out.hidden[0, 0], tokens.hidden[0].mean(0))


@both
def test_one_token_alone_stays(kind):
    assert_like_loop(kind(), tower_tokens(2, 1, 4))


def test_the_kept_tokens_and_the_extra_one_by_hand():
    tokens = tower_tokens(1, 3, 4)
    last = tokens.probe.layers["last"]
    last.query[0, 0] = torch.tensor([1.0, 0, 0, 0])
    last.key[0, :, 0] = torch.tensor([0.0, 0, 0, 0, 0, 9, 0, 0, 0, 9])  # patches 4 and 8 are outliers
    out = PruMerge(neighbours=0)(tokens)
    assert out.anchor.tolist() == [[4, 7, 8]] and out.group.tolist() == [[2, 2, 2, 2, 0, 2, 2, 2, 1]]
    assert torch.equal(out.hidden[0, :2], tokens.hidden[0, [4, 8]])
    even = torch.softmax(last.key[0, :, 0] / 2, 0)[1]
    rest = tokens.hidden[0, [0, 1, 2, 3, 5, 6, 7]].sum(0) * even
    torch.testing.assert_close(out.hidden[0, 2], rest)
    normalised = PruMerge(neighbours=0, weights="normalised")(tokens)
    torch.testing.assert_close(normalised.hidden[0, 2], rest / (7 * even))


@both
@pytest.mark.parametrize("keep", [0.01, 0.05, 0.11, 0.25, 0.5, 0.99])
def test_a_fixed_share_is_the_same_for_every_image(kind, keep):
    tokens, compressor = tower_tokens(6, 8, 12), kind(keep)
    out = compressor(tokens)
    count = max(1, round(64 * keep))
    assert out.mask.sum(1).tolist() == [count] * 6 == [compressor.num_tokens(64)] * 6
    attention = tokens.attention("class")
    kept = compressor.kept(attention)
    top = count - 1 if kind is PruMerge else (count - 1) // 4
    for scores, chosen in zip(attention, kept, strict=True):
        best = sorted(range(64), key=lambda i: -scores[i].item())[:top]
        assert chosen[best].all()
        others = [i for i in range(64) if i not in best]
        gaps = torch.tensor([n for n, i in enumerate(others) if chosen[i]]).diff()
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1  # evenly spread


def test_normalised_weights_keep_the_scale_of_features():
    tokens = tower_tokens(4, 8, 12)
    tokens.hidden[:] = 3.0
    for kind in (PruMerge, PruMergePlus):
        out = kind(weights="normalised")(tokens)
        torch.testing.assert_close(out.hidden[out.mask], torch.full_like(out.hidden[out.mask], 3.0))


def test_plans():
    assert parse_plan("vision:prumerge+:0.25") == {"vision": PruMergePlus(0.25)}
    assert parse_plan("vision:prumerge:keep=0.5:positions=original") == {"vision": PruMerge(0.5, positions="original")}
    assert tokens_per_layer("vision:prumerge", 2, 576) == pytest.approx([31.68, 31.68])
    assert tokens_per_layer("vision:prumerge+", 2, 576) == [144, 144]
    assert PruMerge(1.0).is_identity and not PruMerge().is_identity
    for bad in (dict(keep="most"), dict(keep=True), dict(weights="even"), dict(positions="last"), dict(neighbours=-1)):
        with pytest.raises(ValueError, match="prumerge: "):
            PruMerge(**bad)


# --- in a model ---


def with_tower(depth: int, width: int, grid: int, heads: int = 2):
    """A tiny LLaVA with another tower."""
    model = tiny_llava(grid=grid)
    config = model.config.vision_config
    config.num_hidden_layers, config.hidden_size, config.num_attention_heads = depth, width, heads
    torch.manual_seed(depth)
    model.model.vision_tower = CLIPVisionModel(config).eval()
    for parameter in model.model.vision_tower.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.model.multi_modal_projector.linear_1 = torch.nn.Linear(width, 32)
    return model


@both
@pytest.mark.parametrize(
    ("depth", "width", "grid", "images"),
    [(1, 8, 5, 8), (3, 16, 4, 1), (5, 24, 6, 3)],
)
def test_the_tower_gives_its_own_last_layer(kind, depth, width, grid, images):
    """Queries and keys written down from the stock tower; features of the layer that the model selects."""
    model, watched = with_tower(depth, width, grid), Watched()
    batch = ragged_batch([[2] * (images + 1)], grid=grid)
    with compress(model, {"vision": kind()}, observe=watched):
        model(**batch)
    [(tokens, out)] = watched.calls
    tower = model.model.vision_tower
    states = tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    attention = tower.encoder.layers[-1].self_attn
    normed = tower.encoder.layers[-1].layer_norm1(states[-2])
    by_hand = tower_tokens(images, grid, width)
    by_hand.hidden = states[-2][:, 1:].detach()
    layer = TowerLayer(attention.q_proj(normed).detach(), attention.k_proj(normed).detach(), 2)
    by_hand.probe = TowerProbe({"last": layer}, grid**2, True)
    expected = prumerge_loop(by_hand, kind is PruMergePlus)
    assert out.mask.sum(1).tolist() == [len(merged) for merged in expected]
    for hidden, mask, merged in zip(out.hidden, out.mask, expected, strict=True):
        torch.testing.assert_close(hidden[mask], merged, rtol=1e-5, atol=1e-5)


def shortened(model, batch: dict, plan: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per row the embeddings of text and remaining tokens (1, T', C), and the columns of the text among them."""
    watched = Watched()
    with compress(model, {"vision": parse_plan(plan)["vision"]}, observe=watched):
        model.model.get_image_features(pixel_values=batch["pixel_values"])
    [(_, left)] = watched.calls
    images = iter([model.model.multi_modal_projector(h[m]) for h, m in zip(left.hidden, left.mask, strict=True)])
    embed, rows = model.get_input_embeddings(), []
    for ids, real in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        parts, text, column = [], [], 0
        while column < len(ids):
            if ids[column] == IMAGE:
                parts.append(next(images))
                column += 36
                continue
            if real[column]:
                text.append(sum(map(len, parts)))
                parts.append(embed(ids[column : column + 1]))
            column += 1
        rows.append((torch.cat(parts)[None], torch.tensor(text)))
    return rows


@pytest.mark.parametrize(
    ("plan", "side"),
    [
        ("vision:prumerge", "left"),
        ("vision:prumerge+", "right"),
        ("vision:prumerge+:0.3:normalised", "left"),
    ],
)
@torch.no_grad()
def test_contiguous_positions_equal_feeding_the_shorter_sequence(plan, side):
    model, batch = tiny_llava(grid=6), ragged_batch(RAGGED, grid=6, side=side)
    rows, settings = shortened(model, batch, plan), dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    settings |= dict(eos_token_id=None, suppress_tokens=[IMAGE])
    with compress(model, plan):
        got = model(**batch).logits
        prompt = {name: value for name, value in batch.items() if name != "labels"}
        told = model.generate(**prompt, **settings)[:, -6:] if side == "left" else None
    for row, (embeds, text) in enumerate(rows):
        expected = model(inputs_embeds=embeds).logits[0, text]
        columns = (batch["input_ids"][row] != IMAGE) & batch["attention_mask"][row].bool()
        torch.testing.assert_close(got[row, columns], expected, rtol=1e-4, atol=1e-4)
        if told is not None:
            assert torch.equal(model.generate(inputs_embeds=embeds, **settings)[0], told[row])


def positions_at_layer_0(model, batch, plan) -> torch.Tensor:
    seen = []
    with compress(model, plan) as handle:
        layer = model.model.language_model.layers[0]
        hook = layer.register_forward_pre_hook(lambda *_: seen.append(handle._now.state.rows.positions[..., 0]))
        model(**batch)
        hook.remove()
    return seen[0]


def test_positions_of_text_stay_or_move_up():
    model, batch = tiny_llava(grid=6), ragged_batch([[3, 2, 4]], grid=6)
    original = positions_at_layer_0(model, batch, "vision:prumerge:0.25:positions=original")[0]
    contiguous = positions_at_layer_0(model, batch, "vision:prumerge:0.25")[0]
    assert contiguous.tolist() == list(range(3 + 9 + 2 + 9 + 4))
    assert original[[0, 1, 2]].tolist() == [0, 1, 2] and original[[12, 13]].tolist() == [39, 40]
    assert original[-4:].tolist() == [77, 78, 79, 80] and original[11] == 38 and original[22] == 76  # extra tokens
    assert (original.diff() > 0).all()


def test_an_unfrozen_tower_is_trained_and_a_frozen_one_is_not():
    batch, gradients = ragged_batch(RAGGED), {}
    for frozen in (False, True):
        model = tiny_llava().train()
        model.model.vision_tower.requires_grad_(not frozen)
        with compress(model, "vision:prumerge+:0.5"):
            model(**batch).loss.backward()
        gradients[frozen] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    tower = [name for name in gradients[False] if "vision_tower" in name]
    assert any(gradients[False][name].abs().max() > 0 for name in tower)
    assert not any("vision_tower" in name for name in gradients[True])
    for name, gradient in gradients[True].items():
        assert torch.equal(gradient, gradients[False][name]) and torch.isfinite(gradient).all()


def test_towers_that_cannot_rank_patches_say_so():
    siglip = tiny_llava()
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    siglip.model.vision_tower = SiglipVisionModel(SiglipVisionConfig(**vision, image_size=16, patch_size=4))
    with pytest.raises(UnsupportedModel, match=r"vision_tower \(SiglipVisionModel\) has no class token"):
        compress(siglip, "vision:prumerge")
    with compress(siglip, "vision:kmeans:0.5"):
        pass
    assert not [h for m in siglip.modules() for h in (m._forward_hooks, m._forward_pre_hooks) if h]


def test_the_class_token_of_a_clip_is_one_of_its_tokens():
    """Video-LLaVA feeds 17 tokens of each frame to the language model; the first is the class token."""
    family, watched = FAMILIES["video_llava"](), Watched()
    with compress(family.model, {"vision": PruMerge(0.3)}, observe=watched):
        family.model(**family.batch)
    images, frames = sorted(watched.calls, key=lambda call: call[0].mask.shape[1])
    assert [call[0].mask.shape for call in (images, frames)] == [(2, 16), (2, 17)]
    for tokens, _ in (images, frames):
        last = tokens.probe.layers["last"]
        full = torch.softmax((last.key @ last.query[:, 0, :, None])[..., 0] / 16**0.5, 1)
        torch.testing.assert_close(tokens.attention("class"), full[:, -tokens.mask.shape[1] :])
        assert torch.equal(tokens.keys(), last.key[:, -tokens.mask.shape[1] :])
        with pytest.raises(ValueError, match="exist at decoder layers"):
            tokens.rows()
