"""Make lmms-eval tasks of MSVD-QA and MSRVTT-QA, from their published files.

Each has two tasks, because the literature has two scores: exact match with the one-word answer (Xu
et al., 2017), and the accuracy and score of Video-ChatGPT (arXiv 2306.05424), which a language
model judges. lmms-eval has the latter for ActivityNet-QA.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from llavolta.errors import ConfigError, DataError

KINDS = (".mp4", ".avi", ".webm", ".mkv")
# By task: the name of a clip, without its ending, from the number of its video.
CLIP_NAMES = {"msvd_qa": "vid{}", "msrvtt_qa": "video{}"}
TEMPLATES = Path(__file__).parent / "tasks"


def prepare(
    task: str, questions: Path, videos: Path, output: Path, answers: Path | None = None
) -> Path:
    """Write the task files of ``task`` and ``task``_judged.

    The layouts of the data sets' own test_qa.json, and of Video-ChatGPT's test_q.json and
    test_a.json, are read.

    Args:
        task: A key of CLIP_NAMES.
        questions: A JSON list of entries with ``question``, ``video_name`` (or ``video_id``, a
            number), ``question_id`` (or ``id``), and ``answer`` unless ``answers`` is given.
        videos: The folder of the clips.
        output: The folder to write to, for lmms-eval's ``--include_path``.
        answers: A JSON list of entries with ``question_id`` and ``answer``.

    Returns:
        ``output``.

    Raises:
        DataError: Unknown task, a file that cannot be read, an entry without a needed key, or a
            clip that does not exist.
    """
    if task not in CLIP_NAMES:
        raise DataError(f"unknown task {task!r}; {' or '.join(CLIP_NAMES)}")
    entries = _read(questions)
    told = {entry["question_id"]: entry for entry in _read(answers)} if answers else {}
    files = {
        file.stem: file.resolve()
        for file in sorted(videos.glob("*"))
        if file.suffix.lower() in KINDS
    }
    rows, absent = [], []
    for entry in entries:
        try:
            name = (
                entry["video_name"]
                if "video_name" in entry
                else CLIP_NAMES[task].format(entry["video_id"])
            )
            number = entry["question_id"] if "question_id" in entry else entry["id"]
            # The file of answers, if there is one, comes before the file of questions.
            answer = {**entry, **told.get(number, {})}["answer"]
            rows.append(
                {
                    "question_id": str(number),
                    "video_name": name,
                    "question": entry["question"],
                    "answer": str(answer),
                }
            )
        except KeyError as error:
            raise DataError(f"{questions}: an entry has no {error}: {str(entry)[:80]}") from None
        if name not in files:
            absent.append(name)
    if absent:
        raise DataError(
            f"{videos} lacks the clips of {len(absent)} of {len(rows)} questions, "
            f"such as {absent[0]!r}"
        )
    output.mkdir(parents=True, exist_ok=True)
    # lmms-eval's judging of ActivityNet-QA reads "type", and these questions have none.
    rows = [{**row, "type": 0, "video": str(files[row["video_name"]])} for row in rows]
    (output / f"{task}.json").write_text(json.dumps(rows))
    for name, template in ((task, "video_qa.yaml"), (f"{task}_judged", "video_qa_judged.yaml")):
        head = {"include": str(TEMPLATES / template), "task": name, "dataset_path": "json"}
        head["dataset_kwargs"] = {"data_files": {"test": f"{task}.json"}}
        (output / f"{name}.yaml").write_text(json.dumps(head, indent=1))  # JSON is YAML
    return output


def _read(file: Path) -> list[dict]:
    """The entries of a JSON list."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{file} must hold a JSON list of questions")
    return entries


# The task files name the functions below.


def doc_to_visual(doc: dict) -> list[str]:
    """Return the path of a question's clip."""
    return [doc["video"]]


def doc_to_text(doc: dict, lmms_eval_specific_kwargs: dict) -> str:
    """Return a question with a capital and a question mark, between the task's prompts."""
    question = doc["question"].strip().capitalize()
    question += "" if question.endswith("?") else "?"
    return (
        f"{lmms_eval_specific_kwargs['pre_prompt']}{question}"
        f"{lmms_eval_specific_kwargs['post_prompt']}"
    )


def score_judged(doc: dict, results: list[str]) -> dict:
    """Score an answer by lmms-eval's own judging of ActivityNet-QA.

    Args:
        doc: The question.
        results: The answer, as a list of one.

    Returns:
        "gpt_eval_accuracy" in percent, and "gpt_eval_score" from 0 to 5.

    Raises:
        ConfigError: The environment names no judge.
    """
    require_judge("this task")
    # The import below fails without this variable.
    os.environ.setdefault("HF_HOME", str(Path.home() / ".cache/huggingface"))
    from lmms_eval.tasks.activitynetqa.utils import activitynetqa_process_results

    verdict = activitynetqa_process_results(doc, results)["gpt_eval_score"]
    return {
        "gpt_eval_accuracy": 100.0 * (verdict["Correctness"] == "yes"),
        "gpt_eval_score": verdict["score"],
    }


def require_judge(tasks: str) -> None:
    """Check that the environment names a judge.

    Args:
        tasks: Names of tasks, for the error message.

    Raises:
        ConfigError: OPENAI_API_KEY is not set.
    """
    if not os.environ.get("OPENAI_API_KEY"):
        raise ConfigError(
            f"{tasks}: scored by a language model as judge, and there is none; "
            "set OPENAI_API_KEY, and for an endpoint "
            "of your own OPENAI_API_URL and MODEL_VERSION (see lmms-eval), or take another task"
        )
