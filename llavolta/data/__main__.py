"""``python -m llavolta.data check FILE [FOLDER]`` lists every entry that cannot be trained on.

Each line names an entry and the reason. The exit status is 0 if there is no such entry and 1 if
there are some, or if the model's tokenizer does not know the words. It is 2 if FILE, FOLDER or the
tokenizer cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys

from llavolta.data.boxes import box_notes
from llavolta.data.check import check_words, count_entries, find_bad, find_too_long
from llavolta.data.collate import Collator
from llavolta.data.index import read_index
from llavolta.data.llava import LlavaData
from llavolta.errors import ConfigError, DataError, UserError
from llavolta.paths import given_path
from llavolta.worlds import model_path


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments of the command; None reads them from ``sys.argv``.

    Returns:
        The exit status: 0, 1 or 2, as in the module's docstring.
    """
    parser = argparse.ArgumentParser(prog="python -m llavolta.data", description=__doc__)
    check = parser.add_subparsers(required=True).add_parser(
        "check", help="name every bad entry of a data set"
    )
    check.add_argument(
        "file",
        type=given_path,
        help="JSON, JSON Lines, Parquet, or a folder of Parquet or of a saved data set",
    )
    check.add_argument(
        "folder", nargs="?", type=given_path, help="of the pictures; default: that of FILE"
    )
    check.add_argument(
        "--workers", type=int, help="threads that decode pictures; default: one a core"
    )
    check.add_argument(
        "--model",
        help="folder or hub name of the model, whose tokenizer must know the words and processor "
        "read the images",
    )
    check.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="take this key as not there"
    )
    check.add_argument(
        "--json",
        action="store_true",
        help='print one object, {"entries": n, "bad": {index: reason}, ...}',
    )
    options = parser.parse_args(arguments)
    try:
        bad = find_bad(
            options.file, options.folder, options.workers, fresh=True, ignore=options.ignore
        )
        index = read_index(options.file, options.ignore)
        entries = len(index.start)
        # If every entry is bad, LlavaData would raise, and the list of reasons would be lost.
        if options.model and len(bad) < entries:
            bad = dict(sorted((bad | _refused(options, bad)).items()))
        strange = _strange_words(options, bad) if options.model and len(bad) < entries else None
        notes = box_notes(_good(options, bad), None) if len(bad) < entries else []
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    counts = count_entries(index, bad)
    if options.json:
        found = {"entries": entries, "bad": bad, **counts, "unread": index.unread}
        print(json.dumps(found | ({"words": strange} if options.model else {}), indent=1))
    else:
        print(
            "\n".join(
                [
                    *bad.values(),
                    *([strange] if strange else []),
                    f"{len(bad)} of {entries} entries are bad",
                ]
            )
        )
        print(
            "of the others, {images} have images, {videos} videos, {text} text alone; of their "
            "answers, {learned} are "
            "learned, {unlearned} are not".format(**counts)
        )
        if index.unread:
            print(
                "keys that are not read: "
                f"{', '.join(f'{key} ({n})' for key, n in index.unread.items())}"
            )
        if not options.model:
            print("words were not checked against a tokenizer; --model NAME does", file=sys.stderr)
    return int(bool(bad or strange))


def _good(options: argparse.Namespace, bad: dict[int, str]) -> LlavaData:
    """Return the data set without its bad entries."""
    return LlavaData(options.file, options.folder, skip=bad, ignore=options.ignore)


def _refused(options: argparse.Namespace, bad: dict[int, str]) -> dict[int, str]:
    """Return the entries that the model's processor rejects, such as for image sizes, and why."""
    # Imported here: only --model needs it, and it takes seconds.
    from llavolta.train.models import load_processor, read_config, whole_path

    data = _good(options, bad)
    if not data.has_image.any():
        return {}
    try:
        processor = load_processor(read_config(options.model), whole_path(options.model))
    except (ConfigError, OSError, ValueError) as error:
        print(
            f"note: the sizes of images were not checked, as there is no processor ({error})",
            file=sys.stderr,
        )
        return {}
    return find_too_long(data, Collator(processor, max_length=sys.maxsize))


def _strange_words(options: argparse.Namespace, bad: dict[int, str]) -> str | None:
    """Return the message that the model's tokenizer does not know the words, or None."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(options.model))
    except (OSError, ValueError) as error:
        raise DataError(
            f"no tokenizer of {options.model!r} ({str(error).splitlines()[0]})"
        ) from None
    try:
        check_words(_good(options, bad).texts(), tokenizer, options.file.name)
    except DataError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
