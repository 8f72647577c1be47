"""``python -m llavolta.show MODEL``: ask a model questions about images, and draw its answers."""

from __future__ import annotations

import argparse
import sys

import numpy as np

from llavolta.data import check_words, open_image
from llavolta.errors import ConfigError, UserError
from llavolta.paths import RUNS, given_path
from llavolta.show import plots
from llavolta.studies import evaluation, inspect
from llavolta.studies.opening import open_model, open_study


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Of the command line; None: those of this process.

    Returns:
        The exit code: 1 after an error, which is printed on stderr.
    """
    # The usage is in the parser's ``prog``; the rest of the module's docstring describes it.
    parser = argparse.ArgumentParser(
        prog="python -m llavolta.show", description=__doc__.partition(": ")[2]
    )
    parser.add_argument("model", help="a name such as nano-tuned, a folder or a hub name")
    parser.add_argument(
        "--picture",
        type=given_path,
        help="a picture of your own; without it, pictures of the model's held-out questions",
    )
    parser.add_argument(
        "--question", action="append", help="about the picture, in plain words; may be given again"
    )
    parser.add_argument("--count", type=int, default=6, help="of held-out questions (6)")
    parser.add_argument("--plan", default="none", help="of compression, such as 2:avgpool:8 (none)")
    asked = RUNS / "asked.png"
    parser.add_argument(
        "--output", type=given_path, default=asked, help="the drawing's file (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        rows = _own(options) if options.picture else _heldout(options)
        figure = plots.asked(
            [(picture, asked, view.answer, right) for picture, asked, view, right in rows]
        )
        file = options.output
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120, bbox_inches="tight")  # with all lines of a long answer
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for _, asked, view, right in rows:
        guesses = ", ".join(
            f"{word} {chance:.0%}" for word, chance in list(view.guesses.items())[:3]
        )
        print(f"{asked} {view.answer}{f' (right: {right})' if right else ''}   [{guesses}]")
    print(file)
    return 0


def _own(options) -> list[tuple]:
    """Rows of (image, question, view, "") for the user's image, which has no reference answer."""
    if not options.question:
        raise ConfigError("--picture needs a --question")
    file = options.picture
    picture = open_image(file.parent, file.name, "--picture")
    model, processor, _ = open_model(options.model)
    check_words(options.question, processor.tokenizer, "the questions")
    return [
        (picture, q, inspect.view(model, processor, q, [picture], options.plan), "")
        for q in options.question
    ]


def _heldout(options) -> list[tuple]:
    """Rows of (image, question, view, reference answer), each of another image and type."""
    if options.question:
        raise ConfigError("--question needs a --picture")
    if options.count < 1:
        raise ConfigError(f"--count must be at least 1, not {options.count}")
    study = open_study(options.model)
    # Each image gives at most one question, of a type that no earlier one has.
    chosen, types = [], set()
    for index in np.flatnonzero(study.data.medium == 1).tolist():
        fresh = [one for one in study.data.questions_of(index) if one["type"] not in types]
        if fresh and len(chosen) < options.count:
            types.add(fresh[0]["type"])
            chosen.append(fresh[0])
    rows = []
    for one in chosen:
        messages, images = evaluation.alone(study.data[one["index"]], one["turn"])
        if images:
            view = inspect.view(study.model, study.processor, messages, images, options.plan)
            rows.append((images[0], one["question"], view, one["answer"]))
    return rows


if __name__ == "__main__":
    sys.exit(main())
