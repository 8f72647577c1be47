"""Spatial and Multi-Block Token Fusion against loops, and as part of a model that trains, saves, loads and answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

from llavolta import AveragePool, MultiBlockTokenFusion, SpatialTokenFusion, compress, replace_projector
from llavolta.compression.families import find_parts
from llavolta.cost.flops import cost_model
from llavolta.data import LlavaData
from llavolta.errors import ConfigError, UnsupportedModel
from llavolta.studies.evaluation import evaluate, greedy, prompts
from llavolta.train.build import prepare
from llavolta.train.config import TrainConfig
from llavolta.train.models import load_model, set_trainable
from llavolta.train.projectors import (
    LlavaStfConfig,
    LlavaStfForConditionalGeneration,
    parse_projector,
    usual_blocks,
    with_projector,
)
from llavolta.train.run import train
from llavolta.train.trainer import StageTrainer, read_metrics
from tests.tiny import ragged_batch, tiny_llava

TEXTS = ["stf", "stf:3", "mbtf:-2,2,0", "mbtf:1,2+stf:2", "stf:4:expansion=1", "mbtf:1"]


def fused(projector: str, grid: int = 12, **options):
    """A tiny LLaVA of random weights with ``projector``, on a tower of 2 blocks."""
    return replace_projector(tiny_llava(grid=grid, **options), SimpleNamespace(patch_size=4), projector)[0]


def features(model, pixels) -> torch.Tensor:
    return torch.stack(list(model.get_image_features(pixel_values=pixels).pooler_output))


def pixels(images: int = 2, grid: int = 12) -> torch.Tensor:
    return torch.randn(images, 3, 4 * grid, 4 * grid, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tiny(small_model):
    """The folder's model and processor, anew for every call."""
    return lambda projector: replace_projector(*load_model(str(small_model)), projector)


@pytest.fixture(scope="module")
def settings(scenes, small_model):
    return dict(
        model=str(small_model),
        projector="mbtf:1,2+stf:2",
        data=str(scenes / "train.json"),
        align_data=str(scenes / "align.json"),
        align_steps=2,
        max_steps=6,
        batch_size=8,
        log_steps=1,
    )


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    return train(TrainConfig(output=str(tmp_path_factory.mktemp("stf") / "whole"), **settings), progress=False)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    model, processor = tiny("mbtf:-2,2+stf:2")
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model


class TestAgainstLoops:
    @pytest.mark.parametrize("window", [1, 2, 3, 4, 6])
    def test_windows(self, window):
        torch.manual_seed(0)
        fusion = SpatialTokenFusion(5, 7, window)
        tokens = torch.randn(3, 144, 5)
        out = fusion(tokens)
        assert out.shape == (3, 144 // window**2, 7)
        for picture in range(3):
            place = 0
            for top in range(0, 12, window):
                for left in range(0, 12, window):
                    joined = []
                    for row in range(top, top + window):
                        for column in range(left, left + window):
                            joined += tokens[picture, 12 * row + column].tolist()
                    assert torch.allclose(out[picture, place], fusion.mlp(torch.tensor(joined)), atol=1e-6)
                    place += 1

    @pytest.mark.parametrize("blocks", [[2, 1], [-2, 2, 0], [-1], [1, 1, -3]])
    def test_blocks(self, blocks):
        """Block i is the output of the i-th layer of the tower, as a hook on it sees it; CLS is dropped."""
        model = fused("mbtf:" + ",".join(map(str, blocks)))
        tower, seen = model.model.vision_tower, {}
        tower.pre_layrnorm.register_forward_hook(lambda *call: seen.update({0: call[-1]}))
        for number, layer in enumerate(tower.encoder.layers, start=1):
            layer.register_forward_hook(lambda *call, number=number: seen.update({number: call[-1]}))
        out = features(model, pixels())
        projector = model.model.multi_modal_projector
        for picture in range(2):
            for patch in range(144):
                joined = []
                for block in blocks:
                    joined += seen[block % 3][picture, 1 + patch].tolist()
                expected = projector.tokens(projector.blocks.mlp(torch.tensor(joined)))
                assert torch.allclose(out[picture, patch], expected, atol=1e-5)

    def test_blocks_come_before_windows(self):
        model = fused("mbtf:1,2+stf:2")
        hidden = model.model.vision_tower(pixels(), output_hidden_states=True).hidden_states
        projector = model.model.multi_modal_projector
        patches = projector.blocks(torch.cat([hidden[1], hidden[2]], dim=-1)[:, 1:])
        assert torch.allclose(features(model, pixels()), projector.tokens(patches), atol=1e-6)


class TestSizes:
    def test_published(self):
        """CLIP ViT-L/14-336 and Vicuna-7B, from the configuration alone."""
        base = LlavaStfConfig(text_config=LlamaConfig(), stf_window=None)
        assert base.image_seq_length == 576
        config = with_projector(base, "mbtf+stf")
        assert config.vision_feature_layer == [-2, 21, 18, 15, 12, 9, 6, 3] and config.image_seq_length == 144
        with torch.device("meta"):
            model = LlavaStfForConditionalGeneration(config)
        blocks, tokens = model.model.multi_modal_projector.children()
        assert isinstance(blocks, MultiBlockTokenFusion)
        assert [tuple(part.weight.shape) for part in blocks.mlp[::2]] == [(4096, 8192), (1024, 4096)]
        assert [tuple(part.weight.shape) for part in tokens.mlp[::2]] == [(16384, 4096), (4096, 16384)]
        assert with_projector(config, "stf:3").image_seq_length == 64

    def test_the_cost_model_sees_the_projector(self):
        """Two operations per weight and row: of 576 patches in MBTF, of 144 windows in STF."""
        cost = cost_model(with_projector(LlavaConfig(text_config=LlamaConfig()), "mbtf+stf"))
        patches, windows = 4096 * 8192 + 1024 * 4096, 16384 * 4096 + 4096 * 16384
        assert cost.visual == 144
        assert cost.step("none").projector.forward == 2 * (576 * patches + 144 * windows)

    @pytest.mark.parametrize(("depth", "blocks"), [(5, [-2, 3, 2, 1]), (2, [-2]), (12, [-2, *range(10, 0, -1)])])
    def test_usual_blocks_of_other_towers(self, depth, blocks):
        assert usual_blocks(depth) == blocks

    @pytest.mark.parametrize("projector", TEXTS)
    def test_tokens_placeholders_and_configuration_agree(self, tiny, projector, scenes):
        model, processor = tiny(projector)
        data = LlavaData(scenes / "heldout.json")
        batch = prompts(model, processor, [("Is there a 3?", data[0].images), ("How many?", data[1].images)])
        count = (batch["input_ids"] == model.config.image_token_id).sum(1).tolist()
        assert count == [model.config.image_seq_length] * 2
        assert features(model, batch["pixel_values"]).shape == (2, count[0], 32)
        assert count[0] == 144 // (model.config.stf_window or 1) ** 2

    def test_a_picture_that_patches_do_not_fill(self):
        """Patches beyond the last whole one are cut off, so the processor's count holds there, too."""
        for size in range(24, 120):
            for window in (1, 2, 3, 5):
                assert size // 4 // window == size // (4 * window)


@pytest.mark.parametrize("projector", TEXTS)
@pytest.mark.parametrize("gain", [0.1, 1, 30])
def test_new_tokens_have_the_scale_of_the_embeddings(projector, gain):
    """Whatever the scale of the tower's hidden states."""
    stock = tiny_llava(grid=12)
    with torch.no_grad():
        for name, parameter in stock.model.vision_tower.named_parameters():
            if any(part in name for part in ("pre_layrnorm", "fc2", "out_proj")):
                parameter.mul_(gain)
    model, _ = replace_projector(stock, SimpleNamespace(patch_size=4), projector)
    wanted = model.get_input_embeddings().weight.std()
    assert 0.5 < features(model, pixels(8)).std() / wanted < 2


class TestTraining:
    def test_gradients_by_phase(self):
        model = fused("mbtf:1,2+stf:2").train()
        batch = ragged_batch([[3, 4], [2, 2, 5]], grid=6)
        batch["pixel_values"] = pixels(3)
        for phase, trained in (("align", {"projector"}), ("instruct", {"projector", "language_model", "lm_head"})):
            model.zero_grad()
            set_trainable(model, phase)
            model(**batch).loss.backward()
            kinds = ("projector", "language_model", "lm_head", "vision_tower")
            grads = {kind: [p.grad for n, p in model.named_parameters() if kind in n] for kind in kinds}
            assert all(grad is None for kind in kinds if kind not in trained for grad in grads[kind])
            assert all(grad is not None and grad.abs().max() > 0 for kind in trained for grad in grads[kind])

    def test_a_run_is_trained_with_fewer_tokens(self, whole, settings):
        assert prepare(TrainConfig(output="x", **settings)).num_tokens == 36
        rows = read_metrics(whole / "metrics.jsonl")
        assert rows[-1]["tokens_per_layer"] == [36] * 4
        for folder in (whole / "align", whole):
            model, processor = load_model(str(folder))
            assert type(model) is LlavaStfForConditionalGeneration and processor.patch_size == 16

    def test_the_loss_falls(self, whole):
        losses = [row["loss"] for row in read_metrics(whole / "metrics.jsonl")]
        assert losses[-1] < losses[0] - 0.1

    def test_alignment_trains_the_projector_alone(self, whole, settings, small_model):
        torch.manual_seed(0)  # of the run
        start = replace_projector(*load_model(str(small_model)), settings["projector"])[0].state_dict()
        after = load_file(whole / "align" / "model.safetensors")
        assert start.keys() == after.keys()
        assert {key.split(".")[1] for key in after if not torch.equal(start[key], after[key])} == {
            "multi_modal_projector"
        }

    @pytest.mark.parametrize("at", [1, 5])  # in alignment, and in the second of three stages
    def test_a_resumed_run_equals_the_uninterrupted_one(self, whole, settings, tmp_path, monkeypatch, at):
        step, count = StageTrainer.training_step, []

        def failing(self, *args):
            count.append(1)
            if len(count) == at + 1:
                raise InterruptedError
            return step(self, *args)

        config = TrainConfig(output=str(tmp_path / "run"), save_steps=1, **settings)
        with monkeypatch.context() as patched, pytest.raises(InterruptedError):
            patched.setattr(StageTrainer, "training_step", failing)
            train(config, progress=False)
        train(config, progress=False)
        one, other = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "run"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)

    def test_adapters_and_a_stage_with_a_plan(self, settings, tmp_path):
        stages = [{"plan": "1:avgpool2d:2", "share": 0.5}, {"plan": "none", "share": 0.5}]
        short = {**settings, "max_steps": 2}
        config = TrainConfig(output=str(tmp_path / "run"), lora_rank=2, scheme=stages, **short)
        model, _ = load_model(str(train(config, progress=False)))
        assert type(model) is LlavaStfForConditionalGeneration
        assert [row["tokens_per_layer"][-1] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [9, 36]


class TestFolder:
    @pytest.mark.parametrize("original", [False, True])
    def test_loads_and_answers_as_before(self, folder, scenes, tmp_path, original):
        folder, model = folder
        _, processor = load_model(str(folder))
        model.save_pretrained(tmp_path, save_original_format=original)
        loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        held = loaded.state_dict()
        assert all(torch.equal(held[name], value) for name, value in model.state_dict().items())
        assert loaded.config.to_dict() == {**model.config.to_dict(), "_name_or_path": str(tmp_path)}
        batch = prompts(model, processor, [("Is there a 3?", LlavaData(scenes / "heldout.json")[0].images)])
        assert torch.equal(*(greedy(any_model, processor, batch, 5) for any_model in (model, loaded)))

    def test_evaluates(self, folder, scenes):
        frame = evaluate(*load_model(str(folder[0])), LlavaData(scenes / "heldout.json"), limit=4, progress=False)
        assert len(frame) == 4

    def test_its_note_says_how_to_load_it(self, folder):
        note = (folder[0] / "README.md").read_text()
        lines = note.split("```python\n")[1].split("```")[0]
        names = {}
        exec(lines.replace("FOLDER", repr(str(folder[0]))), names)
        assert type(names["model"]) is LlavaStfForConditionalGeneration
        assert names["processor"].patch_size == 16


class TestInTheFramework:
    @pytest.mark.parametrize("plan", ["2:avgpool:4", "1:avgpool2d:2;3:random:0.5", "2:fastv:0.5"])
    def test_plans_go_on_top(self, plan):
        model = fused("stf:2").train()
        batch = ragged_batch([[3, 4], [2, 2, 5]], grid=6) | {"pixel_values": pixels(3)}
        before = model(**batch).loss
        with compress(model, plan):
            loss = model(**batch).loss
            loss.backward()
        assert torch.isfinite(loss) and loss != before and torch.equal(model(**batch).loss, before)
        assert model.model.multi_modal_projector.tokens.mlp[0].weight.grad.abs().max() > 0

    def test_windows_leave_a_square_grid_of_their_own(self, monkeypatch):
        seen, call = [], AveragePool.__call__

        def looks(self, tokens):
            seen.append((tokens.mask.sum(1).tolist(), tokens.grid.tolist()))
            return call(self, tokens)

        monkeypatch.setattr(AveragePool, "__call__", looks)
        with compress(model := fused("stf:2"), "1:avgpool:2"):
            model(**ragged_batch([[3, 4]], grid=6) | {"pixel_values": pixels(1)})
        assert seen == [([36], [[6, 6]])]

    def test_nothing_can_be_compressed_before_windows(self):
        with pytest.raises(UnsupportedModel, match="merges tokens itself.*use layer 0"):
            compress(fused("stf:2"), "vision:avgpool:2")
        assert find_parts(fused("mbtf:1,2")).projector is not None
        assert find_parts(fused("stf:1")).projector is not None

    @pytest.mark.parametrize("projector", ["stf:2", "mbtf:1,2+stf:2"])
    def test_bfloat16(self, projector):
        model = fused(projector, dtype=torch.bfloat16)
        batch = ragged_batch([[3, 4]], grid=6) | {"pixel_values": pixels(1).bfloat16()}
        assert model.model.multi_modal_projector.tokens.mlp[0].weight.dtype == torch.bfloat16
        model(**batch).loss.backward()
        exact = fused(projector)(**batch | {"pixel_values": pixels(1)}).loss
        assert model(**batch).loss.item() == pytest.approx(exact.item(), rel=0.05)

    def test_the_parts_of_the_stock_model_are_taken_over(self):
        stock = tiny_llava(grid=12)
        model, processor = replace_projector(stock, SimpleNamespace(patch_size=4), "stf")
        assert model.model.vision_tower is stock.model.vision_tower and model.lm_head is stock.lm_head
        assert not any(parameter.is_meta for parameter in model.parameters()) and processor.patch_size == 8
        assert replace_projector(stock, processor, "mlp") == (stock, processor)
        again, processor = replace_projector(model, processor, "mbtf:1,2")  # a fused model's projector can be replaced
        assert again.config.image_seq_length == 144 and processor.patch_size == 4
        assert replace_projector(again, processor, "stf")[0].config.vision_feature_layer == 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("sft", "cannot read projector 'sft'; write 'mlp', 'stf:WINDOW'"),
            ("stf+mbtf", "cannot read"),
            ("stf+stf", "cannot read"),
            ("mlp:2", "cannot read"),
            ("", "cannot read"),
            ("stf:0", "window must be a whole number of at least 1"),
            ("stf:1.5", "window must be a whole number"),
            ("stf:2:expansion=no", "expansion must be a whole number"),
            ("stf:2:4:1", r"takes 2 options \(window, expansion\)"),
            ("stf:windwo=2", "'windwo' of 'stf' is unknown"),
            ("mbtf:1,x", "blocks must be whole numbers with commas between, not '1,x'"),
        ],
    )
    def test_texts(self, text, match):
        with pytest.raises(ConfigError, match=match):
            parse_projector(text)
        with pytest.raises(ConfigError, match=match):
            TrainConfig(output="x", projector=text)

    def test_what_is_not_text(self):
        with pytest.raises(ConfigError, match="a projector is text such as 'stf:2', not 2"):
            parse_projector(2)
        with pytest.raises(ConfigError, match="projector must be a valid string, not 2"):
            TrainConfig(output="x", projector=2)

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("stf:5", r"windows of 5 x 5 do not fill a grid of 12 x 12; choose from \[1, 2, 3, 4, 6, 12\]"),
            ("mbtf:3", r"hidden states -3\.\.2, not \[3\]"),
            ("mbtf:-4,1", r"not \[-4\]"),
        ],
    )
    def test_what_does_not_fit_the_model(self, text, match, small_model, scenes):
        with pytest.raises(ConfigError, match=match):
            fused(text)
        with pytest.raises(ConfigError, match=match):  # before any weights are loaded
            prepare(TrainConfig(output="x", model=str(small_model), data=str(scenes / "train.json"), projector=text))

    def test_tokens_that_are_no_grid(self):
        with pytest.raises(ConfigError, match="square grid of tokens, not 145; drop CLS"):
            SpatialTokenFusion(4, 4)(torch.zeros(1, 145, 4))
        with pytest.raises(ConfigError, match="do not fill a grid of 3 x 3"):
            SpatialTokenFusion(4, 4)(torch.zeros(1, 9, 4))

    def test_other_models_and_untrained_projectors(self):
        config = LlavaNextConfig(vision_config=CLIPVisionConfig(), text_config=LlamaConfig())
        with pytest.raises(ConfigError, match="for LLaVA-1.5 and its like, not for 'llava_next'"):
            with_projector(config, "stf")
        with pytest.raises(ConfigError, match="'stf:2' is a new one, which is not aligned; raise align_steps"):
            TrainConfig(output="x", projector="stf:2", align_steps=0)
