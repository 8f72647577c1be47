import pytest
import torch
from transformers import CLIPVisionModel, LlamaForCausalLM

from llavolta import backbones, data, digits


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A small digits data set: 48 training and 12 held-out scenes."""
    return digits.build(tmp_path_factory.mktemp("data") / "digits", scenes=48, heldout=12, seed=1)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A folder with an untrained LLaVA of 4 layers and 144 visual tokens, and its processor."""
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2)
    tower = CLIPVisionModel(backbones.vision_config(**small, num_hidden_layers=2))
    language_model = LlamaForCausalLM(backbones.text_config(**small, num_hidden_layers=4))
    folder = tmp_path_factory.mktemp("model") / "small-llava"
    return backbones.save(backbones.assemble(tower, language_model), folder)


@pytest.fixture(autouse=True)
def data_cache(tmp_path_factory, monkeypatch):
    """What data sets keep about themselves stays out of data/cache."""
    folder = tmp_path_factory.getbasetemp() / "data-cache"
    monkeypatch.setattr(data, "CACHE", folder)
    return folder
