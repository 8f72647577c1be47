"""``generate`` under ``compress``: it takes prompts whole, and notes where they end."""

from __future__ import annotations

from functools import partial

from torch import nn

from llavolta.compression.state import Now
from llavolta.errors import UnsupportedModel


class WatchedGeneration:
    """Stands in for methods of the model ``top`` until ``remove()``, which puts back the model's own ones, if any."""

    def __init__(self, top: nn.Module, now: Now):
        self.top, self.now = top, now
        self.own = {
            name: vars(top).get(name) for name in ("_prefill", "generate")
        }  # None: the class's
        top._prefill = partial(_whole_prefill, top._prefill)
        top.generate = partial(self._generate, top.generate)

    def remove(self) -> None:
        for name, own in self.own.items():
            vars(self.top).pop(name, None)
            if own is not None:
                vars(self.top)[name] = own

    def _generate(self, stock, *args, **kwargs):
        """``generate``, noting where the prompt ends, as by speculation its first pass holds
        guesses behind it; its number of rows, which beams repeat; and its images' sizes, which the model is
        not told again."""
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        self.now.rows, self.now.prompt = (None, None) if ids is None else ids.shape
        self.now.image_sizes = kwargs.get("image_sizes")
        try:
            return stock(*args, **kwargs)
        finally:
            self.now.rows = self.now.prompt = self.now.image_sizes = None


def _whole_prefill(stock, input_ids, generation_config, *args, **kwargs):
    """``generate``'s first pass, refused in chunks: a compressor must see a picture, and its question, whole."""
    if generation_config.prefill_chunk_size is not None:
        raise UnsupportedModel(
            "a prompt under compress() cannot be split into chunks; leave prefill_chunk_size out"
        )
    return stock(input_ids, generation_config, *args, **kwargs)
