"""Towers of every make joined to language models: sizes, weights, tokens, and what cannot be joined."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from llavolta import UnsupportedModel, compress
from llavolta.errors import ConfigError
from llavolta.train.models import load_model
from llavolta.worlds import backbones
from llavolta.worlds.joining import join, tower_grid

_SIZES = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7)
_BOTH = dict(text_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
TOWERS = {  # model, tokens before the patches
    "clip": (lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**_SIZES, intermediate_size=16)), 1),
    "clip whole": (lambda: tf.CLIPModel(tf.CLIPConfig(vision_config=_SIZES | {"intermediate_size": 16}, **_BOTH)), 1),
    "siglip": (lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**_SIZES, intermediate_size=16)), 0),
    "siglip whole": (
        lambda: tf.SiglipModel(tf.SiglipConfig(vision_config=_SIZES | {"intermediate_size": 16}, **_BOTH)),
        0,
    ),
    "dinov2": (lambda: tf.Dinov2Model(tf.Dinov2Config(**_SIZES)), 1),
    "dinov2 registers": (lambda: tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**_SIZES)), 5),
}


@pytest.fixture(params=[*TOWERS])
def tower(request, tmp_path):
    """A folder of the tower, and the tokens that it puts before its patches."""
    make, others = TOWERS[request.param]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "tower")
    processor = tf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path / "tower")
    return str(tmp_path / "tower"), others


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    words = backbones.tokenizer()
    words.chat_template = None
    sizes = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(words), tie_word_embeddings=True, **sizes))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def test_any_tower_is_joined_saved_loaded_trained_and_asked(tower, language, tmp_path):
    folder, others = tower
    model, processor = join(folder, language)
    grid = tower_grid(folder, tf.AutoConfig.from_pretrained(folder))
    tokens = 16 + max(0, others - 1)
    assert (grid.side, grid.others, grid.visual_tokens) == (
        4,
        others,
        tokens,
    ) and model.config.image_seq_length == tokens
    assert model.config.vision_feature_select_strategy == ("default" if others else "full")
    source = tf.AutoModel.from_pretrained(folder)
    source = getattr(source, "vision_model", source).state_dict()
    held = {key.removeprefix("vision_model."): v for key, v in model.model.vision_tower.state_dict().items()}
    assert held.keys() == source.keys() and all(torch.equal(held[key], source[key]) for key in held)
    assert model.lm_head.weight is model.get_input_embeddings().weight

    model.save_pretrained(tmp_path / "joined")
    processor.save_pretrained(tmp_path / "joined")
    model, _ = load_model(str(tmp_path / "joined"))
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "joined")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    processor = AutoProcessor.from_pretrained(tmp_path / "joined")
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how often"}]}]
    text = processor.apply_chat_template(asked, add_generation_prompt=True)
    batch = processor(text=[text], images=[Image.new("RGB", (40, 30), "red")], return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == tokens
    labels = batch["input_ids"].clone()
    out = plain(**batch, labels=labels)
    out.loss.backward()
    assert torch.isfinite(out.loss) and plain.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] > batch["input_ids"].shape[1]
    with compress(model, "1:avgpool:4"), torch.no_grad():
        assert torch.isfinite(model(**batch, labels=labels).loss)
    with torch.no_grad():
        if others:
            with compress(model, "vision:prumerge"):
                assert torch.isfinite(model(**batch, labels=labels).loss)
        else:
            with pytest.raises(UnsupportedModel, match="no class token"), compress(model, "vision:prumerge"):
                model(**batch, labels=labels)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            tf.ResNetConfig(depths=[1, 1], hidden_sizes=[8, 8], embedding_size=8),
            "a resnet has no grid of square patches",
        ),
        (tf.ConvNextConfig(depths=[1], hidden_sizes=[8], num_stages=1), "a convnext"),
        (
            tf.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], image_size=32),
            "a swin .*; give a CLIP",
        ),
        (tf.LlamaConfig(), "a llama has no grid"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_towers_without_a_grid_are_refused_before_any_weight(config, match, language, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=match):
        join(str(tmp_path), language)


def test_a_language_model_without_rotary_positions_is_refused(language, tmp_path):
    sizes = dict(n_embd=16, n_layer=1, n_head=2, vocab_size=60)
    tf.GPT2LMHeadModel(tf.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt")
    make, _ = TOWERS["clip"]
    make().save_pretrained(tmp_path / "tower")
    with pytest.raises(ConfigError, match="a gpt2 has no decoder layers with rotary positions"):
        join(str(tmp_path / "tower"), str(tmp_path / "gpt"))


def test_a_tower_that_reads_any_size_is_asked_at_its_processors(language, tmp_path):
    make, _ = TOWERS["dinov2"]
    make().save_pretrained(tmp_path)
    tf.CLIPImageProcessor(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}).save_pretrained(tmp_path)
    model, processor = join(str(tmp_path), language)
    assert model.config.image_seq_length == 36  # 42 pixels in patches of 7, where the configuration has 28
    batch = processor(text=["<image> how"], images=[Image.new("RGB", (50, 60))], return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == 36
    assert torch.isfinite(model(**batch).logits).all()


def test_a_tower_whose_processor_makes_another_size_than_it_reads_is_refused(language, tmp_path):
    make, _ = TOWERS["clip"]
    make().save_pretrained(tmp_path)
    tf.CLIPImageProcessor(size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="reads no picture .*42"):
        join(str(tmp_path), language)
