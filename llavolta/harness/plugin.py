"""The lmms-eval model ``llavolta``: any supported checkpoint under any plan.

Use it as ``--model llavolta --model_args pretrained=PATH,plan=2:avgpool:8``. lmms-eval splits
model_args at "," and each part at its first "=", so plans may contain "=". The shell needs quotes
for ";": ``--model_args "pretrained=PATH,plan=8:fastv:keep=0.5;16:fastv:0.5"``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import groupby

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from PIL import Image
from tqdm.auto import tqdm

from llavolta.compression.patch import compress
from llavolta.compression.plan import format_plan, parse_plan
from llavolta.data import Collator, Example, pad_to_square, to_rgb
from llavolta.data.video import read_frames
from llavolta.errors import UserError
from llavolta.studies.evaluation import chat_of, greedy, prompts
from llavolta.studies.opening import trained_padding
from llavolta.train.models import load_model

MAX_NEW_TOKENS = 1024  # for tasks without a limit of their own
# Options of tasks that do nothing here: those of sampling, and one of LLaVA's own code.
IGNORED_OPTIONS = ("temperature", "top_p", "do_sample", "image_aspect_ratio")


class Llavolta(lmms):
    """A vision-language model under a compression plan, which answers greedily and in batches.

    Under torchrun or accelerate, every process loads the model and answers its share.

    Args:
        pretrained: A folder, a hub name, a folder of adapters, or a model that comes with the
            package. "embedded" has an untrained projector.
        plan: The plan's text; see ``llavolta.compression.plan``.
        batch_size: Requests in a batch.
        max_batch_size: Not used; lmms-eval passes it.
        device: Of the model; None: this process's accelerator, or the CPU.
        dtype: "float32", "bfloat16" or "float16"; None: float32 on a CPU, bfloat16 elsewhere.
        frames: Frames of a clip, sampled uniformly. A model without a video processor gets them as
            images.
        pad_to_square: Pad images to squares, as LLaVA-1.5 needs; None: as in the model's training,
            if its folder is a run folder.

    Raises:
        UserError: An option that cannot be used.
        PlanError: The plan cannot be read or does not fit the model.
        UnsupportedModel: The model cannot be compressed under this plan.
    """

    is_simple = True  # lmms-eval passes text and images, not chat messages

    def __init__(
        self,
        pretrained: str,
        plan: str = "none",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        frames: int = 8,
        pad_to_square: bool | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(
                f"batch_size must be a whole number from 1, not {batch_size!r}; "
                "'auto' is not supported"
            )
        self.plan = format_plan(parse_plan(plan))
        self.batch_size = int(batch_size)
        self.frames = frames
        self.device = _device(device)
        dtype = dtype or ("float32" if self.device.type == "cpu" else "bfloat16")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"unknown dtype {dtype!r}; float32, bfloat16 or float16")
        model, self.processor = load_model(pretrained, dtype=getattr(torch, dtype))
        self.model = model.to(self.device).eval()
        self.pad = trained_padding(self.processor, pretrained, pad_to_square)
        with compress(self.model, self.plan):
            pass  # raises before any data is read if the plan does not fit the model

    def generate_until(self, requests) -> list[str]:
        """Answer each request, in their order.

        Args:
            requests: lmms-eval's requests, whose ``args`` are text, options of generation, the
                function that gives a document's images, and the document's id, task and split.

        Returns:
            One answer per request.

        Raises:
            UserError: A task samples its answers, or shows something that is no image or clip.
        """
        answers, started = [], time.perf_counter()
        with compress(self.model, self.plan):
            for batch in self._batches(requests):
                options = batch[0].args[1]
                asked = [
                    (text, self._look(see, *doc))
                    for text, _, see, *doc in (request.args for request in batch)
                ]
                answers += self._answer(asked, options)
        self._log(answers, started)
        return answers

    def generate_until_multi_round(self, requests) -> list[list[str]]:
        """Answer requests of several rounds, whose later questions depend on earlier answers.

        Args:
            requests: As of ``generate_until``, with the task's function that makes the next
                question.

        Returns:
            The answers of every round, per request.
        """
        return [self._rounds(*request.args) for request in tqdm(requests, disable=self.rank != 0)]

    def _rounds(self, text, options, see, ask, *doc) -> list[str]:
        """The answers of every round of one request."""
        # ``told`` is the task's own state, which goes from round to round.
        looks, answers, told, number = self._look(see, *doc), [], None, 0
        row = self._doc(*doc)
        with compress(self.model, self.plan):
            while True:
                answers = [*answers, *self._answer([(text, looks)], options)]
                number += 1
                visuals, text, ended, answers, told = ask(
                    row, previous_output=answers, round_idx=number, previous_round_info=told
                )
                if ended:
                    return list(answers)
                looks = self._open(visuals)

    def loglikelihood(self, requests) -> list[tuple[float, bool]]:
        """Compute the loss of each request's continuation.

        In spite of the name, lmms-eval chooses the answer with the smallest value.

        Args:
            requests: lmms-eval's requests, whose ``args`` are text, continuation, the function that
                gives a document's images, and the document's id, task and split.

        Returns:
            Per request, the mean negative log likelihood of the continuation's tokens and its end
            token, in nats, and whether greedy decoding gives the continuation.

        Raises:
            UserError: A task shows a clip.
        """
        with compress(self.model, self.plan), torch.no_grad():
            return [
                self._likelihood(*request.args)
                for request in tqdm(requests, disable=self.rank != 0)
            ]

    def _likelihood(self, text, continuation, see, *doc) -> tuple[float, bool]:
        """Loss of one continuation, and whether greedy decoding gives it."""
        answer = (
            continuation if isinstance(continuation, str) else continuation(self._doc(*doc))
        ).strip()
        looks = self._look(see, *doc)
        if any(isinstance(look, list) for look in looks):
            raise UserError(
                "likelihoods of answers about clips are not supported; use a task that generates"
            )
        answered = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        messages = [*chat_of(_plain(text, looks), looks), answered]
        # Batched and labelled as for training, without a limit on the length.
        batch = Collator(self.processor, max_length=1_000_000)([Example(messages, looks, str(doc))])
        labelled = int((batch["labels"] != -100).sum())
        batch = {name: _to(value, self.model) for name, value in batch.items()}
        loss = self.model(**batch).loss.item()
        asked = prompts(self.model, self.processor, [(_plain(text, looks), looks)])
        said = self._decode(greedy(self.model, self.processor, asked, labelled), asked)
        return loss, said[0].strip() == answer

    def _batches(self, requests) -> Iterator[list]:
        """Batches of consecutive requests with the same options."""
        with tqdm(total=len(requests), desc="answering", disable=self.rank != 0) as progress:
            # Options may hold lists, so they are compared as JSON.
            for _, run in groupby(
                requests, key=lambda request: json.dumps(request.args[1], sort_keys=True)
            ):
                run = list(run)
                for start in range(0, len(run), self.batch_size):
                    yield run[start : start + self.batch_size]
                    progress.update(len(run[start : start + self.batch_size]))

    def _answer(self, asked: list[tuple[str, list]], options: dict) -> list[str]:
        """Answers to pairs of a text and its images, in one batch."""
        options = dict(options)
        if options.get("do_sample"):
            raise UserError(
                "the task asks for sampled answers (do_sample); llavolta decodes greedily"
            )
        until = options.pop("until", None) or []
        length = options.pop("max_new_tokens", MAX_NEW_TOKENS)
        options = {name: value for name, value in options.items() if name not in IGNORED_OPTIONS}
        batch = prompts(
            self.model, self.processor, [(_plain(text, looks), looks) for text, looks in asked]
        )
        answers = self._decode(greedy(self.model, self.processor, batch, length, **options), batch)
        # Cut the answers at the task's stop texts; generation itself ends at end tokens only.
        for stop in [until] if isinstance(until, str) else until:
            answers = [answer.split(stop)[0] if stop else answer for answer in answers]
        return answers

    def _decode(self, ids, batch) -> list[str]:
        """The texts of the new tokens: (B, T + new) ids, without the T of the prompt."""
        return self.processor.batch_decode(
            ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def _doc(self, number, task, split) -> dict:
        """A document of a task: one row of its data set."""
        return self.task_dict[task][split][number]

    def _look(self, see, *doc) -> list:
        """The opened images and clips of a document; ``see`` is the task's function for them."""
        return self._open(see(self._doc(*doc)) if see else None)

    def _open(self, visuals) -> list:
        """Images and clips (lists of frames), from a task's opened images and paths of clips."""
        looks = []
        for visual in visuals or []:
            if isinstance(visual, Image.Image):
                looks.append(pad_to_square(to_rgb(visual), self.pad))
            elif isinstance(visual, str):
                clip = [
                    pad_to_square(frame, self.pad) for frame in read_frames(visual, self.frames)
                ]
                # Without a video processor, the frames are images of their own.
                looks += [clip] if getattr(self.processor, "video_processor", None) else clip
            else:
                raise UserError(
                    f"the task shows a {type(visual).__name__}; "
                    "only pictures and paths of clips are known"
                )
        return looks

    def _log(self, answers: list[str], started: float) -> None:
        """Add time and tokens to "throughput" in the result file."""
        seconds = time.perf_counter() - started
        tokens = sum(
            map(len, self.processor.tokenizer(answers, add_special_tokens=False)["input_ids"])
        )
        log_metrics(seconds, tokens, tokens / seconds, {"num_requests": len(answers)})


def _plain(text: str, looks: list) -> str:
    """The question without placeholders, or with them if it has one <image> for each image.

    Without placeholders, the images stand before the question, as in LLaVA.
    """
    if looks and text.count("<image>") == len(looks):
        return text
    return text.replace("<image>", "").replace("<video>", "").strip()


def _to(value: torch.Tensor, model) -> torch.Tensor:
    """``value`` on the model's device, and in its dtype if it has floating point."""
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


def _device(name: str | None) -> torch.device:
    """The named device, or that of this process."""
    # PartialState knows which GPU belongs to which process.
    from accelerate import PartialState

    return torch.device(name) if name else PartialState().device
