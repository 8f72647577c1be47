"""What a GPU is measured on: random weights and inputs at the shapes of LLaVA-1.5-7B, or tiny ones."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import AutoModelForImageTextToText

from llavolta.compression.labelled import IGNORED
from llavolta.cost.bench import Sizes
from llavolta.cost.flops import cost_model
from llavolta.cost.references import reference_config
from llavolta.train.models import set_trainable


@dataclass(frozen=True)
class Load:
    """What is measured.

    config: of the model. text: text tokens an example, a third of them labelled. batch: examples of a training step;
    prefill: of a prompt. long: pictures of an example with many, of ``long_batch`` a step. side: of the matrices whose
    product is the card's peak. accumulated: batches of an optimizer step (8 of 16: the published batch of 128). steps:
    of a real training run.
    """

    config: object
    text: int = 180
    batch: int = 16
    prefill: tuple[int, ...] = (1, 16)
    long: int = 5
    long_batch: int = 4
    accumulated: int = 8
    new_tokens: int = 6
    rounds: int = 5
    side: int = 8192
    steps: int = 40
    runs: tuple[str, ...] = ("embedded", "small")
    device: str = "cuda"
    dtype: str = "bfloat16"

    @cached_property
    def model(self):
        """The model, random weights in ``dtype`` on ``device``; the vision tower frozen."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = AutoModelForImageTextToText.from_config(self.config, dtype=getattr(torch, self.dtype))
        set_trainable(model, "instruct")
        return model

    def inputs(self, batch: int, images: int = 1) -> dict:
        """A batch of ``images`` pictures an example and then text, whose last third is labelled."""
        vision, generator = self.config.vision_config, torch.Generator().manual_seed(0)
        visual = images * self.config.image_seq_length
        some = torch.randint(10, self.config.text_config.vocab_size - 100, (batch, self.text), generator=generator)
        placeholders = torch.full((batch, visual), self.config.image_token_index)
        ids = torch.cat([some[:, :1], placeholders, some[:, 1:]], dim=1)
        labels = torch.full_like(ids, IGNORED)
        labels[:, -self.text // 3 :] = ids[:, -self.text // 3 :]
        shape = (batch * images, 3, vision.image_size, vision.image_size)
        pixels = torch.randn(shape, generator=generator).to(getattr(torch, self.dtype))
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": pixels}
        return {name: value.to(self.device) for name, value in made.items()}

    def flops(self, plan: str, batch: int, images: int = 1, **options) -> float:
        """Of a step on ``inputs``; options: of CostModel.step."""
        labelled = options.pop("labelled", -(-self.text // 3))
        return batch * cost_model(self.config).step(plan, self.text, images, labelled, **options).total


def full_load() -> Load:
    """LLaVA-1.5-7B, 16 examples of a picture (576 tokens) and 180 text tokens a step."""
    return Load(reference_config("llava-1.5-7b"))


def tiny_load(device: str = "cpu") -> Load:
    """The same at sizes that a CPU does in a minute."""
    config = Sizes(width=64, layers=20, visual=16, vocabulary=200).model().config
    small = dict(batch=2, prefill=(1, 2), long=2, long_batch=2, new_tokens=2, rounds=1, side=64, steps=4)
    return Load(config, text=12, **small, runs=("embedded",), device=device)


def card_name(device: str) -> str:
    name = torch.cuda.get_device_name(device) if device != "cpu" else platform.machine()
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))
