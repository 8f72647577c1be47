"""Tiny random models and batches, and a slow plain oracle, for the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from llavolta.compression.compressors import COMPRESSORS, Compressor
from llavolta.worlds import backbones

IMAGE, PAD = 4, 0
VOCABULARY = 32


def in_turn(*values: Sequence, cases: int = 0) -> list[tuple]:
    """Cases for ``parametrize``: the first of each list, the second of each; lists begin anew.

    Args:
        values: What each parameter can be.
        cases: How many; by default as many as the longest list has.
    """
    cases = cases or max(map(len, values))
    return [tuple(options[case % len(options)] for options in values) for case in range(cases)]


def example(name: str) -> Compressor:
    """The compressor with its defaults, and 2 for options without one."""
    kind = COMPRESSORS[name]
    return kind(**{f.name: 2 for f in fields(kind) if f.default is f.default_factory is MISSING})


def places(name: str) -> list:
    """Where the compressor can stand: at a decoder layer, before the projector, or at either."""
    needs = COMPRESSORS[name].needs
    decoder = [] if "class_token" in needs else [0] if "tower" in needs else [1]
    return decoder + ["vision"] * (not needs & {"decoder", "previous_layer"})


def tiny_llava(layers: int = 4, grid: int = 4, dtype=torch.float32, attention: str = "sdpa", seed: int = 0):
    """A random LLaVA with ``grid`` x ``grid`` visual tokens an image."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=4 * grid,
        patch_size=4,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        attn_implementation=attention,
        image_seq_length=grid * grid,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention)
    for parameter in model.model.multi_modal_projector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def write_small_llava(folder: Path) -> Path:
    """Write an untrained LLaVA of 4 layers and 144 visual tokens, and its processor, to ``folder``."""
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2)
    tower = CLIPVisionModel(backbones.vision_config(**small, num_hidden_layers=2))
    language_model = LlamaForCausalLM(backbones.text_config(**small, num_hidden_layers=4))
    backbones.save(backbones.assemble(tower, language_model), folder)  # in half precision, as it is shipped
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(folder)  # a finished run has this dtype, too, so that all of its bits are compared
    return folder


def ragged_batch(rows: list[list[int]], grid: int = 4, side: str = "right", seed: int = 0, dtype=torch.float32) -> dict:
    """A batch from a sketch: each row lists text lengths, with an image between one and the next.

    ``[3, 0, 2]`` is three text tokens, an image, an image, two text tokens. Padded on ``side``. The labels are the
    text tokens of the second half of each row's text, at least one.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, labels, images = [], [], 0
    for row in rows:
        tokens, marks, text_total = [], [], sum(row)
        seen = 0
        for place, length in enumerate(row):
            if place:
                tokens += [IMAGE] * grid * grid
                marks += [-100] * grid * grid
                images += 1
            text = torch.randint(5, VOCABULARY, (length,), generator=generator).tolist()
            tokens += text
            marks += [token if seen + i >= text_total // 2 else -100 for i, token in enumerate(text)]
            seen += length
        ids.append(tokens)
        labels.append(marks)
    longest = max(map(len, ids))

    def pad(values, fill):
        extra = [fill] * (longest - len(values))
        return extra + values if side == "left" else values + extra

    batch = {
        "input_ids": torch.tensor([pad(row, PAD) for row in ids]),
        "labels": torch.tensor([pad(row, -100) for row in labels]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in ids]),
    }
    if images:
        batch["pixel_values"] = torch.randn(images, 3, 4 * grid, 4 * grid, generator=generator).to(dtype)
    return batch


def oracle(model, batch: dict, plan: dict[int, int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What average pooling by ``plan`` {layer: stride} must give, row by row and window by window.

    Every row of the batch runs alone and without padding through the stock decoder layers, one by one. Returns per
    row the logits of its remaining tokens, and the mean loss over the labelled tokens of the batch.
    """
    base, text = model.model, model.model.language_model
    embedded = base.get_input_embeddings()(batch["input_ids"])
    features = iter(())
    if "pixel_values" in batch:
        features = iter(base.get_image_features(pixel_values=batch["pixel_values"]).pooler_output)
    position_ids = torch.arange(batch["input_ids"].shape[1])
    logits, losses = [], []
    for ids, embeds, labels, real in zip(
        batch["input_ids"], embedded, batch["labels"], batch["attention_mask"].bool(), strict=True
    ):
        ids, embeds, labels, positions = ids[real], embeds[real], labels[real].clone(), position_ids[real].tolist()
        tokens, label_list, images = list(embeds), labels.tolist(), []
        place = 0
        while place < len(ids):
            if ids[place] == IMAGE:
                image = next(features)
                images.append(list(range(place, place + len(image))))
                for offset, feature in enumerate(image):
                    tokens[place + offset] = feature
                place += len(image)
            else:
                place += 1
        for number, layer in enumerate(text.layers):
            if number in plan:
                tokens, positions, label_list, images = _pool(tokens, positions, label_list, images, plan[number])
            hidden = torch.stack(tokens)[None]
            rotary = text.rotary_emb(hidden, torch.tensor([positions]))
            length = len(tokens)
            causal = torch.full((length, length), torch.finfo(hidden.dtype).min).triu(1)[None, None].to(hidden.dtype)
            hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary)
            tokens = list(hidden[0])
        row_logits = model.lm_head(text.norm(torch.stack(tokens)))
        logits.append(row_logits)
        for place in range(1, len(label_list)):
            if label_list[place] != -100:
                target = torch.tensor(label_list[place])
                losses.append(F.cross_entropy(row_logits[place - 1].float(), target))
    return logits, torch.stack(losses).mean()


def _pool(tokens, positions, labels, images, stride):
    new_tokens, new_positions, new_labels, new_images = [], [], [], []
    place = 0
    starts = {image[0]: image for image in images}
    while place < len(tokens):
        if place not in starts:
            new_tokens.append(tokens[place])
            new_positions.append(positions[place])
            new_labels.append(labels[place])
            place += 1
            continue
        image, pooled = starts[place], []
        for first in range(0, len(image), stride):
            window = image[first : first + stride]
            pooled.append(len(new_tokens))
            new_tokens.append(torch.stack([tokens[i] for i in window]).float().mean(0).to(tokens[0].dtype))
            new_positions.append(sum(positions[i] for i in window) // len(window))
            new_labels.append(-100)
        new_images.append(pooled)
        place += len(image)
    return new_tokens, new_positions, new_labels, new_images


class Watched:
    """What the compressors of a plan got and returned: to be given to compress as ``observe``."""

    def __init__(self):
        self.calls, self.layers = [], []

    def __call__(self, layer, tokens, out):
        self.calls.append((tokens, out))
        self.layers.append(layer)


def write_results(folder, model: str, plan: str, scores: dict[str, dict[str, float]]):
    """A result file as lmms-eval writes it, with the scores {task: {metric: value}}."""
    results = {
        "results": {task: {f"{name},none": value for name, value in held.items()} for task, held in scores.items()},
        "configs": {task: {"metric_list": [{"metric": name} for name in held]} for task, held in scores.items()},
        "n-samples": {task: {"original": 4, "effective": 4} for task in scores},
        "config": {"model_args": f"pretrained={model},plan={plan}"},
    }
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "20260101_000000_results.json").write_text(json.dumps(results))
    return folder
