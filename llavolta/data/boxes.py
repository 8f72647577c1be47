"""Boxes and points in conversations: an image that is padded or cropped no longer has them where the text says."""

from __future__ import annotations

import re

import numpy as np

from llavolta.data.llava import LlavaData

SAMPLE = 500  # entries that are looked at, evenly over the data set
_SHARE = r"\s*(?:0?\.\d+|[01](?:\.0*)?)\s*"
SHARES = re.compile(rf"\[(?=[^\]]*\.)(?:{_SHARE},){{3}}{_SHARE}\]")  # such as [0.6, 0.4, 0.9, 0.6]
PLACES = re.compile(
    r"\bbbox_2d\b|\bpoint_2d\b|<\|box_start\|>|<box>|<points? "
)  # of Qwen, InternVL, Molmo


def box_notes(data: LlavaData, pad_to_square: bool | None) -> list[str]:
    """What to mind of the boxes in a data set; they are trained on as they are written.

    Args:
        pad_to_square: whether images are padded; None: not known yet.
    """
    looked = np.unique(np.linspace(0, len(data) - 1, min(SAMPLE, len(data))).astype(int)).tolist()
    entries = [data.entry(index) for index in looked if data.medium[index] == 1]
    texts = ["\n".join(turn["value"] for turn in entry["conversations"]) for entry in entries]
    shares, places = (sum(bool(form.search(text)) for text in texts) for form in (SHARES, PLACES))
    of, notes = f"of {len(looked)} entries looked at", []
    if shares and not pad_to_square:
        notes.append(
            f"{shares} {of} have boxes from 0 to 1; where these are LLaVA's, they are shares of the padded square: "
            "train with 'pad_to_square: true'"
        )
    if places and pad_to_square is not False:
        notes.append(
            f"{places} {of} have boxes or points of the image as it is, which 'pad_to_square: true' moves: train "
            "without it"
        )
    if places and not pad_to_square:
        notes.append(
            f"{places} {of} have boxes or points; those in pixels must count in the image as the model's processor "
            "resizes it (size.longest_edge), and a processor that crops moves them"
        )
    return notes
