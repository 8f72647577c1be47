"""The rows of a model's output under ``compress``: one per input token, or per label.

The first is what stock code expects. The second saves memory in training: the head computes logits
only of the tokens that predict a label.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100  # the label of tokens without loss, as in all of transformers


class LabelledLogits(Tensor):
    """Logits (1, M + 1, vocabulary) of the M labelled tokens.

    If an operation fails, for example because it expects logits of all tokens, the error gets NOTE.
    """

    NOTE = (
        "under compress(), a model in training gives the logits of the labelled tokens alone, "
        "(1, M + 1, vocabulary); compress(..., labelled_only=False) gives one row per input token, "
        "which metrics on logits need"
    )

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        try:
            return super().__torch_function__(func, types, args, kwargs or {})
        except (RuntimeError, IndexError, ValueError) as error:
            error.add_note(cls.NOTE)
            raise


def shorten_labels(labels: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Select the tokens that predict a label.

    Args:
        labels: (B, T) labels, IGNORED at tokens without loss.

    Returns:
        Batch rows and columns (M,) of the tokens that predict a label, each one column before it;
        and the labels (1, M + 1). The first of these is IGNORED, because the stock loss shifts
        labels by one.
    """
    row, column = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return (row, column), torch.cat([labels.new_full((1,), IGNORED), labels[row, column + 1]])[None]


def give_back(output, back: Tensor | None, labelled: tuple[Tensor, Tensor] | None):
    """Replace the last hidden state of the decoder's output by the rows that its caller expects.

    If the output lists the hidden states of all layers, the last of them is replaced too.

    Args:
        output: The decoder's output, a tuple or a ModelOutput, with hidden states (B, T', C).
        back: (B, T) row of each input token; None if nothing was compressed.
        labelled: Batch rows and columns (M,) of the tokens that predict a label, to return only
            these; None: all tokens.

    Returns:
        The output with hidden states (B, T, C); or (1, M + 1, C), the last of which is zero and has
        no label.
    """
    last = output[0]
    if labelled is not None:  # (B, T', C) -> (M, C) -> (1, M + 1, C)
        row, column = labelled
        hidden = last[row, column if back is None else back[row, column]]
        hidden = torch.cat([hidden, hidden.new_zeros(1, hidden.shape[-1])])[None]
    else:  # (B, T', C) -> (B, T, C)
        hidden = last.gather(1, back[..., None].expand(-1, -1, last.shape[-1]))

    # Whether ``states`` are the hidden states of all layers, of which the last one is ``last``.
    def ends(states) -> bool:
        return isinstance(states, tuple) and len(states) > 0 and states[-1] is last

    if isinstance(output, tuple):
        return (hidden, *((*part[:-1], hidden) if ends(part) else part for part in output[1:]))
    output.last_hidden_state = hidden
    if ends(output.get("hidden_states")):
        output.hidden_states = (*output.hidden_states[:-1], hidden)
    return output


@torch.compiler.disable
def mark_logits(output):
    """Convert the logits of a model's output to LabelledLogits.

    Args:
        output: The output of the model with its head, a tuple or a ModelOutput, with a loss.

    Returns:
        The output.
    """
    if isinstance(output, tuple):  # (loss, logits, ...)
        return (output[0], output[1].as_subclass(LabelledLogits), *output[2:])
    output.logits = output.logits.as_subclass(LabelledLogits)
    return output


def answer_marks(labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Mark the tokens at some columns that predict an answer, or that have a label.

    Args:
        labels: (B, T) labels, IGNORED at tokens without loss.
        index: (B, T') columns.

    Returns:
        Two masks (B, T'): whether the token predicts the first token of an answer, which is the
        first of consecutive labels; and whether the token itself has a label.
    """
    # One column more, so that the last token has a next one: (B, T) -> (B, T + 1)
    labelled = torch.nn.functional.pad(labels != IGNORED, (0, 1), value=False)
    answers = (labelled[:, 1:] & ~labelled[:, :-1]).gather(1, index)
    return answers, labelled[:, :-1].gather(1, index)
