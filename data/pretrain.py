"""How data/tiny-llava was made: pre-training of the vision tower and the language model; 00_backbones calls it.

The tower learns from pictures alone what each patch shows and where. The language model learns the questions on scenes
given in its own words. Neither sees a held-out digit. Some fifty minutes on 2 cores.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import CLIPVisionModel, LlamaForCausalLM

from llavolta.worlds import digits
from llavolta.worlds.backbones import text_config, tokenizer, vision_config


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
