"""Examples to batches: the processor's tensors, and labels where the answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch.nn import functional as F

from llavolta.data.entries import MEDIA
from llavolta.data.llava import Example
from llavolta.errors import DataError

IGNORED = -100
REFUSALS = (ValueError, ArithmeticError, LookupError, RuntimeError)  # what processors raise of sizes


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
        tokenizer = self.processor.tokenizer
        texts, spans = zip(*(self._render(example.messages) for example in examples), strict=True)
        images = [image for example in examples for image in example.images]
        videos = [frames for example in examples for frames in example.videos]
        if videos and not hasattr(self.processor, "video_processor"):
            raise DataError(f"{type(self.processor).__name__} reads no video; train a model that does, or drop them")
        by_text = [example.images for example in examples] if images else None  # some check their number text by text
        visual = {"images": by_text} | ({"videos": videos} if videos else {})
        try:
            encoded = self.processor(
                text=list(texts), **visual, padding=True, padding_side="right", return_tensors="pt"
            )
        except REFUSALS as error:
            for example in examples:  # which of them it is
                for image in example.images:
                    self.picture_tokens(image.size, len(example.images) == 1, example.name)
            if videos and len(examples) == 1:
                raise DataError(f"{examples[0].name}: {self._refusal('its video', error)}") from None
            raise
        plain = tokenizer(list(texts), return_offsets_mapping=True)
        ids = encoded["input_ids"]
        placeholder = torch.isin(ids, self._placeholders)
        labels = torch.full_like(ids, IGNORED)
        for row, example in enumerate(examples):
            written = torch.tensor(plain["input_ids"][row])
            starts, ends = torch.tensor(plain["offset_mapping"][row]).unbind(1)
            answers = torch.zeros_like(written, dtype=torch.bool)
            for first, last in spans[row]:
                answers |= (starts >= first) & (ends <= last) & (ends > starts)
            text = (~placeholder[row] & encoded["attention_mask"][row].bool()).nonzero().squeeze(1)
            said = ~torch.isin(written, self._written_placeholders)
            place = _placed(ids[row][text].tolist(), written.tolist(), said.tolist())
            if place is None:
                raise DataError(f"{example.name}: the processor rewrote the text; its answers cannot be found")
            labels[row, text[place]] = torch.where(answers, written, IGNORED)[said]
            self._check_length(example.name, placeholder[row], labels[row] != IGNORED)
        keep = min(ids.shape[1], self.max_length)
        batch = {"input_ids": ids[:, :keep], "attention_mask": encoded["attention_mask"][:, :keep]}
        others = {
            key: value[:, :keep] if getattr(value, "shape", None) == ids.shape else value  # such as token_type_ids
            for key, value in encoded.items()
            if key not in batch
        }
        batch |= {"labels": labels[:, :keep], **others}
        return self.with_black(batch, "image") if self.always_picture and not images and not videos else batch

    def with_black(self, batch: dict[str, torch.Tensor], medium: str) -> dict[str, torch.Tensor]:
        """``batch`` and one more row, without a label, of a black "image" or a "video" of one black frame.

        For a process whose examples hold none while another's do: ZeRO-3 gathers a part's weights on all processes at
        once, and Video-LLaVA has a tower for each medium. ``batch`` must hold none of that medium. Raises DataError.
        """
        black, token = Image.new("RGB", (32, 32)), getattr(self.processor, f"{medium}_token")
        visual = {"images": [black]} if medium == "image" else {"videos": [[black]]}
        row = self.processor(text=[token], **visual, return_tensors="pt")
        if row["input_ids"].shape[1] > self.max_length:
            raise DataError(f"max_length {self.max_length} is less than a picture's visual tokens; raise it")
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
                both = (F.pad(part, (0, length - len(part[0])), value=padding.get(key, 0)) for part in both)
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
        return torch.tensor([self.processor.tokenizer.convert_tokens_to_ids(token) for token in tokens if token])

    def _check_length(self, name: str, placeholder: torch.Tensor, answers: torch.Tensor) -> None:
        """placeholder, answers: (T,) whether a token is visual, and whether it is labelled."""
        if placeholder[self.max_length :].any():
            raise DataError(f"{name}: max_length {self.max_length} cuts off visual tokens; raise it")
        if not answers[1 : self.max_length].any():
            raise DataError(f"{name}: no answer is left within max_length {self.max_length}; raise it")

    def check_room(self, messages: list[dict], name: str, counts: Sequence[int]) -> None:
        """Raise DataError, naming the entry ``name``, if ``max_length`` cuts off one of its pictures, which become
        ``counts`` tokens each, or all of its answers."""
        text, spans = self._render(messages)
        written = self.processor.tokenizer(text, return_offsets_mapping=True)
        placeholder = torch.isin(torch.tensor(written["input_ids"]), self._written_placeholders)
        starts, ends = torch.tensor(written["offset_mapping"]).unbind(1)
        answers = torch.zeros_like(placeholder)
        for first, last in spans:
            answers |= (starts >= first) & (ends <= last) & (ends > starts)
        times = torch.ones_like(starts)
        times[placeholder] = torch.tensor(list(counts), dtype=times.dtype)
        self._check_length(name, placeholder.repeat_interleave(times), answers.repeat_interleave(times))

    def text_tokens(self, messages: list[dict]) -> int:
        """Tokens of a conversation without its pictures."""
        text, _ = self._render(messages)
        ids = torch.tensor(self.processor.tokenizer(text)["input_ids"])
        return int((~torch.isin(ids, self._written_placeholders)).sum())

    @cached_property
    def template_tokens(self) -> int:
        """Tokens that the chat template adds to a conversation of one turn."""
        said = [{"type": "text", "text": ""}]
        text, _ = self._render([{"role": "user", "content": said}, {"role": "assistant", "content": said}])
        return len(self.processor.tokenizer(text)["input_ids"])

    @cached_property
    def fixed_picture_tokens(self) -> int | None:
        """Visual tokens of every picture; None if they depend on its size."""
        counts = {self.picture_tokens(size) for size in ((64, 64), (640, 480), (300, 900))}
        return counts.pop() if len(counts) == 1 else None

    def picture_tokens(self, size: tuple[int, int], alone: bool = True, name: str = "an entry") -> int:
        """Visual tokens of a picture of ``size`` (width, height); LLaVA-OneVision cuts it into tiles only if it is the
        only one of its conversation. Raises DataError, naming the entry ``name``, for a size that the processor
        refuses, as Qwen-VL's does one that is 200 times as long as wide."""
        if (size, alone) not in self._counts:
            number = 1 if alone else 2
            pictures = [[Image.new("RGB", size)] * number]
            try:
                row = self.processor(text=[self.processor.image_token * number], images=pictures, return_tensors="pt")
            except REFUSALS as error:
                what = f"an image of {size[0]} x {size[1]} pixels"
                raise DataError(f"{name}: {self._refusal(what, error)}") from None
            self._counts[size, alone] = int(torch.isin(row["input_ids"], self._placeholders).sum()) // number
        return self._counts[size, alone]

    def _refusal(self, what: str, error: Exception) -> str:
        return f"{type(self.processor).__name__} refuses {what} ({error}); crop or enlarge it, or drop the entry"

    @cached_property
    def _counts(self) -> dict[tuple[tuple[int, int], bool], int]:
        return {}

    def _render(self, conversation: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and from where to where in it each answer that is learned goes.

        A message with ``"learn": False`` is read and has no label.
        """

        def render(messages, **options):
            return self.processor.apply_chat_template(messages, tokenize=False, **options)

        tokenizer, text, spans = self.processor.tokenizer, render(conversation), []
        eos, added = tokenizer.eos_token or "", 0
        ends = (*tokenizer.get_added_vocab(), eos)
        for turn, message in enumerate(conversation):
            if message["role"] != "assistant":
                continue
            before = render(conversation[:turn], add_generation_prompt=True)
            after = render(conversation[: turn + 1])
            if not after.startswith(before):
                raise DataError("the chat template rewrites earlier turns; give a template that only appends")
            first, last = len(before) + added, len(after) + added
            if eos and not after.rstrip().endswith(ends):  # a model tuned so would never learn to stop
                place = len(after.rstrip()) + added
                text = text[:place] + eos + text[place:]
                last, added = place + len(eos), added + len(eos)
            if message.get("learn", True):
                spans.append((first, last))
        return text, spans


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
