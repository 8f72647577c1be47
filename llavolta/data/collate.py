"""Turns examples into batches: the processor's tensors, and labels on the answers."""

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

IGNORED = -100  # label of tokens without a loss
# What processors raise for images of sizes that they cannot process.
REFUSALS = (ValueError, ArithmeticError, LookupError, RuntimeError)


@dataclass
class Collator:
    """Turns examples into a batch of tensors for a model.

    A batch holds input_ids, attention_mask and labels (B, T), and what else the processor returns,
    such as pixel_values and pixel_values_videos. Labels are the tokens of the answers, with their
    end tokens (see ``chat.write``), and -100 elsewhere. Rows are padded at the end, and cut at
    ``max_length``.

    Attributes:
        processor: A transformers processor with a chat template.
        max_length: Most tokens of a row, visual tokens included.
        always_picture: Whether a batch without images and videos gets one more row, of a black
            image and without labels. Then every part of the model takes part in every batch, as
            DistributedDataParallel, ZeRO and FSDP need on all processes.
    """

    processor: object
    max_length: int = 2048
    always_picture: bool = False

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """Collate B examples.

        Args:
            examples: The examples, each with its opened images and frames.

        Returns:
            The batch; see the class.

        Raises:
            DataError: ``max_length`` cuts off visual tokens, or leaves no label. Or the chat
                template or the processor rejects an example.
        """
        texts, spans = zip(
            *(self._write(example.messages, example.name) for example in examples), strict=True
        )
        # A list per text, as some processors compare its length with the text's placeholders.
        images = [example.images for example in examples]
        videos = [frames for example in examples for frames in example.videos]
        try:
            encoded = chat.encode(self.processor, texts, images, videos, padding_side="right")
        except DataError:  # is a ValueError as well, but has its message already
            raise
        except REFUSALS as error:
            for example in examples:  # raises for the image that was rejected, and names its entry
                for image in example.images:
                    self.picture_tokens(image.size, len(example.images) == 1, example.name)
            # Which video of several examples was rejected is not known.
            if videos and len(examples) == 1:
                raise DataError(
                    f"{examples[0].name}: {self._refusal('its video', error)}"
                ) from None
            raise
        ids = encoded["input_ids"]
        placeholder = torch.isin(ids, self._placeholders)  # (B, T)
        labels = torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            offsets = self.offsets(
                ids[row], encoded["attention_mask"][row], texts[row], example.name
            )
            # (T,) the ids where an answer is, else IGNORED
            labels[row] = torch.where(
                chat.within(texts[row], spans[row], offsets), ids[row], IGNORED
            )
            self._check_length(example.name, placeholder[row], labels[row] != IGNORED)
        keep = min(ids.shape[1], self.max_length)
        batch = {"input_ids": ids[:, :keep], "attention_mask": encoded["attention_mask"][:, :keep]}
        # Other tensors of the tokens, such as token_type_ids, are cut as well; pixels are not.
        others = {
            key: value[:, :keep] if getattr(value, "shape", None) == ids.shape else value
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
        """Locate each token of a row in the text that it was made of.

        Args:
            ids: (T,) token ids of one row of a batch.
            attention_mask: (T,) mask of that row.
            text: The rendered text that the processor made the row of.
            name: What the error calls the row.

        Returns:
            (T, 2) start and end of each token, in characters of ``text``. -1 for padding, visual
            tokens, and what else the processor inserted.

        Raises:
            DataError: The tokens of ``text`` are not found in the row.
        """
        written, places = self._tokenize(text)
        is_text = ~torch.isin(written, self._written_placeholders)
        # Columns of the row that may hold text: neither visual tokens nor padding.
        columns = (
            (~torch.isin(ids, self._placeholders) & attention_mask.bool()).nonzero().squeeze(1)
        )
        found = _placed(ids[columns].tolist(), written.tolist(), is_text.tolist())
        if found is None:
            raise DataError(f"{name}: the processor rewrote the text; its parts cannot be found")
        offsets = torch.full((len(ids), 2), -1)
        offsets[columns[found]] = places[is_text]  # (text tokens, 2) -> (T, 2)
        return offsets

    def _tokenize(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenize a rendered text alone: ids (T,), and their start and end in it (T, 2)."""
        plain = self.processor.tokenizer(
            text, return_offsets_mapping=True, **chat.special(self.processor, text)
        )
        return torch.tensor(plain["input_ids"]), torch.tensor(plain["offset_mapping"]).view(-1, 2)

    def _write(self, messages: list[dict], name: str) -> tuple[str, list[tuple[int, int]]]:
        """Call ``chat.write``, and name the entry in its error."""
        try:
            return chat.write(self.processor, messages)
        except DataError as error:
            raise DataError(f"{name}: {error}") from None

    def with_black(self, batch: dict[str, torch.Tensor], medium: str) -> dict[str, torch.Tensor]:
        """Append a row of one black image or video, without labels, to a batch.

        A process needs it whose batch has no such media while another's has: ZeRO-3 gathers the
        weights of a module on all processes at once, and Video-LLaVA has one tower per modality.

        Args:
            batch: A batch without media of this modality.
            medium: "image" or "video"; the video has one frame.

        Returns:
            A new batch of B + 1 rows, as long as the longer of ``batch`` and the black row.

        Raises:
            DataError: The black row is longer than ``max_length``.
        """
        black, token = Image.new("RGB", (32, 32)), getattr(self.processor, f"{medium}_token")
        visual = {"images": [black]} if medium == "image" else {"videos": [[black]]}
        row = self.processor(text=[token], **visual, return_tensors="pt")  # (1, T')
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
            if batch[key].shape == shape:  # (B, T), (1, T') -> (B + 1, the longer of T and T')
                length = max(len(part[0]) for part in both)
                both = (
                    F.pad(part, (0, length - len(part[0])), value=padding.get(key, 0))
                    for part in both
                )
            joined[key] = torch.cat(list(both))
        return joined

    @cached_property
    def _placeholders(self) -> torch.Tensor:
        """Ids of visual tokens in the processor's output."""
        found = []
        for medium in MEDIA:
            own, every = (getattr(self.processor, f"{medium}_token_id{s}", None) for s in ("", "s"))
            # The plural wins unless it holds the singular: for Gemma 3 ``image_token_id`` is the
            # token before an image, and InternVL's ``image_token_ids`` also lists those around it.
            found += every if every and own not in every else [own]
        return torch.tensor([token for token in found if token is not None])

    @cached_property
    def _written_placeholders(self) -> torch.Tensor:
        """Ids of the tokens that stand for one image or video in a rendered text."""
        tokens = (getattr(self.processor, f"{medium}_token", None) for medium in MEDIA)
        return torch.tensor(
            [self.processor.tokenizer.convert_tokens_to_ids(token) for token in tokens if token]
        )

    def _check_length(self, name: str, placeholder: torch.Tensor, answers: torch.Tensor) -> None:
        """Raise DataError if ``max_length`` cuts off visual tokens, or all labels.

        Args:
            name: What the error calls the row.
            placeholder: (T,) bool, True for visual tokens.
            answers: (T,) bool, True for labelled tokens.
        """
        if placeholder[self.max_length :].any():
            raise DataError(
                f"{name}: max_length {self.max_length} cuts off visual tokens; raise it"
            )
        if not answers[1 : self.max_length].any():  # nothing predicts the first token
            raise DataError(
                f"{name}: no answer is left within max_length {self.max_length}; raise it"
            )

    def check_room(self, messages: list[dict], name: str, counts: Sequence[int]) -> None:
        """Check, without its images, that an entry fits into ``max_length``.

        Args:
            messages: Messages in transformers' chat format.
            name: What the error calls the entry.
            counts: Visual tokens of each image, in the order of the images.

        Raises:
            DataError: ``max_length`` cuts off visual tokens, or leaves no label.
        """
        text, spans = self._write(messages, name)
        written, places = self._tokenize(text)
        placeholder, answers = (
            torch.isin(written, self._written_placeholders),
            chat.within(text, spans, places),
        )
        # The processor will repeat each placeholder as often as its image has visual tokens.
        times = torch.ones_like(written)
        times[placeholder] = torch.tensor(list(counts), dtype=times.dtype)
        self._check_length(
            name, placeholder.repeat_interleave(times), answers.repeat_interleave(times)
        )

    def text_tokens(self, messages: list[dict]) -> int:
        """Count the tokens of a conversation without those of its images and videos."""
        written, _ = self._tokenize(chat.write(self.processor, messages)[0])
        return int((~torch.isin(written, self._written_placeholders)).sum())

    @cached_property
    def template_tokens(self) -> tuple[int, int] | None:
        """Tokens of the chat template for one question, and for each further one.

        The first number counts a system turn too, where that makes it larger. None if the template
        rejects system turns.
        """
        roles = ("system", *("user", "assistant") * 2)
        turns = [{"role": role, "content": [{"type": "text", "text": "."}]} for role in roles]
        try:
            # Two questions, one question, and one without the system turn.
            counts = [self.text_tokens(part) for part in (turns, turns[:3], turns[1:3])]
        except DataError:
            return None
        return max(counts[1:]), counts[0] - counts[1]

    @cached_property
    def fixed_picture_tokens(self) -> int | None:
        """Visual tokens of every image; None if they depend on the image's size."""
        counts = {self.picture_tokens(size) for size in ((64, 64), (640, 480), (300, 900))}
        return counts.pop() if len(counts) == 1 else None

    def picture_tokens(
        self, size: tuple[int, int], alone: bool = True, name: str = "an entry"
    ) -> int:
        """Count the visual tokens of an image of a given size.

        Args:
            size: (width, height) in pixels.
            alone: Whether it is the only image of its conversation. LLaVA-OneVision cuts only such
                an image into tiles.
            name: What the error calls the entry.

        Returns:
            The number of visual tokens.

        Raises:
            DataError: The processor rejects this size. Qwen-VL's, for example, rejects an image
                that is over 200 times as long as it is wide.
        """
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
        """Return the message that the processor rejects an image or a video."""
        return (
            f"{type(self.processor).__name__} refuses {what} ({error}); crop or enlarge it, or "
            "drop the entry"
        )

    @cached_property
    def _counts(self) -> dict[tuple[tuple[int, int], bool], int]:
        """Results of ``picture_tokens`` by size and ``alone``."""
        return {}


def _placed(ids: list[int], written: list[int], said: list[bool]) -> list[int] | None:
    """Find the positions of a text's tokens in a row that the processor made of it.

    The processor repeats a placeholder for each visual token, and may insert tokens around an image
    (for rows or tiles). So the text before the first image starts the row, the text after the last
    one ends it, and texts between images are searched for from the end.

    Args:
        ids: The tokens of the row without visual tokens and padding.
        written: The tokens of the text, with one placeholder per image.
        said: For each token of ``written``, whether it is text and no placeholder.

    Returns:
        The position in ``ids`` of each text token; None if they cannot be found.
    """
    pieces: list[list[int]] = [[]]  # the text tokens before, between and after the placeholders
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
        # number 0 is the last piece, which must end the row; the others move left until they match.
        while number and start >= len(first) and ids[start : start + len(piece)] != piece:
            start -= 1
        if start < len(first) or ids[start : start + len(piece)] != piece:
            return None
        place, end = [*range(start, start + len(piece)), *place], start
    return [*range(len(first)), *place] if ids[: len(first)] == first else None
