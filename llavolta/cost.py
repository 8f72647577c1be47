"""What a training step costs, from a model's configuration alone: floating-point operations by part.

A multiply-add counts as two operations, and attention as if it looked at every pair of tokens, which is how
``torch.utils.flop_counter`` counts. Norms, activations and the optimizer are left out: they are below 1%.
"""

from __future__ import annotations

from dataclasses import dataclass

from llavolta.errors import UnsupportedModel
from llavolta.plan import tokens_per_layer


def reference_config(name: str = "llava-1.5-7b"):
    """The Hugging Face config of a published model, built here so that nothing needs to be fetched."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    if name != "llava-1.5-7b":
        raise UnsupportedModel(f"no reference configuration {name!r}; there is llava-1.5-7b")
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    text = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=336, patch_size=14, projection_dim=768),
        text_config=LlamaConfig(**text, vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5),
        image_token_index=32000,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


@dataclass(frozen=True)
class StepCost:
    """FLOPs of one training step of one example, by part; ``total`` is their sum."""

    tower: float
    projector: float
    linear: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.tower + self.projector + self.linear + self.attention + self.head


def step_cost(
    config,
    plan="none",
    text_tokens: float = 64,
    images: int = 1,
    labelled: float | None = None,
    phase: str = "instruct",
) -> StepCost:
    """The cost of one training step per example of a LLaVA-type model.

    config: its Hugging Face config. text_tokens, images: per example. labelled: rows whose logits are computed
    (default: the labelled quarter of the text). phase: "instruct" trains projector and decoder, "align" the projector
    alone (gradients still pass through the decoder), "forward" nothing.
    """
    text, vision = config.get_text_config(), config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    tower = images * _tower_forward(vision, patches)
    width, tower_width = text.hidden_size, vision.hidden_size
    projector = images * patches * 2 * (tower_width * width + width * width)

    head_size = getattr(text, "head_dim", None) or width // text.num_attention_heads
    queries = text.num_attention_heads * head_size
    keys = text.num_key_value_heads * head_size
    per_token = 2 * (width * (2 * queries + 2 * keys) + 3 * width * text.intermediate_size)
    visual = tokens_per_layer(plan, text.num_hidden_layers, patches)
    lengths = [text_tokens + images * count for count in visual]
    linear = sum(lengths) * per_token
    attention = sum(4 * length**2 * queries for length in lengths)
    head = 2 * width * text.vocab_size * (text_tokens / 4 if labelled is None else labelled)

    # Backward costs once the forward for the gradients of activations, once for those of trained weights.
    weights, activations = {"instruct": (1, 1), "align": (0, 1), "forward": (0, 0)}[phase]
    both = 1 + activations + weights
    return StepCost(
        tower=tower,
        projector=projector * {"instruct": 2.5, "align": 2.5, "forward": 1}[phase],
        linear=linear * both,
        attention=attention * (1 + 2 * activations),
        head=head * both,
    )


def _tower_forward(vision, patches: int) -> float:
    tokens, width = patches + 1, vision.hidden_size
    embed = patches * 2 * vision.num_channels * vision.patch_size**2 * width
    per_token = 2 * (4 * width**2 + 2 * width * vision.intermediate_size)
    return embed + vision.num_hidden_layers * (tokens * per_token + 4 * tokens**2 * width)
