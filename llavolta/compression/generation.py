"""``generate`` under ``compress``: prompts are processed whole, and their length is noted."""

from __future__ import annotations

from functools import partial

from torch import nn

from llavolta.compression.state import Now
from llavolta.errors import UnsupportedModel


class WatchedGeneration:
    """Wraps ``generate`` and ``_prefill`` of a model until ``remove()``.

    Attributes:
        top: The model with its head.
        now: The state of the thread, which gets the size of the prompt.
        own: The methods that were set on the instance before; None where the class's is used.
    """

    def __init__(self, top: nn.Module, now: Now):
        self.top, self.now = top, now
        self.own = {name: vars(top).get(name) for name in ("_prefill", "generate")}
        top._prefill = partial(_whole_prefill, top._prefill)
        top.generate = partial(self._generate, top.generate)

    def remove(self) -> None:
        """Restore the model's own methods."""
        for name, own in self.own.items():
            vars(self.top).pop(name, None)
            if own is not None:
                vars(self.top)[name] = own

    def _generate(self, stock, *args, **kwargs):
        """Call ``generate``, and note facts about the prompt that its passes do not tell.

        With assisted generation, the first pass also contains guesses after the prompt, so the
        prompt's length is noted. Beams repeat batch rows, so their number is noted. ``image_sizes``
        are noted because ``generate`` passes them to the encoder only.
        """
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        self.now.rows, self.now.prompt = (None, None) if ids is None else ids.shape
        self.now.image_sizes = kwargs.get("image_sizes")
        try:
            return stock(*args, **kwargs)
        finally:
            self.now.rows = self.now.prompt = self.now.image_sizes = None


def _whole_prefill(stock, input_ids, generation_config, *args, **kwargs):
    """Call the model's ``_prefill``, the first pass of ``generate``.

    Raises UnsupportedModel for a prompt in chunks, because a compressor needs all tokens of an
    image and its question in one pass.
    """
    if generation_config.prefill_chunk_size is not None:
        raise UnsupportedModel(
            "a prompt under compress() cannot be split into chunks; leave prefill_chunk_size out"
        )
    return stock(input_ids, generation_config, *args, **kwargs)
