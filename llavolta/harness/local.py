"""Write benchmarks as local files for lmms-eval, such as the digits as GQA, VQAv2 and POPE.

The files have the benchmark's own format, and lmms-eval's own code scores the answers.
"""

from __future__ import annotations

import importlib.util
import io
import json
from itertools import islice
from pathlib import Path

import datasets
from PIL import Image

from llavolta.data import LlavaData
from llavolta.errors import ConfigError

# The embedded model knows about 40 words. None are of the benchmarks' usual prompt, "Answer the
# question using a single word or phrase."
BARE = {"lmms_eval_specific_kwargs": {"default": {"pre_prompt": "", "post_prompt": ""}}}
DIGITS = {  # question types by task; the first part of a task's name is its benchmark
    "gqa_digits": ("read", "compare"),
    "vqav2_digits": ("count",),
    "pope_digits": ("presence",),
}


def shipped(task_file: str) -> str:
    """Find one of lmms-eval's task files.

    Args:
        task_file: The path below lmms-eval's tasks, such as "pope/pope.yaml".

    Returns:
        The file's path.

    Raises:
        ConfigError: lmms-eval is not installed.
    """
    spec = importlib.util.find_spec("lmms_eval")
    if spec is None:
        raise ConfigError(
            "lmms-eval is not installed here; 'make eval' sets up .venv-eval, which has it"
        )
    return str(Path(spec.submodule_search_locations[0]) / "tasks" / task_file)


def write_task(
    folder: Path, name: str, task_file: str, split: str, rows: list[dict], **changes
) -> None:
    """Write a task that scores local rows as one of lmms-eval's benchmarks does.

    Args:
        folder: The folder of the task file and its data.
        name: The task's name.
        task_file: lmms-eval's file of the benchmark; see ``shipped``.
        split: The split that the benchmark reads.
        rows: Rows in the columns of the benchmark's data set, with a PIL image, or a list of them,
            under "image".
        changes: Keys of the task file to replace.

    Raises:
        ConfigError: lmms-eval is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = (
        datasets.Image()
        if isinstance(rows[0]["image"], Image.Image)
        else datasets.List(datasets.Image())
    )
    # Images are stored as PNG within the table, which datasets decodes when it reads them.
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
    """An image as the ``datasets`` library stores it."""
    if isinstance(image, list):
        return [_encode(one) for one in image]
    file = io.BytesIO()
    image.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def write_digits(
    folder: Path, data: LlavaData, limit: int | None = None, max_new_tokens: int = 4
) -> list[int]:
    """Write the digits questions as the tasks of DIGITS.

    Args:
        folder: The folder of the task files.
        data: The digits questions.
        limit: Number of questions, from the first; None: all.
        max_new_tokens: Tokens of an answer at most.

    Returns:
        The numbers of the questions in ``data.questions()``, in the order of the tasks and of the
        questions in each. Every question belongs to one task.

    Raises:
        ConfigError: lmms-eval is not installed.
    """
    questions = list(islice(data.questions(), limit))
    options = {"generation_kwargs": {"max_new_tokens": max_new_tokens, "do_sample": False}}
    order = []
    for task, kinds in DIGITS.items():
        numbers = [number for number, question in enumerate(questions) if question["type"] in kinds]
        rows = [_row(task, number, questions[number], data) for number in numbers]
        if task == "gqa_digits":  # process_docs would fetch GQA's images from the hub
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
    """A question in the columns of its benchmark's data set."""
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
        # VQAv2 has ten answers of annotators to each question.
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
