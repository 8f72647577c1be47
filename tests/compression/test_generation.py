"""Key-value caches under compression: chats over several turns, beams, sampling, and what cannot be continued."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch
from families_tiny import FAMILIES, VIDEO
from tiny import IMAGE, Watched, in_turn, ragged_batch, tiny_llava
from transformers import DynamicCache, StaticCache

from llavolta import UnsupportedModel, cache_bytes, compress

GREEDY = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, suppress_tokens=[IMAGE, VIDEO])
PLANS = ["0:avgpool:3", "2:avgpool:3", "1:avgpool:2;3:avgpool:2", "vision:avgpool:2;2:avgpool:2"]
PLANS += ["vision:prumerge:0.25;2:avgpool:2"]  # which moves text up, too


@pytest.fixture(scope="module")
def model():
    return tiny_llava()


def prompt(rows=((3, 4), (2, 0, 5), (6,)), **settings) -> dict:
    batch = ragged_batch([list(row) for row in rows], side="left", **settings)
    del batch["labels"]
    return batch


WAYS = [dict(num_beams=3), dict(num_beams=2, num_return_sequences=2), dict(do_sample=True)]


@pytest.mark.parametrize(("plan", "how"), in_turn(PLANS, WAYS, cases=6))
def test_beams_and_samples_are_those_without_a_cache(model, plan, how):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        with compress(model, plan):
            found.append(model.generate(**prompt(), **{**GREEDY, **how}, use_cache=use_cache))
    assert torch.equal(*found)


@pytest.mark.parametrize(("plan", "picture"), in_turn(PLANS, [True, False], cases=6))
def test_a_chat_goes_on_over_turns_on_one_cache(model, plan, picture):
    first, cache = prompt(), DynamicCache(config=model.config.get_text_config())
    with compress(model, plan):
        told = model.generate(**first, **GREEDY, past_key_values=cache)
        asked = prompt([[1, 3], [2, 2], [2, 0, 2]] if picture else [[4], [4], [4]], seed=7)
        whole = {"input_ids": torch.cat([told, asked["input_ids"]], dim=1)}
        padding = [first["attention_mask"], torch.ones_like(told[:, first["input_ids"].shape[1] :])]
        whole["attention_mask"] = torch.cat([*padding, asked["attention_mask"]], dim=1)
        new = {"pixel_values": asked["pixel_values"]} if picture else {}
        # generate() finds by itself what the cache holds, unless layer 0's is a compressed one: then only what is new.
        start = told.shape[1] - 1 if plan[0] in "0v" else 0
        ids = whole["input_ids"][:, start:]
        again = model.generate(**{**whole, "input_ids": ids}, **new, **GREEDY, past_key_values=cache)

        # From scratch, with the pictures of both turns in the order of the rows.
        counts = [[1, 2, 0], [1, 1, 2]] if picture else [[1, 2, 0]]
        turns = [part["pixel_values"].split(n) for part, n in zip([first, asked], counts, strict=False)]
        pixels = torch.cat([images for row in zip(*turns, strict=True) for images in row])
        scratch = model.generate(**whole, pixel_values=pixels, **GREEDY, use_cache=False)
    assert torch.equal(again[:, -6:], scratch[:, -6:])


def test_padding_between_turns_does_not_hide_the_turn_before(model):
    """As rows of unlike length have it: their positions begin anew for padding alone."""
    ids = prompt([[3, 4, 4]])["input_ids"]
    pixels = prompt([[3, 4, 4]])["pixel_values"]
    gap = torch.zeros(1, 2, dtype=torch.long)
    padded = torch.cat([ids[:, :-4], gap, ids[:, -4:]], dim=1)
    mask = torch.cat([torch.ones_like(ids[:, :-4]), gap, torch.ones_like(ids[:, -4:])], dim=1)
    for plan in ("1:pyramiddrop:0.25", "0:cdpruner:4", "0:divprune:4"):
        with compress(model, plan):
            expected = model.generate(ids, pixel_values=pixels, **GREEDY)
            found = model.generate(padded, pixel_values=pixels, attention_mask=mask, **GREEDY)
        assert torch.equal(found[:, -6:], expected[:, -6:]), plan


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "qwen2_5_vl", "smolvlm"])
def test_the_tower_ranks_beams_as_it_ranks_their_prompt(name):
    """Tiles, images beside clips, and unlike numbers of images in a row."""
    family = FAMILIES[name]("left")
    asked = {key: value for key, value in family.batch.items() if key != "labels"}
    if name == "llava_onevision":  # without its clip
        asked = {key: value[:1] for key, value in asked.items() if "videos" not in key}
    chosen = []
    for how in (None, dict(num_beams=1), dict(num_beams=3)):
        watched, by_row = Watched(), {}
        with compress(family.model, "0:cls:0.5", observe=watched):
            family.model(**asked) if how is None else family.model.generate(**asked, **GREEDY, **how)
        tokens, out = watched.calls[0]
        for image, row in enumerate(tokens.probe.row().tolist()):
            by_row.setdefault(row, []).append(out.anchor[image][out.mask[image]].tolist())
        chosen.append([by_row[row] for row in sorted(by_row)])
    assert chosen[1] == chosen[0] and chosen[2] == [row for row in chosen[0] for _ in range(3)]


class Learnt(torch.nn.Module):
    """Two embeddings to stand before each picture."""

    def __init__(self, model):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.ones(2, model.config.get_text_config().hidden_size))

    def forward(self, pictures: int) -> torch.Tensor:
        return self.rows.expand(pictures, -1, -1)


def test_two_compressors_that_close_their_gaps_move_later_tokens_by_both(model):
    """Otherwise the next token of a cache stands at a position behind the one that follows its last row."""
    plan, first, second = "vision:prumerge:0.5;0:avgpool:2", prompt([[3, 4], [2, 5]]), prompt([[5], [5]], seed=3)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    with compress(model, plan, prefix=Learnt(model)):
        whole = model(input_ids=ids, attention_mask=mask, pixel_values=first["pixel_values"]).logits
        cache = model(**first, use_cache=True).past_key_values
        out = model(**{**second, "attention_mask": mask}, past_key_values=cache)
    torch.testing.assert_close(out.logits, whole[:, -second["input_ids"].shape[1] :], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "plan", ["0:cls:0.25", "0:sparsevlm:0.25", "0:tome:0.25:proportional=true", "0:restore:divprune:0.25"]
)
def test_a_prefix_stands_before_what_any_method_keeps(model, plan):
    """What a method needs to know is given, and what its tokens weigh is kept; each prefix token weighs as one."""
    model.train()
    try:
        with compress(model, plan, prefix=Learnt(model)) as handle:
            inner = handle._steps[0][-1]
            seen = []
            handle._observe = lambda layer, tokens, out: seen.append((tokens, out))
            model(**prompt([[3, 4], [2, 5]])).logits.sum().backward()
    finally:
        model.eval()
    [(tokens, out)] = seen
    alone = inner.compressor(tokens) if plan.startswith("0:restore") else None
    weighs = "tome" in plan or "restore" in plan
    assert (out.size is not None) == weighs and out.hidden.shape[1] > 2
    if weighs:
        assert out.size[:, :2].eq(1).all() and out.size.sum(1).tolist() == [18, 18]
    if alone is not None:
        assert torch.equal(out.size[:, 2:], alone.size) and torch.equal(out.calibration[:, 2:], alone.calibration)


@pytest.mark.parametrize(("plan", "picture"), in_turn(PLANS, [True, False], cases=6))
def test_a_second_chunk_by_calling_the_model(model, plan, picture):
    """Also at layer 0, where generate() cannot tell what the cache has seen."""
    first, second = prompt([[3, 4], [2, 5]]), prompt([[2, 3], [1, 4]] if picture else [[5], [5]], seed=3)
    mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    pixels, new = first["pixel_values"], second["input_ids"].shape[1]
    if picture:
        pixels = torch.stack([first["pixel_values"], second["pixel_values"]], dim=1).flatten(0, 1)
    with compress(model, plan):
        whole = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
        cache = model(**first, use_cache=True).past_key_values
        out = model(**{**second, "attention_mask": mask}, past_key_values=cache)
        torch.testing.assert_close(out.logits, whole[:, -new:], rtol=1e-4, atol=1e-4)
        # And once more, one token, without a mask.
        token = torch.full((2, 1), 9)
        longer = model(input_ids=torch.cat([ids, token], dim=1), pixel_values=pixels).logits[:, -1:]
        out = model(input_ids=token, past_key_values=cache)
        torch.testing.assert_close(out.logits, longer, rtol=1e-4, atol=1e-4)


def test_chat_on_one_cache_with_3d_positions():
    """Qwen2.5-VL: a second turn of text."""
    family = FAMILIES["qwen2_5_vl"]("left")
    model, first = family.model, {k: v for k, v in family.batch.items() if k != "labels"}
    cache = DynamicCache(config=model.config.get_text_config())
    with compress(model, "1:avgpool:3"):
        told = model.generate(**first, **GREEDY, past_key_values=cache)
        ids = torch.cat([told, torch.full((2, 3), 9)], dim=1)
        mask = torch.cat([first["attention_mask"], torch.ones_like(ids[:, first["input_ids"].shape[1] :])], dim=1)
        again = model.generate(input_ids=ids, attention_mask=mask, **GREEDY, past_key_values=cache)
        types = torch.nn.functional.pad(first["mm_token_type_ids"], (0, ids.shape[1] - first["input_ids"].shape[1]))
        whole = {**first, "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
        assert torch.equal(again, model.generate(**whole, **GREEDY, use_cache=False))


@pytest.mark.parametrize(("plan", "layers"), [("1:avgpool:4", 3), ("0:avgpool:4", 4), ("2:random:0.25", 2)])
def test_the_cache_shrinks_by_the_compression_ratio(model, plan, layers):
    batch, text = prompt([[3, 4], [2, 5]]), 7
    with compress(model, plan):
        small = cache_bytes(model(**batch, use_cache=True).past_key_values)
    stock = cache_bytes(model(**batch, use_cache=True).past_key_values)
    rows = 2 * (2 * 2 * 8 * 4)  # batch, keys and values, key heads, width of a head, bytes
    assert stock == 4 * (16 + text) * rows and small == ((4 - layers) * (16 + text) + layers * (4 + text)) * rows


class TestCachesThatCannotBeContinued:
    def test_of_fixed_size(self, model):
        with compress(model, "1:avgpool:3"), pytest.raises(UnsupportedModel, match="StaticCache"):
            model.generate(**prompt(), **GREEDY, cache_implementation="static")
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=64)
        with compress(model, "0:avgpool:3"), pytest.raises(UnsupportedModel, match="fixed size"):
            model(**prompt(), past_key_values=cache)

    def test_cropped(self, model):
        with compress(model, "1:avgpool:3"):
            cache = model(**prompt([[3, 4]]), use_cache=True).past_key_values
            for layer in cache.layers[2:]:
                layer.crop(-2)
            cache.layers[1].crop(-1)
            with pytest.raises(UnsupportedModel, match="cropped"):
                model(input_ids=torch.tensor([[9]]), past_key_values=cache)

    @pytest.mark.parametrize("plan", ["0:avgpool:3", "1:avgpool:3"])
    @torch.no_grad()
    def test_copied_or_from_another_handle(self, model, plan):
        batch = prompt([[3, 4]])
        token = dict(input_ids=torch.tensor([[9]]), attention_mask=torch.ones(1, 24, dtype=torch.long))
        with compress(model, plan):
            cache = model(**batch, use_cache=True).past_key_values
            with pytest.raises(UnsupportedModel, match="another compress|under the compress"):
                model(**token, past_key_values=copy.deepcopy(cache))
        with compress(model, plan), pytest.raises(UnsupportedModel, match="another compress|under the compress"):
            model(**token, past_key_values=cache)

    def test_generate_again_at_layer_0(self, model):
        cache = DynamicCache(config=model.config.get_text_config())
        with compress(model, "0:avgpool:3"):
            told = model.generate(**prompt([[3, 4]]), **GREEDY, past_key_values=cache)
            with pytest.raises(UnsupportedModel, match="only the new input_ids"):
                model.generate(input_ids=told, **GREEDY, past_key_values=cache)

    def test_but_one_that_was_reset_can(self, model):
        batch = prompt([[3, 4]])
        with compress(model, "1:avgpool:3"):
            cache = model(**batch, use_cache=True).past_key_values
            first = cache_bytes(cache)
            cache.reset()
            assert cache_bytes(model(**batch, past_key_values=cache).past_key_values) == first


@pytest.mark.parametrize("plan", ["2:avgpool:3", "vision:prumerge:0.5;1:fastv:0.5"])
def test_threads_generate_on_one_compressed_model(model, plan):
    """Each with a prompt of another length, many times over: state of one pass must not reach another's."""
    prompts = [
        prompt([[3, 4]]),
        prompt([[2, 0, 5], [7]], seed=1),
        prompt([[6, 2, 2]], seed=2),
        prompt([[9, 1]], seed=3),
    ]
    with compress(model, plan):
        alone = [model.generate(**batch, **GREEDY) for batch in prompts]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                together = list(pool.map(lambda batch: model.generate(**batch, **GREEDY), prompts))
                assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("plan", ["2:avgpool:3", "vision:prumerge:0.25;2:avgpool:2"])
def test_a_prompt_in_chunks_is_refused(model, plan):
    """It gave other answers: a picture would be compressed in pieces, and ranked before its question is known."""
    stock = model.generate(**prompt(), **GREEDY, prefill_chunk_size=4)
    with compress(model, plan):
        expected = model.generate(**prompt(), **GREEDY)
        with pytest.raises(UnsupportedModel, match="leave prefill_chunk_size out"):
            model.generate(**prompt(), **GREEDY, prefill_chunk_size=4)
        assert torch.equal(model.generate(**prompt(), **GREEDY), expected)
    assert "_prefill" not in vars(model)
    assert torch.equal(model.generate(**prompt(), **GREEDY, prefill_chunk_size=4), stock)


@pytest.mark.parametrize(
    "plan", ["1:avgpool:3", "0:avgpool2d:2", "2:fastv:0.5", "0:avgpool:2;2:pyramiddrop:0.5", "vision:prumerge:0.5"]
)
def test_speculative_decoding_equals_greedy_decoding(model, plan, monkeypatch):
    """Guesses from the prompt are tried out behind it, and those that fail are cropped from the cache."""
    crops, crop = [], DynamicCache.crop
    monkeypatch.setattr(DynamicCache, "crop", lambda cache, count: crops.append(count) or crop(cache, count))
    batch = prompt([[6, 8]])
    batch["input_ids"][0, -4:] = batch["input_ids"][0, -8:-4]  # something to guess from
    many = {**GREEDY, "max_new_tokens": 24}
    with compress(model, plan):
        greedy = model.generate(**batch, **many)
        assert not crops
        assert torch.equal(model.generate(**batch, **many, prompt_lookup_num_tokens=3), greedy)
        assert len(crops) > 3
    assert "generate" not in vars(model) and "_prefill" not in vars(model)


@pytest.mark.parametrize("plan", PLANS)
@torch.no_grad()
def test_a_cache_goes_on_where_text_behind_the_pictures_was_cropped(model, plan):
    with compress(model, plan):
        cache = DynamicCache(config=model.config.get_text_config())
        batch = prompt([[3, 6]])
        whole = model(**batch, use_cache=False).logits
        model(**batch, past_key_values=cache)
        for count in (2, 1):
            cache.crop(-count)
            again = dict(input_ids=batch["input_ids"][:, -count:], attention_mask=batch["attention_mask"])
            logits = model(**again, past_key_values=cache).logits
            torch.testing.assert_close(logits, whole[:, -count:], rtol=1e-5, atol=1e-5)
        cache.crop(-8)  # into the picture
        with pytest.raises(UnsupportedModel, match="cropped|speak of"):
            again = dict(input_ids=batch["input_ids"][:, -8:], attention_mask=batch["attention_mask"])
            model(**again, past_key_values=cache)


@pytest.mark.parametrize(("plan", "how"), in_turn(PLANS, ["reorder", "select", "repeat"], cases=6))
@torch.no_grad()
def test_a_cache_whose_rows_were_moved_goes_on(model, plan, how):
    """Rows of unequal pictures, so that one row's layout is wrong for another."""
    batch, token = prompt(), torch.tensor([[9], [11], [13]])
    rows = {"select": [2, 0], "repeat": [0, 0, 1, 1, 2, 2], "reorder": [1, 2, 0]}[how]
    with compress(model, plan):
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
        ids = torch.cat([batch["input_ids"], token], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = model(ids, pixel_values=batch["pixel_values"], attention_mask=mask, position_ids=positions)
        cache = DynamicCache(config=model.config.get_text_config())
        model(**batch, position_ids=positions[:, :-1], past_key_values=cache)
        if how == "select":
            cache.batch_select_indices(torch.tensor(rows))
        elif how == "repeat":
            cache.batch_repeat_interleave(2)
        else:
            cache.reorder_cache(torch.tensor(rows))
        given = dict(input_ids=token[rows], attention_mask=mask[rows], position_ids=positions[rows, -1:])
        with pytest.raises(UnsupportedModel, match="speak of"):  # a pass that fails changes nothing
            model(**{**given, "attention_mask": mask[rows][:, 1:]}, past_key_values=cache)
        for _ in range(2):
            logits = model(**given, past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(logits, whole.logits[rows, -1], rtol=1e-4, atol=1e-4)
            cache.crop(-1)


def test_a_generate_of_the_models_own_is_kept(model):
    def own(**kwargs):
        return "mine"

    model.generate = own
    try:
        with compress(model, "1:avgpool:3"):
            assert model.generate(**prompt()) == "mine"
        assert model.generate is own
    finally:
        del model.generate


def _modules(model) -> list[str]:
    """Of each kind of module in each part the first and the last."""
    found: dict[tuple, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList):
            found.setdefault((type(module), "language" in name), []).append(name)
    return list(dict.fromkeys(name for names in found.values() for name in (names[0], names[-1])))


@pytest.mark.parametrize(
    ("plan", "behind"),
    [
        ("1:fastv:0.5;2:avgpool:2", False),
        ("vision:prumerge:0.5", True),
        pytest.param("1:avgpool:3", True, marks=pytest.mark.slow),
        pytest.param("none", False, marks=pytest.mark.slow),
    ],
)
def test_an_interrupt_anywhere_leaves_no_state_behind(plan, behind):
    """Under a handle that is kept: whatever pass comes next is as if none had been interrupted."""
    model, batch = tiny_llava(layers=3), ragged_batch([[3, 4], [2, 0, 5], [6]], side="left")
    asked = prompt()
    passes = {
        "generate": lambda: model.generate(**asked, **{**GREEDY, "max_new_tokens": 2}),
        "forward": lambda: model(**asked).logits,
        "training": lambda: model.train()(**batch).loss,
        "base": lambda: model.model(**asked).last_hidden_state,
        "decoder": lambda: model.get_decoder()(input_ids=torch.arange(6, 12)[None]).last_hidden_state,
    }

    def run(name: str):
        try:
            with torch.no_grad():
                return passes[name]()
        finally:
            model.eval()

    def interrupt(*_):
        raise KeyboardInterrupt

    with compress(model, plan, labelled_only=True):
        right = {name: run(name) for name in passes}
        for number, name in enumerate(_modules(model)):
            module = model.get_submodule(name)
            register = module.register_forward_hook if behind else module.register_forward_pre_hook
            first = ["generate", "training"][number % 2]
            for after, expected in right.items():
                hook = register(interrupt)
                with suppress(KeyboardInterrupt):
                    run(first)
                hook.remove()
                assert torch.equal(run(after), expected), (name, first, after)
