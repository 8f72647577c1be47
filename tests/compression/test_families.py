"""Every supported family through the same tests, on tiny random models; see families_tiny."""

from __future__ import annotations

import re

import pytest
import torch
from families_tiny import FAMILIES, IMAGE, VIDEO, pool_by_hand
from transformers import DynamicCache

from llavolta import AveragePool, PlanError, UnsupportedModel, compress
from llavolta.compression.families import find_parts, pools_frames
from llavolta.studies.budgets import plans_at

every_family = pytest.mark.parametrize("name", list(FAMILIES))
NUMBER = {name: number for number, name in enumerate(FAMILIES)}


class PoolAll(AveragePool):
    """Average pooling whose stride 1 goes through all the machinery."""

    name = ""
    is_identity = False


def step(model, batch) -> tuple:
    """The output of a training step, and its gradients by parameter."""
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradients(model, batch) -> dict[str, torch.Tensor]:
    return step(model, batch)[1]


def assert_same(a: dict, b: dict, exact: bool = False):
    assert a.keys() == b.keys()
    for name in a:
        if exact:
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5, msg=name)


def prompt(family) -> dict:
    return {name: value for name, value in family.batch.items() if name != "labels"}


GREEDY = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
GREEDY |= dict(return_dict_in_generate=True, output_logits=True)
GREEDY |= dict(suppress_tokens=[IMAGE, VIDEO])  # a random model writes placeholders


@every_family
@pytest.mark.parametrize(("side", "units"), [("left", "pictures"), ("right", "clips")])
def test_pictures_are_the_ones_written_down_by_hand(name, side, units):
    family, seen = FAMILIES[name](side), []

    class Spy(PoolAll):
        name = ""
        over_clips = units == "clips"

        def __call__(self, tokens):
            length = family.batch["input_ids"].shape[1]
            starts = tokens.probe.images[:, 0].tolist()
            seen.append(
                [(s // length, s % length, n) for s, n in zip(starts, tokens.mask.sum(1).tolist(), strict=True)]
            )
            lead = name == "video_llava" and (tokens.mask.sum(1) == 17 * tokens.frames)  # a class token in each
            assert (tokens.grid.prod(1) * tokens.frames == tokens.mask.sum(1) - tokens.frames * lead).all()
            return super().__call__(tokens)

    with compress(family.model, {1: Spy(2)}):
        family.model(**family.batch)
    assert seen == [[(row, s, n) for row, row_units in enumerate(getattr(family, units)) for s, n in row_units]]


@every_family
@pytest.mark.parametrize(("layer", "units"), [(0, "clips"), (2, "pictures")])
def test_pooling_equals_pooling_by_hand(name, layer, units):
    family, pool = FAMILIES[name]("left", "eager"), AveragePool(3, per_frame=units == "pictures")
    expected = pool_by_hand(family, layer, 3, by=units)
    with compress(family.model, {layer: pool}):
        out = family.model(**family.batch)
    for row, (columns, logits) in enumerate(expected):
        torch.testing.assert_close(out.logits[row, columns], logits, rtol=1e-4, atol=1e-4)
    fast = FAMILIES[name]("left", "sdpa")
    with compress(fast.model, {layer: pool}):
        torch.testing.assert_close(fast.model(**fast.batch).loss, out.loss, rtol=1e-4, atol=1e-4)


@every_family
def test_what_removes_nothing_equals_stock(name):
    """Stride 1 bit for bit; pooling by one on the compressed path and labelled rows, nearly."""
    family = FAMILIES[name]()
    model, batch = family.model.train(), family.batch
    stock, stock_gradients = step(model, batch)
    parts = [part for part, grad in stock_gradients.items() if grad.abs().max() > 0]
    assert any(word in part for part in parts for word in ("vision", "visual", "tower"))
    with compress(model, "1:avgpool:1"):
        same, same_gradients = step(model, batch)
    assert_same(same_gradients, stock_gradients, exact=True)
    assert torch.equal(stock.loss, same.loss) and torch.equal(stock.logits, same.logits)
    for plan, labelled_only in (({1: PoolAll(1)}, False), ("none", True)):
        with compress(model, plan, labelled_only=labelled_only):
            assert_same(gradients(model, batch), stock_gradients)


@every_family
def test_labelled_rows_are_counted_as_in_the_whole_batch(name):
    family = FAMILIES[name]()
    model, batch = family.model.train(), family.batch
    for plan in ("none", "1:avgpool:3"):
        found = []
        for labelled_only in (False, True):
            with compress(model, plan, labelled_only=labelled_only), torch.no_grad():
                found.append(model(**batch, num_items_in_batch=7))
        full, short = found
        torch.testing.assert_close(short.loss, full.loss)
        assert short.logits.shape[:2] == (1, int((batch["labels"][:, 1:] != -100).sum()) + 1)


@every_family
@pytest.mark.parametrize("plan", ["0:avgpool:3", "1:avgpool:2;3:random:0.5"])
def test_generation_with_a_cache_equals_generation_without(name, plan):
    family = FAMILIES[name]("left")
    model, cache = family.model, DynamicCache()  # one that keeps every token, also in sliding-window layers
    with compress(model, plan):
        slow = model.generate(**prompt(family), **GREEDY, use_cache=False)
        fast = model.generate(**prompt(family), **GREEDY, past_key_values=cache)
    assert torch.equal(slow.sequences, fast.sequences)
    for a, b in zip(slow.logits, fast.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    lengths = [layer.keys.shape[-2] for layer in cache.layers]
    assert lengths == sorted(lengths, reverse=True) and lengths[0 if plan[0] == "0" else 1] < lengths[0] + (
        plan[0] == "0"
    )


OTHERS = {  # what studies.budgets.METHODS has not
    "2-D pooling": "1:avgpool2d:2",
    "3-D pooling": "1:avgpool3d:2:2",
    "RESTORE without calibration, withdrawal": "1:restore:calibration=0:divprune:0.5;3:withdraw",
}


@every_family
def test_every_method_trains_checkpointed_and_on_labelled_rows_as_it_does_plainly(name):
    """3-D positions, deep-stack features, tiles, several towers; what cannot be done is refused.

    Pooling is compared with its checkpointed pass in every family, other methods in a third.
    """
    family, refused = FAMILIES[name](), {}
    model, batch = family.model.train(), family.batch
    projects = find_parts(model).projector is not None and not name.startswith("mistral")
    plans = dict(plans_at([0.5], 4, 16)[["method", "plan"]].itertuples(index=False)) | OTHERS
    for number, (method, plan) in enumerate(plans.items()):
        if not projects or pools_frames(find_parts(model).base):
            plan = plan.replace("vision:", "0:")  # as the refusal of 'vision' says
        try:
            torch.manual_seed(0)
            with compress(model, plan, labelled_only=False):
                plain = gradients(model, batch)
        except (UnsupportedModel, PlanError) as error:
            refused[method] = str(error)
            continue
        assert plain and all(grad.isfinite().all() for grad in plain.values()), method
        if "pooling" not in method and (number + NUMBER[name]) % 3:
            continue
        model.activation_checkpointing_enable()
        torch.manual_seed(0)
        with compress(model, plan, labelled_only=True):
            assert_same(gradients(model, batch), plain)
        model.activation_checkpointing_disable()
    expected = REFUSED.get(name, {})
    assert refused.keys() == expected.keys(), refused
    assert all(re.search(expected[method], reason) for method, reason in refused.items()), refused


@every_family
def test_text_alone_is_left_alone_and_nothing_stays_behind(name):
    family = FAMILIES[name]()
    model, ids = family.model, torch.randint(8, 32, (2, 9), generator=torch.Generator().manual_seed(0))
    stock, before = model(input_ids=ids).logits, model(**family.batch).logits
    hooks = [dict(part) for m in model.modules() for part in (m._forward_pre_hooks, m._forward_hooks)]
    with compress(model, "1:avgpool:3"):
        assert torch.equal(model(input_ids=ids).logits, stock)
        assert not torch.equal(model(**family.batch).logits, before)
    assert torch.equal(model(**family.batch).logits, before)
    assert hooks == [dict(part) for m in model.modules() for part in (m._forward_pre_hooks, m._forward_hooks)]


_CLASS_TOKEN = dict.fromkeys(["PruMerge", "PruMerge+"], "write 'vision:prumerge")
_RANKED = "reach layer 0: it is unknown which became which.*use it at 'vision'"
# clips whose frames the model pools or begins with a class token
_AT_0 = dict.fromkeys(["HoloV", "HoloV + RESTORE", "VScan"], _RANKED)
_TOWER = dict.fromkeys(["class attention", "VisionZip", "VisPruner"], _RANKED) | _AT_0
_DECODER = ["FastV", "DART", "SparseVLM", "PACT", "PyramidDrop", "VScan"]
_GRID = "rectangle of tokens; use avgpool"
_CALIBRATION = {"HoloV + RESTORE": "(3-D positions|no single inv_freq).*calibration=0"}
REFUSED = {
    "llava_onevision": _CLASS_TOKEN | _TOWER,  # of a batch with a clip
    "video_llava": _AT_0 | {"downsampling": _GRID},
    "llava_next_video": _AT_0,
    "mistral3": _CLASS_TOKEN  # several pictures in a row
    | _TOWER
    | dict.fromkeys(["downsampling", "2-D pooling", "3-D pooling"], _GRID),
    "aya_vision": _CLASS_TOKEN | dict.fromkeys(_DECODER, "rotates .* in some layers only"),
    **dict.fromkeys(["smolvlm", "idefics3"], _CLASS_TOKEN),
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "gemma3"], _CLASS_TOKEN | _CALIBRATION),
    "qwen3_vl": _CLASS_TOKEN | _CALIBRATION,
}
"""By family: the methods it cannot do on its batch, each with a pattern of the reason given."""
VISION = ["llava", "llava_next", "video_llava", "internvl"]


@pytest.mark.parametrize("name", VISION)
def test_vision_plan_equals_pooling_by_hand_before_the_projector(name):
    family = FAMILIES[name]("left", "eager")
    newlines = one_tile_each(family) if name == "llava_next" else ()
    projector, tower, hooks = find_parts(family.model).projector, [], []
    hooks.append(projector.register_forward_pre_hook(lambda module, args: tower.append(args[0].detach())))
    family.model(**family.batch)
    hooks[0].remove()
    order = in_order_of_the_text(family, [list(pictures) for pictures in tower])
    merged = [projector(unit[i : i + 3].mean(0)[None, None])[0, 0] for unit in order for i in range(0, len(unit), 3)]
    expected = pool_by_hand(family, 0, 3, merged, newlines, "pictures")
    with compress(family.model, "vision:avgpool:3"):
        out = family.model(**family.batch)
        slow = family.model.generate(**prompt(family), **GREEDY, use_cache=False)
        fast = family.model.generate(**prompt(family), **GREEDY)
    for row, (columns, logits) in enumerate(expected):
        torch.testing.assert_close(out.logits[row, columns], logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(slow.sequences, fast.sequences)


def one_tile_each(family) -> set[tuple[int, int]]:
    """Make it images of a base tile and one 4 x 4 tile with its newlines; returns (row, column) of the newlines."""
    family.model.config.image_grid_pinpoints = [[16, 16]]
    family.batch["image_sizes"] = torch.tensor([[16, 16]] * 3)
    family.batch["pixel_values"] = family.batch["pixel_values"][:, :2]
    image = ("image", [16, 4 * 5], 0)
    family.inputs([[3, image, 4], [2, image, 1, image, 6]], "left")
    grids = [(row, first) for row, units in enumerate(family.pictures) for first, length in units if length == 20]
    return {(row, first + place) for row, first in grids for place in (4, 9, 14, 19)}


def in_order_of_the_text(family, by_call: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The towers' outputs, one call for images and perhaps one for videos, in the order of the tokens."""
    ids, queues = family.batch["input_ids"], [iter(pictures) for pictures in by_call]
    starts = [(row, first) for row, units in enumerate(family.pictures) for first, _ in units]
    return [next(queues[0 if ids[row, first] == IMAGE else 1]) for row, first in starts]


@pytest.mark.parametrize("name", VISION)
def test_vision_plan_trains_tower_and_projector(name):
    family = FAMILIES[name]()
    with compress(family.model.train(), "vision:avgpool:2;2:random:0.5"):
        found = gradients(family.model, family.batch)
    assert all(torch.isfinite(grad).all() for grad in found.values())
    assert any("projector" in name for name, grad in found.items() if grad.abs().max() > 0)
    assert any("tower" in name for name, grad in found.items() if grad.abs().max() > 0)


MERGES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "idefics3", "gemma3"]
MERGES += ["mistral3", "aya_vision"]


@pytest.mark.parametrize("name", MERGES)
def test_vision_plan_is_refused_where_the_projector_merges_tokens(name):
    family, reason = FAMILIES[name](), r"merges tokens.*layer 0|get \(pictures, tokens, width\)"
    refused = pytest.raises(UnsupportedModel, match=f"projector.*({reason})")
    with refused, compress(family.model, "vision:avgpool:2"):
        family.model(**family.batch)


def test_vision_plan_is_refused_where_the_model_blends_projected_tokens():
    """LLaVA-OneVision halves each video frame behind the projector."""
    family = FAMILIES["llava_onevision"]()
    with compress(family.model, "vision:avgpool:2"), pytest.raises(UnsupportedModel, match="behind the projector"):
        family.model(**family.batch)


def test_a_window_of_sliding_attention_that_the_cache_has_left_behind():
    """Gemma 3, one row: its own cache forgets tokens, and the compressed one forgets the right ones."""
    family = FAMILIES["gemma3"]("left")
    one = {name: value[1:] if name != "pixel_values" else value[1:] for name, value in prompt(family).items()}
    with compress(family.model, "1:avgpool:3"):
        slow = family.model.generate(**one, **GREEDY, use_cache=False)
        fast = family.model.generate(**one, **GREEDY)
        with pytest.raises(UnsupportedModel, match="DynamicCache"):
            family.model.generate(**prompt(family), **GREEDY)
    assert torch.equal(slow.sequences, fast.sequences)


def test_a_batch_whose_placeholders_do_not_fit_its_pictures():
    family = FAMILIES["llava"]()
    family.batch["pixel_values"] = family.batch["pixel_values"][:2]
    with compress(family.model, "1:avgpool:2"), pytest.raises((UnsupportedModel, ValueError), match="tokens"):
        family.model(**family.batch)
