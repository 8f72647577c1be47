"""The tiny pre-trained parts of the embedded LLaVA: a CLIP vision tower, a Llama language model, a processor.

LLaVA starts from CLIP and Vicuna; the embedded model starts from these two, made the same way at 1/4000 of
the size. The tower learns from pictures alone what each patch shows and where; the language model learns the
questions on scenes given in its own words, never seeing a pixel. Neither sees a held-out digit. What joins
them, the projector, is left to projector alignment, and everything about pictures in the language model to
instruction tuning: the two phases that the package studies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tqdm.auto import tqdm
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)

from llavolta.data.video import FRAMES, FrameProcessor, VideoLlavaProcessor
from llavolta.paths import DATA, TINY_LLAVA
from llavolta.worlds import clips, digits

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: {% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>\n{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of the digits questions, lower case, 40-odd words, and ``more``."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *digits.vocabulary(), *more))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated"), pre_tokenizers.Split(".", "isolated")]
    )
    bos = ("<s>", vocabulary["<s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>"],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
    )


def processor(size: int = digits.SIZE, patch: int = digits.PATCH) -> LlavaProcessor:
    """The processor of the embedded model: CLIP's normalisation at ``size`` pixels, one token a patch."""
    from transformers import CLIPImageProcessor  # warns of a missing torchvision as soon as it is imported

    image_processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return LlavaProcessor(
        image_processor,
        tokenizer(),
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS
        chat_template=CHAT_TEMPLATE,
    )


def vision_config(**changes) -> CLIPVisionConfig:
    sizes = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4)
    return CLIPVisionConfig(**{**sizes, "image_size": digits.SIZE, "patch_size": digits.PATCH, **changes})


def text_config(**changes) -> LlamaConfig:
    """8 decoder layers of width 128. Widths this small need initial weights near 1/sqrt(width), not 0.02."""
    sizes = dict(hidden_size=128, intermediate_size=344, num_hidden_layers=8, num_attention_heads=4)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, vocab_size=len(SPECIAL) + len(digits.vocabulary()))
    return LlamaConfig(**{**sizes, **ids, "max_position_embeddings": 2048, "initializer_range": 0.08, **changes})


def _normalise(pictures: torch.Tensor) -> torch.Tensor:
    """What CLIPImageProcessor does to pixels in [0, 1]."""
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pictures - mean) / std


def _one_cycle(optimizer: torch.optim.Optimizer, steps: int, peak: float) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)


def _cell_of_patch() -> tuple[torch.Tensor, torch.Tensor]:
    """The row and the column (0..2) of the cell that each of the 144 patches lies in."""
    patch = torch.arange(digits.TOKENS**2)
    per_cell = digits.CELL // digits.PATCH
    return patch // digits.TOKENS // per_cell, patch % digits.TOKENS // per_cell


class TowerHeads(torch.nn.Module):
    """Throw-away heads that teach the tower: per patch the digit, row and column; from CLS the digits present."""

    def __init__(self, width: int):
        super().__init__()
        self.patch = torch.nn.Linear(width, 11 + 3 + 3)
        self.present = torch.nn.Linear(width, 10)

    def forward(self, tower: CLIPVisionModel, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pictures (B, 3, 96, 96) in [0, 1] -> patch logits (B, 144, 17), presence logits (B, 10).

        Patches are read from the penultimate layer, where LLaVA reads them, and CLS from the last.
        """
        out = tower(_normalise(pictures), output_hidden_states=True)
        return self.patch(out.hidden_states[-2][:, 1:]), self.present(out.pooler_output)


def train_tower(steps: int = 4000, batch: int = 32, seed: int = 0, peak_lr: float = 1.5e-3, progress: bool = True):
    """Train the vision tower on scenes of training digits. Returns the tower and a log of dicts.

    Each log row: step, loss, and on fresh training scenes ``patch_accuracy`` over patches that show a digit.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 1])
    tower = CLIPVisionModel(vision_config())
    heads = TowerHeads(tower.config.hidden_size)
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.05)
    schedule = _one_cycle(optimizer, steps, peak_lr)
    row, column = _cell_of_patch()
    log = []
    for step in tqdm(range(steps), desc="vision tower", disable=not progress):
        layout = digits.Scenes.sample(batch, rng)
        labels = torch.tensor(layout.patch_labels())
        pictures = layout.render("train", rng)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            patch, present = heads(tower, pictures)
        patch, present = patch.float(), present.float()
        digit = patch[..., :11]
        target = torch.zeros(batch, 11).scatter_(1, torch.tensor(layout.digits), 1.0)[:, :10]
        loss = (
            F.cross_entropy(digit.flatten(0, 1), labels.flatten())
            + 0.2 * F.cross_entropy(patch[..., 11:14].flatten(0, 1), row.repeat(batch))
            + 0.2 * F.cross_entropy(patch[..., 14:].flatten(0, 1), column.repeat(batch))
            + 0.3 * F.binary_cross_entropy_with_logits(present, target)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            shown = labels != digits.NONE
            accuracy = (digit.argmax(-1) == labels)[shown].float().mean().item()
            log.append({"step": step, "loss": loss.item(), "patch_accuracy": accuracy})
    return tower, heads, log


def _place_words(words) -> torch.Tensor:
    """(144, 2) the ids of the words for each patch's row and column of cells."""
    row, column = _cell_of_patch()
    row_ids = torch.tensor(words.convert_tokens_to_ids(list(digits.ROWS)))
    column_ids = torch.tensor(words.convert_tokens_to_ids(list(digits.COLUMNS)))
    return torch.stack([row_ids[row], column_ids[column]], dim=-1)


def symbolic_batches(batch: int, turns: int, words, rng: np.random.Generator) -> Iterator[tuple]:
    """Endless batches of scenes in words with questions: patch words (B, 144), place words (144, 2), ids, labels.

    A patch's words are what it shows, its row and its column. One patch in twelve misreads its digit, so that
    the language model learns to weigh several.
    """
    places = _place_words(words)
    word_ids = np.array(words.convert_tokens_to_ids(list(digits.WORDS)))
    tail = words.eos_token_id
    while True:
        layout = digits.Scenes.sample(batch, rng)
        labels = layout.patch_labels()
        wrong = rng.random(labels.shape) < 1 / 12
        labels = np.where(wrong, rng.integers(0, 11, labels.shape), labels)
        texts = []
        for scene in layout.digits:
            kinds = rng.choice([*digits.QUESTION_TYPES, "caption"], turns, p=[0.2, 0.25, 0.15, 0.25, 0.15])
            text = []
            for kind in kinds:
                if kind == "caption":
                    question, answer = digits.CAPTION, digits.caption(scene)
                else:
                    question, answer = digits.ask(kind, scene, rng)
                text.append((question, answer))
            texts.append(text)
        flat = [f"user: {question} assistant:" for text in texts for question, _ in text]
        flat += [answer for text in texts for _, answer in text]
        encoded = words(flat, add_special_tokens=False).input_ids
        asked, answered = encoded[: len(flat) // 2], encoded[len(flat) // 2 :]
        rows, targets = [], []
        for index in range(batch):
            ids, target = [], []
            for turn in range(index * turns, (index + 1) * turns):
                ids += asked[turn] + answered[turn] + [tail]
                target += [-100] * len(asked[turn]) + answered[turn] + [tail]
            rows.append(torch.tensor(ids))
            targets.append(torch.tensor(target))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=words.pad_token_id)
        target = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
        yield torch.tensor(word_ids[labels]), places, ids, target


def train_language_model(
    steps: int = 3500, batch: int = 32, turns: int = 8, seed: int = 0, peak_lr: float = 1.5e-3, progress: bool = True
):
    """Train the language model to answer about scenes given in words. Returns it and a log of dicts.

    The first 70% of the steps show every second patch in each direction (36 a scene), which is twice as fast
    and teaches the same language; the rest show all 144. The sequence is
    ``<s> PATCHES user: question assistant: answer </s> user: ...``, where a patch is the sum of the embeddings of its
    three words plus noise: a stand-in for what a good projector will deliver.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng([seed, 3])
    words = tokenizer()
    model = LlamaForCausalLM(text_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = _one_cycle(optimizer, steps, peak_lr)
    head = torch.tensor([[words.bos_token_id]]).expand(batch, -1)
    batches = symbolic_batches(batch, turns, words, rng)
    log = []
    for step in tqdm(range(steps), desc="language model", disable=not progress):
        shown, places, ids, target = next(batches)
        if step < 0.7 * steps:
            every_second = (
                torch.arange(digits.TOKENS**2).view(digits.TOKENS, -1)[step % 2 :: 2, step // 2 % 2 :: 2].flatten()
            )
            shown, places = shown[:, every_second], places[every_second]
        embed = model.get_input_embeddings()
        noise = 0.02 * torch.randn(batch, shown.shape[1], model.config.hidden_size)
        patches = embed(shown) + embed(places).sum(1) + noise
        inputs = torch.cat([embed(head), patches, embed(ids)], dim=1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, -ids.shape[1] - 1 : -1]
            logits = model.lm_head(hidden[target != -100]).float()
        truth = target[target != -100]
        loss = F.cross_entropy(logits, truth)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()} at step {step}; lower peak_lr (now {peak_lr})")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            answers = truth != words.eos_token_id
            accuracy = (logits.argmax(-1) == truth)[answers].float().mean().item()
            log.append({"step": step, "loss": loss.item(), "token_accuracy": accuracy})
    return model, log


@torch.no_grad()
def symbolic_accuracy(model: LlamaForCausalLM, scenes: int = 200, seed: int = 0) -> dict[str, float]:
    """Per question type the share of fresh scenes, given in words (144 patches), that the language model answers."""
    rng = np.random.default_rng([seed, 4])
    words = tokenizer()
    embed = model.get_input_embeddings()
    layout = digits.Scenes.sample(scenes, rng)
    word_ids = torch.tensor(words.convert_tokens_to_ids(list(digits.WORDS)))
    patches = embed(word_ids[torch.tensor(layout.patch_labels())]) + embed(_place_words(words)).sum(1)
    head = embed(torch.full((scenes, 1), words.bos_token_id))
    result = {}
    for kind in digits.QUESTION_TYPES:
        asked, answers = zip(*(digits.ask(kind, scene, rng) for scene in layout.digits), strict=True)
        texts = [f"user: {question} assistant:" for question in asked]
        ids = words(texts, add_special_tokens=False, padding=True, padding_side="right", return_tensors="pt")
        hidden = model.model(inputs_embeds=torch.cat([head, patches, embed(ids.input_ids)], dim=1)).last_hidden_state
        last = patches.shape[1] + ids.attention_mask.sum(1)  # the row of "assistant:"
        guess = model.lm_head(hidden[torch.arange(scenes), last]).argmax(-1)
        truth = torch.tensor(words.convert_tokens_to_ids(list(answers)))
        result[kind] = (guess == truth).float().mean().item()
    return result


@torch.no_grad()
def patch_features(tower: CLIPVisionModel, split: str, scenes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, C) of the patches that show a digit in fresh scenes, penultimate layer, and the digits (n,)."""
    rng = np.random.default_rng([seed, 2])
    layout = digits.Scenes.sample(scenes, rng)
    out = tower(_normalise(layout.render(split, rng)), output_hidden_states=True)
    labels = layout.patch_labels()
    return out.hidden_states[-2][:, 1:].numpy()[labels != digits.NONE], labels[labels != digits.NONE]


def assemble(tower: CLIPVisionModel, language_model: LlamaForCausalLM, seed: int = 0) -> LlavaForConditionalGeneration:
    """A LLaVA of the two trained parts and a new projector."""
    torch.manual_seed(seed)
    ids = dict(zip(SPECIAL, range(len(SPECIAL)), strict=True))
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=ids["<image>"],
        image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=False,
    )
    return _fill(LlavaForConditionalGeneration(config), tower, language_model)


def _fill(model, tower: CLIPVisionModel, language_model: LlamaForCausalLM):
    """``model`` with the weights of its parts, and a new projector."""
    for name, part in model.model.named_children():
        if name.endswith("_tower"):
            part.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.model.state_dict())
    model.lm_head.load_state_dict(language_model.lm_head.state_dict())
    for part in model.model.multi_modal_projector.modules():  # the default 0.02 is too small at this width
        if isinstance(part, torch.nn.Linear):
            torch.nn.init.normal_(part.weight, std=part.in_features**-0.5)
            torch.nn.init.zeros_(part.bias)
    return model


def video_llava(model: LlavaForConditionalGeneration, seed: int = 0) -> VideoLlavaForConditionalGeneration:
    """A Video-LLaVA of the parts of a LLaVA, with a new projector, for frames of 48 x 48 pixels (6 x 6 patches).

    The tower keeps every second position in each direction, so that a frame spans the places of a whole scene; the
    language model gets the words of the questions on clips, untrained.
    """
    torch.manual_seed(seed)
    side = clips.SIZE // digits.PATCH
    tower = CLIPVisionModel(vision_config(image_size=clips.SIZE))
    weights = model.model.vision_tower.state_dict()
    name = next(name for name in weights if name.endswith("position_embedding.weight"))
    places = weights[name][1:].view(digits.TOKENS, digits.TOKENS, -1)[::2, ::2].reshape(side**2, -1)
    tower.load_state_dict(weights | {name: torch.cat([weights[name][:1], places])})
    language_model = language_model_of(model)
    language_model.resize_token_embeddings(len(tokenizer(clips.vocabulary())))
    ids = dict(zip(SPECIAL, range(len(SPECIAL)), strict=True))
    config = VideoLlavaConfig(
        vision_config=tower.config,
        text_config=language_model.config,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_seq_length=side**2,
        video_seq_length=FRAMES * (side**2 + 1),  # with CLS
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        pad_token_id=ids["<pad>"],
        tie_word_embeddings=False,
    )
    return _fill(VideoLlavaForConditionalGeneration(config), tower, language_model)


def embedded_video() -> Path:
    """The folder of the Video-LLaVA of the embedded parts, made on first use."""

    def write(folder: Path, **make) -> None:
        model = LlavaForConditionalGeneration.from_pretrained(TINY_LLAVA, dtype=torch.float32)
        save(video_llava(model), folder, words=video_processor())

    return digits.build_once(DATA / "cache" / "tiny-video-llava", {"version": 1}, write)


def video_processor() -> VideoLlavaProcessor:
    """The processor of the embedded Video-LLaVA."""
    images = processor(clips.SIZE).image_processor
    return VideoLlavaProcessor(
        images,
        FrameProcessor(images),
        tokenizer(clips.vocabulary()),
        patch_size=digits.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLS, which is dropped from images and kept in frames
        chat_template=CHAT_TEMPLATE,
    )


def language_model_of(model: LlavaForConditionalGeneration) -> LlamaForCausalLM:
    """The language model of a LLaVA as a causal language model; shares its weights."""
    language_model = LlamaForCausalLM(model.config.text_config)
    language_model.model, language_model.lm_head = model.model.language_model, model.lm_head
    return language_model.eval()


def save(model, folder: str | Path, log: dict | None = None, words=None) -> Path:
    """Write the unaligned model and its processor (``words``; default: the LLaVA's) to ``folder``, a plain Hugging Face
    folder. The weights are stored in half precision, to be small; the configuration says float32, in which it is
    trained, and which a finished run has, too.

    log: the training logs of its parts, kept beside it as ``backbones.json``.
    """
    folder = Path(folder)
    model.half().save_pretrained(folder)
    (words or processor()).save_pretrained(folder)
    model.float().config.dtype = torch.float32
    model.config.save_pretrained(folder)
    if log is not None:
        (folder / "backbones.json").write_text(json.dumps(log))
    return folder
