"""The rows that a model hands back under ``compress``: one per input token, or those that predict a label."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # the label of tokens without loss, as everywhere in transformers


class LabelledLogits(Tensor):
    """Logits of the labelled rows alone. Used as if they were all, the error gets a note that says what to do."""

    NOTE = (
        "under compress(), a model in training gives the logits of the labelled tokens alone, (1, M + 1, vocabulary); "
        "compress(..., labelled_only=False) gives one row per input token, which metrics on logits need"
    )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        try:
            return super().__torch_function__(func, types, args, kwargs or {})
        except (RuntimeError, IndexError, ValueError) as error:
            error.add_note(cls.NOTE)
            raise


def shorten_labels(labels: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """labels (B, T) to the rows and columns (M,) of the tokens that predict one, and their labels (1, M + 1).

    The head gets one row to spare, because the stock loss shifts labels by one.
    """
    row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return (row, column), torch.cat([labels.new_full((1,), IGNORED), labels[row, column + 1]])[None]


def give_back(output, back: Tensor | None, labelled: tuple[Tensor, Tensor] | None):
    """The decoder's ``output`` with other rows as its last hidden state, also where it lists those of all layers.

    back (B, T): the row of each input token, None if they are still the same; the result is (B, T, C). labelled: rows
    and columns of the tokens that predict a label: theirs alone, and one to spare, (1, M + 1, C).
    """
    last = output[0]
    if labelled is not None:
        row, column = labelled
        hidden = last[row, column if back is None else back[row, column]]
        hidden = torch.cat([hidden, hidden.new_zeros(1, hidden.shape[-1])])[None]
    else:
        hidden = last.gather(1, back[..., None].expand(-1, -1, last.shape[-1]))

    def ends(
        states,
    ) -> bool:  # the hidden states of all layers, whose last entry is the one given back
        return isinstance(states, tuple) and len(states) > 0 and states[-1] is last

    if isinstance(output, tuple):
        return (hidden, *((*part[:-1], hidden) if ends(part) else part for part in output[1:]))
    output.last_hidden_state = hidden
    if ends(output.get("hidden_states")):
        output.hidden_states = (*output.hidden_states[:-1], hidden)
    return output


@torch.compiler.disable
def mark_logits(output):
    """``output`` of the top model with its logits as LabelledLogits."""
    if isinstance(output, tuple):  # of loss, logits, ...
        return (output[0], output[1].as_subclass(LabelledLogits), *output[2:])
    output.logits = output.logits.as_subclass(LabelledLogits)
    return output


def answer_marks(labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Of the tokens at columns ``index`` (B, T') of labels (B, T): which predict the first of an answer, and which are
    labelled; both (B, T') bool."""
    labelled = torch.nn.functional.pad(labels != IGNORED, (0, 1), value=False)
    answers = (labelled[:, 1:] & ~labelled[:, :-1]).gather(1, index)
    return answers, labelled[:, :-1].gather(1, index)
