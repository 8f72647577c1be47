"""Notes about boxes and points in texts, which no longer fit an image that is padded or cropped."""

from __future__ import annotations

import re

import numpy as np

from llavolta.data.llava import LlavaData

SAMPLE = 500  # entries that are inspected, spread evenly over the data set
_SHARE = r"\s*(?:0?\.\d+|[01](?:\.0*)?)\s*"  # a number from 0 to 1
# A box of four such numbers, as LLaVA writes them: [0.6, 0.4, 0.9, 0.6]. [0, 1, 1, 0] is no box:
# at least one number must have a decimal point.
SHARES = re.compile(rf"\[(?=[^\]]*\.)(?:{_SHARE},){{3}}{_SHARE}\]")
# How Qwen, InternVL and Molmo mark boxes and points.
PLACES = re.compile(r"\bbbox_2d\b|\bpoint_2d\b|<\|box_start\|>|<box>|<points? ")


def box_notes(data: LlavaData, pad_to_square: bool | None) -> list[str]:
    """List what to mind about the boxes and points in the texts of a data set.

    They are trained on as they are written; nothing is converted. At most ``SAMPLE`` entries are
    inspected, and of these only the ones with images and no video.

    Args:
        data: The data set.
        pad_to_square: Whether training pads images to squares; None if that is not known yet.

    Returns:
        One note per finding; an empty list if there is none.
    """
    looked = np.unique(np.linspace(0, len(data) - 1, min(SAMPLE, len(data))).astype(int)).tolist()
    entries = [data.entry(index) for index in looked if data.medium[index] == 1]  # with images
    texts = ["\n".join(turn["value"] for turn in entry["conversations"]) for entry in entries]
    shares, places = (sum(bool(form.search(text)) for text in texts) for form in (SHARES, PLACES))
    of, notes = f"of {len(looked)} entries looked at", []
    if shares and not pad_to_square:
        notes.append(
            f"{shares} {of} have boxes from 0 to 1; where these are LLaVA's, they are shares of "
            "the padded square: train with 'pad_to_square: true'"
        )
    if places and pad_to_square is not False:
        notes.append(
            f"{places} {of} have boxes or points of the image as it is, which 'pad_to_square: "
            "true' moves: train without it"
        )
    if places and not pad_to_square:
        notes.append(
            f"{places} {of} have boxes or points; those in pixels must count in the image as the "
            "model's processor resizes it (size.longest_edge), and a processor that crops moves "
            "them"
        )
    return notes
