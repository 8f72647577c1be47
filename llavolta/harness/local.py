"""Benchmarks as local files, in their own format and scored by lmms-eval's own code; the embedded digits as such."""

from __future__ import annotations

import importlib.util
import io
import json
from itertools import islice
from pathlib import Path

import datasets
from PIL import Image

from llavolta.data import LlavaData
from llavolta.errors import UserError

# The embedded model knows some 40 words; "Answer the question using a single word or phrase." is none of them.
BARE = {"lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": ""}}}
DIGITS = {  # which benchmark stands for which type of question
    "gqa_digits": ("read", "compare"),
    "vqav2_digits": ("count",),
    "pope_digits": ("presence",),
}


class HarnessError(UserError, RuntimeError):
    """lmms-eval is not there, or did not do what was asked."""


def shipped(task_file: str) -> str:
    """The path of one of lmms-eval's task files, such as "pope/pope.yaml". Raises HarnessError."""
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None:
        raise HarnessError(
            "lmms-eval is not installed here; 'make eval' sets up .venv-eval, which has it"
        )
    return str(Path(spec.submodule_search_locations[0]) / "tasks" / task_file)


def write_task(
    folder: Path, name: str, task_file: str, split: str, rows: list[dict], **changes
) -> None:
    """Write the task ``name`` to ``folder``: lmms-eval's ``task_file`` over ``rows`` instead of its hub data.

    rows: entries of the benchmark's own data set; pictures as PIL images under "image". split: that the task reads.
    changes: other keys of the task file to replace.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = (
        datasets.Image()
        if isinstance(rows[0]["image"], Image.Image)
        else datasets.List(datasets.Image())
    )
    table = datasets.Dataset.from_list([{**row, "image": _encode(row["image"])} for row in rows])
    table.cast_column("image", pictures).to_parquet(folder / f"{name}.parquet")
    task = {
        "include": shipped(task_file),
        "task": name,
        "dataset_path": "parquet",
        "dataset_name": None,
    }
    task |= {"dataset_kwargs": {"data_files": {split: f"{name}.parquet"}}, **changes}
    (folder / f"{name}.yaml").write_text(json.dumps(task, indent=1))  # JSON is YAML


def _encode(image: Image.Image | list[Image.Image]) -> dict | list[dict]:
    if isinstance(image, list):
        return [_encode(one) for one in image]
    file = io.BytesIO()
    image.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_digits(
    folder: Path, data: LlavaData, limit: int | None = None, max_new_tokens: int = 4
) -> list[int]:
    """The digits questions of ``data`` as tasks (see DIGITS); returns their numbers in ``data.questions()``, in order.

    Every question belongs to one task. The order is that of the tasks, then of the questions in each.
    """
    questions = list(islice(data.questions(), limit))
    options = {"generation_kwargs": {"max_new_tokens": max_new_tokens, "do_sample": False}}
    order = []
    for task, kinds in DIGITS.items():
        numbers = [number for number, question in enumerate(questions) if question["type"] in kinds]
        rows = [_row(task, number, questions[number], data) for number in numbers]
        if task == "gqa_digits":  # GQA's own processing fetches the pictures from the hub
            write_task(
                folder, task, "gqa/gqa.yaml", "testdev", rows, process_docs=None, **options, **BARE
            )
        elif task == "vqav2_digits":
            write_task(folder, task, "vqav2/vqav2_val.yaml", "validation", rows, **options, **BARE)
        else:
            write_task(folder, task, "pope/pope.yaml", "test", rows, **options, **BARE)
        order += numbers
    return order


def _row(task: str, number: int, question: dict, data: LlavaData) -> dict:
    """A question in the columns of its benchmark."""
    image = data[question["index"]].images[0]
    name = data.entry(question["index"])["id"]
    text, answer = question["question"], question["answer"]
    if task == "gqa_digits":
        return {
            "id": str(number),
            "imageId": name,
            "question": text,
            "answer": answer,
            "image": image,
        }
    if task == "vqav2_digits":
        ten = [
            {"answer": answer, "answer_confidence": "yes", "answer_id": place}
            for place in range(1, 11)
        ]
        shared = {
            "question_type": question["type"],
            "answer_type": "number",
            "multiple_choice_answer": answer,
        }
        return {
            "question_id": number,
            "image_id": question["index"],
            "question": text,
            **shared,
        } | {
            "answers": ten,
            "image": image,
        }
    shared = {
        "id": str(number),
        "question_id": str(number),
        "image_source": name,
        "category": "random",
    }
    return {**shared, "question": text, "answer": answer, "image": image}
