"""Examples to batches: the processor's tensors, and labels where the answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch.nn import functional as F

from llavolta.data import chat
from llavolta.data.entries import MEDIA
from llavolta.data.llava import Example
from llavolta.errors import DataError

IGNORED = -100
REFUSALS = (
    ValueError,
    ArithmeticError,
    LookupError,
    RuntimeError,
)  # what processors raise of sizes


@dataclass
class Collator:
    """Examples -> a batch of input_ids, attention_mask, labels (B, T) and pixel_values, pixel_values_videos.

    Labels are the answers, as the processor's chat template writes them with what follows (the end token, added where
    the template, as llava-1.5-7b-hf's, writes none); all else is ignored. Rows are padded at the end and cut at
    ``max_length``. Raises DataError when that would cut into a picture or leave no label.

    always_picture: examples without any picture get one more row, of a black picture and no label, so that every
    part of the model is in the graph of every batch, as DistributedDataParallel, ZeRO and FSDP need on all processes.
    """

    processor: object
    max_length: int = 2048
    always_picture: bool = False

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        texts, spans = zip(
            *(self._write(example.messages, example.name) for example in examples), strict=True
        )
        images = [
            example.images for example in examples
        ]  # some processors check their number text by text
        videos = [frames for example in examples for frames in example.videos]
        try:
            encoded = chat.encode(self.processor, texts, images, videos, padding_side="right")
        except DataError:
            raise
        except REFUSALS as error:
            for example in examples:  # which of them it is
                for image in example.images:
                    self.picture_tokens(image.size, len(example.images) == 1, example.name)
            if videos and len(examples) == 1:
                raise DataError(
                    f"{examples[0].name}: {self._refusal('its video', error)}"
                ) from None
            raise
        ids = encoded["input_ids"]
        placeholder = torch.isin(ids, self._placeholders)
        labels = torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            offsets = self.offsets(
                ids[row], encoded["attention_mask"][row], texts[row], example.name
            )
            labels[row] = torch.where(
                chat.within(texts[row], spans[row], offsets), ids[row], IGNORED
            )
            self._check_length(example.name, placeholder[row], labels[row] != IGNORED)
        keep = min(ids.shape[1], self.max_length)
        batch = {"input_ids": ids[:, :keep], "attention_mask": encoded["attention_mask"][:, :keep]}
        others = {
            key: value[:, :keep]
            if getattr(value, "shape", None) == ids.shape
            else value  # such as token_type_ids
            for key, value in encoded.items()
            if key not in batch
        }
        batch |= {"labels": labels[:, :keep], **others}
        return (
            self.with_black(batch, "image")
            if self.always_picture and not any(images) and not videos
            else batch
        )

    def offsets(
        self, ids: torch.Tensor, attention_mask: torch.Tensor, text: str, name: str
    ) -> torch.Tensor:
        """Returns from where to where in ``text`` each token goes: (T, 2), -1 where the processor wrote it.

        Args:
            ids: (T,) of one row of a batch.
            attention_mask: (T,) of the row.
            text: What the processor made the row of.
            name: Of the row, for the error.

        Raises:
            DataError: The tokens of ``text`` are not those of the row.
        """
        written, places = self._tokenize(text)
        is_text = ~torch.isin(written, self._written_placeholders)
        columns = (
            (~torch.isin(ids, self._placeholders) & attention_mask.bool()).nonzero().squeeze(1)
        )
        found = _placed(ids[columns].tolist(), written.tolist(), is_text.tolist())
        if found is None:
            raise DataError(f"{name}: the processor rewrote the text; its parts cannot be found")
        offsets = torch.full((len(ids), 2), -1)
        offsets[columns[found]] = places[is_text]
        return offsets

    def _tokenize(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens (T,) of a rendered text as the tokenizer alone reads it, and their offsets (T, 2) in it."""
        plain = self.processor.tokenizer(
            text, return_offsets_mapping=True, **chat.special(self.processor, text)
        )
        return torch.tensor(plain["input_ids"]), torch.tensor(plain["offset_mapping"]).view(-1, 2)

    def _write(self, messages: list[dict], name: str) -> tuple[str, list[tuple[int, int]]]:
        """``chat.write``, whose error says which entry it is."""
        try:
            return chat.write(self.processor, messages)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None

    def with_black(self, batch: dict[str, torch.Tensor], medium: str) -> dict[str, torch.Tensor]:
        """``batch`` and one more row, without a label, of a black "image" or a "video" of one black frame.

        For a process whose examples hold none while another's do: ZeRO-3 gathers a part's weights on all processes at
        once, and Video-LLaVA has a tower for each medium. ``batch`` must hold none of that medium. Raises DataError.
        """
        black, token = Image.new("RGB", (32, 32)), getattr(self.processor, f"{medium}_token")
        visual = {"images": [black]} if medium == "image" else {"videos": [[black]]}
        row = self.processor(text=[token], **visual, return_tensors="pt")
        if row["input_ids"].shape[1] > self.max_length:
            raise DataError(
                f"max_length {self.max_length} is less than a picture's visual tokens; raise it"
            )
        row["labels"] = torch.full_like(row["input_ids"], IGNORED)
        padding = {"input_ids": self.processor.tokenizer.pad_token_id, "labels": IGNORED}
        shape, joined = batch["input_ids"].shape, dict(batch)
        for key, value in row.items():
            if key not in batch:
                joined[key] = value.to(batch["input_ids"].device)
                continue
            both = batch[key], value.to(batch[key].device)
            if batch[key].shape == shape:
                length = max(len(part[0]) for part in both)
                both = (
                    F.pad(part, (0, length - len(part[0])), value=padding.get(key, 0))
                    for part in both
                )
            joined[key] = torch.cat(list(both))
        return joined

    @cached_property
    def _placeholders(self) -> torch.Tensor:
        """The ids of visual tokens in what the processor gives."""
        found = []
        for medium in MEDIA:
            own, every = (getattr(self.processor, f"{medium}_token_id{s}", None) for s in ("", "s"))
            # Gemma 3 calls the token before a picture image_token; InternVL counts those around one to them.
            found += every if every and own not in every else [own]
        return torch.tensor([token for token in found if token is not None])

    @cached_property
    def _written_placeholders(self) -> torch.Tensor:
        """The ids of what stands for a picture or a clip in the chat template's text."""
        tokens = (getattr(self.processor, f"{medium}_token", None) for medium in MEDIA)
        return torch.tensor(
            [self.processor.tokenizer.convert_tokens_to_ids(token) for token in tokens if token]
        )

    def _check_length(self, name: str, placeholder: torch.Tensor, answers: torch.Tensor) -> None:
        """placeholder, answers: (T,) whether a token is visual, and whether it is labelled."""
        if placeholder[self.max_length :].any():
            raise DataError(
                f"{name}: max_length {self.max_length} cuts off visual tokens; raise it"
            )
        if not answers[1 : self.max_length].any():
            raise DataError(
                f"{name}: no answer is left within max_length {self.max_length}; raise it"
            )

    def check_room(self, messages: list[dict], name: str, counts: Sequence[int]) -> None:
        """Raise DataError, naming the entry ``name``, if ``max_length`` cuts off one of its pictures, which become
        ``counts`` tokens each, or all of its answers."""
        text, spans = self._write(messages, name)
        written, places = self._tokenize(text)
        placeholder, answers = (
            torch.isin(written, self._written_placeholders),
            chat.within(text, spans, places),
        )
        times = torch.ones_like(written)
        times[placeholder] = torch.tensor(list(counts), dtype=times.dtype)
        self._check_length(
            name, placeholder.repeat_interleave(times), answers.repeat_interleave(times)
        )

    def text_tokens(self, messages: list[dict]) -> int:
        """Tokens of a conversation without its pictures."""
        written, _ = self._tokenize(chat.write(self.processor, messages)[0])
        return int((~torch.isin(written, self._written_placeholders)).sum())

    @cached_property
    def template_tokens(self) -> tuple[int, int] | None:
        """Tokens that the chat template adds to a system turn with one question, and to each further question; None if
        it refuses system turns."""
        roles = ("system", *("user", "assistant") * 2)
        turns = [{"role": role, "content": [{"type": "text", "text": "."}]} for role in roles]
        try:
            counts = [self.text_tokens(part) for part in (turns, turns[:3], turns[1:3])]
        except DataError:
            return None
        return max(counts[1:]), counts[0] - counts[1]

    @cached_property
    def fixed_picture_tokens(self) -> int | None:
        """Visual tokens of every picture; None if they depend on its size."""
        counts = {self.picture_tokens(size) for size in ((64, 64), (640, 480), (300, 900))}
        return counts.pop() if len(counts) == 1 else None

    def picture_tokens(
        self, size: tuple[int, int], alone: bool = True, name: str = "an entry"
    ) -> int:
        """Visual tokens of a picture of ``size`` (width, height); LLaVA-OneVision cuts it into tiles only if it is the
        only one of its conversation. Raises DataError, naming the entry ``name``, for a size that the processor
        refuses, as Qwen-VL's does one that is 200 times as long as wide."""
        if (size, alone) not in self._counts:
            number = 1 if alone else 2
            pictures = [[Image.new("RGB", size)] * number]
            try:
                row = self.processor(
                    text=[self.processor.image_token * number], images=pictures, return_tensors="pt"
                )
            except REFUSALS as error:
                what = f"an image of {size[0]} x {size[1]} pixels"
                raise DataError(f"{name}: {self._refusal(what, error)}") from None
            self._counts[size, alone] = (
                int(torch.isin(row["input_ids"], self._placeholders).sum()) // number
            )
        return self._counts[size, alone]

    def _refusal(self, what: str, error: Exception) -> str:
        return f"{type(self.processor).__name__} refuses {what} ({error}); crop or enlarge it, or drop the entry"

    @cached_property
    def _counts(self) -> dict[tuple[tuple[int, int], bool], int]:
        return {}


def _placed(ids: list[int], written: list[int], said: list[bool]) -> list[int] | None:
    """Where in ``ids`` each token of ``written`` stands that is ``said``, no placeholder; None if it cannot be told.

    The processor repeats a placeholder for each visual token, and may write tokens of its own around a picture (rows,
    tiles). So the text before the first picture begins ``ids``, that behind the last ends them, and what stands between
    two pictures is looked for from the end.
    """
    pieces: list[list[int]] = [[]]
    for token, is_said in zip(written, said, strict=True):
        if is_said:
            pieces[-1].append(token)
        else:
            pieces.append([])
    first, *between = pieces
    if not between:
        return list(range(len(ids))) if ids == first else None
    place: list[int] = []
    end = len(ids)
    for number, piece in enumerate(reversed(between)):
        start = end - len(piece)
        while number and start >= len(first) and ids[start : start + len(piece)] != piece:
            start -= 1
        if start < len(first) or ids[start : start + len(piece)] != piece:
            return None
        place, end = [*range(start, start + len(piece)), *place], start
    return [*range(len(first)), *place] if ids[: len(first)] == first else None
