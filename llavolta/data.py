"""LLaVA's training data: a JSON list of conversations and a folder of pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from llavolta.errors import UserError

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
IGNORED = -100


class DataError(UserError, ValueError):
    """A data set, entry or picture that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Example:
    """One conversation. messages: transformers' chat format. images: the opened pictures, RGB, in their order."""

    messages: list[dict]
    images: list[Image.Image]
    name: str


class LlavaData(Dataset):
    """Conversations in LLaVA's format: ``id``, ``image`` (a path, a list of paths or none), ``conversations``.

    file: the JSON list. images: the folder that the image paths are relative to (default: the JSON's own folder).
    pad: pad pictures to squares with this RGB colour, as LLaVA-1.5 does; None leaves them as they are.
    The structure of every entry is checked on opening, each picture when it is read. Raises DataError.
    """

    def __init__(self, file: str | Path, images: str | Path | None = None, pad: tuple[int, int, int] | None = None):
        self.file = Path(file)
        self.folder = Path(images) if images else self.file.parent
        self.pad = pad
        try:
            self.entries = json.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"no data file {self.file}; give the path of a JSON list of conversations") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{self.file} is not JSON ({error}); the download may be cut off") from None
        if not isinstance(self.entries, list) or not self.entries:
            raise DataError(f"{self.file} must hold a JSON list with at least one conversation")
        if not self.folder.is_dir():
            raise DataError(f"no image folder {self.folder}; give the folder that the image paths are relative to")
        for index, entry in enumerate(self.entries):
            check_entry(entry, f"{self.file.name} entry {index}")
        self.has_image = np.array([bool(entry.get("image")) for entry in self.entries])
        self.lengths = np.array([_words(entry) for entry in self.entries])

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Example:
        entry = self.entries[index]
        name = f"{self.file.name} entry {index} (id {entry.get('id')!r})"
        images = [open_image(self.folder, path, name, self.pad) for path in _paths(entry)]
        return Example(_messages(entry), images, name)

    def image_paths(self, index: int) -> list[Path]:
        """The files of an entry's pictures."""
        return [self.folder / path for path in _paths(self.entries[index])]

    def questions(self) -> Iterator[dict]:
        """Every turn as a question of its own: index (of the entry), type, question, answer."""
        for index, entry in enumerate(self.entries):
            turns = entry["conversations"]
            types = entry.get("types") or ["all"] * (len(turns) // 2)
            for asked, answered, kind in zip(turns[::2], turns[1::2], types, strict=True):
                question = asked["value"].replace("<image>", "").strip()
                yield {"index": index, "type": kind, "question": question, "answer": answered["value"]}


def _paths(entry: dict) -> list[str]:
    image = entry.get("image")
    return [] if not image else [image] if isinstance(image, str) else list(image)


def _words(entry: dict) -> int:
    return sum(len(turn["value"].split()) for turn in entry["conversations"])


def check_entry(entry: object, name: str) -> None:
    """Raise DataError unless ``entry`` is a LLaVA conversation whose placeholders match its pictures."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{name} has no 'conversations' list; the file is not in LLaVA's format")
    for turn in turns:
        texts = isinstance(turn, dict) and all(isinstance(turn.get(key), str) for key in ("from", "value"))
        if not texts or turn["from"] not in ROLES:
            raise DataError(f"{name}: each turn needs 'from' (human or gpt) and 'value' (text), not {str(turn)[:80]}")
    speakers = [turn["from"] for turn in turns if turn["from"] != "system"]
    if len(speakers) < 2 or len(speakers) % 2 or any(s != ("human", "gpt")[i % 2] for i, s in enumerate(speakers)):
        raise DataError(f"{name}: the turns must alternate human, gpt, human, gpt, ..., not {speakers[:6]}")
    image = entry.get("image")
    if image is not None and not isinstance(image, (str, list)):
        raise DataError(f"{name}: 'image' must be a path or a list of paths, not {type(image).__name__}")
    if isinstance(image, list) and not all(isinstance(path, str) for path in image):
        raise DataError(f"{name}: 'image' must list paths, not {str(image)[:80]}")
    placeholders = sum(turn["value"].count("<image>") for turn in turns)
    if placeholders != len(_paths(entry)):
        raise DataError(
            f"{name} has {placeholders} <image> placeholders for {len(_paths(entry))} images; they must be equal"
        )


def _messages(entry: dict) -> list[dict]:
    messages = []
    for turn in entry["conversations"]:
        text = turn["value"]
        parts = [{"type": "image"}] * text.count("<image>")  # pictures go before the text, as in LLaVA
        parts.append({"type": "text", "text": text.replace("<image>", "").strip()})
        messages.append({"role": ROLES[turn["from"]], "content": parts})
    return messages


def open_image(folder: Path, path: str, name: str, pad: tuple[int, int, int] | None = None) -> Image.Image:
    """The picture at ``path`` below ``folder``, RGB. Raises DataError, naming the entry ``name``."""
    full = (folder / path).resolve()
    if not full.is_relative_to(folder.resolve()):
        raise DataError(f"{name}: image path {path!r} leads out of the image folder")
    try:
        with Image.open(full) as opened:
            image = opened.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{name}: no image {path!r} in {folder}; check the image folder or fetch the file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name}: image {path!r} cannot be read ({error}); fetch it again or drop the entry") from None
    if pad is None or image.width == image.height:
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), pad)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@dataclass
class Collator:
    """Examples -> a batch of input_ids, attention_mask, labels (B, T) and pixel_values.

    Labels are the answers, as the processor's chat template writes them with what follows (the end token); all
    else is ignored. Rows are padded at the end and cut at ``max_length``. Raises DataError when that would cut into
    a picture or leave no label.
    """

    processor: object
    max_length: int = 2048

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        texts, spans = zip(*(self._render(example) for example in examples), strict=True)
        images = [image for example in examples for image in example.images]
        encoded = self.processor(
            text=list(texts), images=images or None, padding=True, padding_side="right", return_tensors="pt"
        )
        plain = tokenizer(list(texts), return_offsets_mapping=True)
        ids, picture = encoded["input_ids"], self.processor.image_token_id
        labels = torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            written = torch.tensor(plain["input_ids"][row])
            starts, ends = torch.tensor(plain["offset_mapping"][row]).unbind(1)
            answers = torch.zeros_like(written, dtype=torch.bool)
            for first, last in spans[row]:
                answers |= (starts >= first) & (ends <= last) & (ends > starts)
            text = (ids[row] != picture) & encoded["attention_mask"][row].bool()
            # The processor repeats the picture token for each visual token, and changes nothing else.
            if not torch.equal(ids[row][text], written[written != picture]):
                raise DataError(f"{example.name}: the processor rewrote the text; its answers cannot be found")
            values = torch.where(answers, written, IGNORED)[written != picture]
            labels[row, text.nonzero().squeeze(1)] = values
            self._check_length(example, ids[row], labels[row])
        keep = min(ids.shape[1], self.max_length)
        batch = {"input_ids": ids[:, :keep], "attention_mask": encoded["attention_mask"][:, :keep]}
        others = {key: value for key, value in encoded.items() if key not in batch}
        return {**batch, "labels": labels[:, :keep], **others}

    def _check_length(self, example: Example, ids: torch.Tensor, labels: torch.Tensor) -> None:
        if (ids[self.max_length :] == self.processor.image_token_id).any():
            raise DataError(f"{example.name}: max_length {self.max_length} cuts off visual tokens; raise it")
        if not (labels[1 : self.max_length] != IGNORED).any():
            raise DataError(f"{example.name}: no answer is left within max_length {self.max_length}; raise it")

    def _render(self, example: Example) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and from where to where in it each answer goes."""

        def render(messages, **options):
            return self.processor.apply_chat_template(messages, tokenize=False, **options)

        spans = []
        for turn, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            before = render(example.messages[:turn], add_generation_prompt=True)
            after = render(example.messages[: turn + 1])
            if not after.startswith(before):
                raise DataError("the chat template rewrites earlier turns; give a template that only appends")
            spans.append((len(before), len(after)))
        return render(example.messages), spans


class GroupedSampler(Sampler[int]):
    """Batches of one modality and of like length, in random order: LLaVA's ``group_by_modality_length``.

    The order is a function of the seed and the epoch alone, so a resumed run sees the same batches.
    batch: examples of one optimizer step over all processes. The few left over at the end may mix modalities.
    """

    def __init__(self, lengths: np.ndarray, has_image: np.ndarray, batch: int, seed: int):
        self.lengths, self.has_image, self.batch, self.seed, self.epoch = lengths, has_image, batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        batches, rest = [], []
        for wanted in (True, False):
            chosen = rng.permutation(np.flatnonzero(self.has_image == wanted))
            mega = self.batch * 50  # sort by length only within some 50 batches, so that epochs differ
            for start in range(0, len(chosen), mega):
                part = chosen[start : start + mega]
                part = part[np.argsort(-self.lengths[part], kind="stable")]
                whole = len(part) // self.batch * self.batch
                batches += list(part[:whole].reshape(-1, self.batch))
                rest.append(part[whole:])
        order = [batches[i] for i in rng.permutation(len(batches))]
        return iter(np.concatenate([*order, *rest]).tolist())
