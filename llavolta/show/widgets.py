"""Sliders for JupyterLab: ask one question about one image under any compressor.

``Explorer`` collects a plan, an image and a question. ``inspect.view`` answers, and a function of
``token_maps`` draws; both can be called without widgets. ``CostExplorer`` shows what a scheme
costs.
"""

from __future__ import annotations

import dataclasses
import io
import re
import typing
from collections.abc import Callable
from functools import lru_cache
from html import escape
from pathlib import Path

import ipywidgets as ui
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import display
from PIL import Image

from llavolta.compression.compressors import COMPRESSORS
from llavolta.compression.families import find_parts
from llavolta.compression.plan import VISION, Layer
from llavolta.cost.flops import CostModel
from llavolta.cost.planner import Speed, scheme_table
from llavolta.data import LlavaData, check_words, open_image, to_rgb
from llavolta.errors import ConfigError, UserError
from llavolta.show import plots, token_maps
from llavolta.studies import evaluation, inspect
from llavolta.train.schemes import Scheme, Stage

WIDE = ui.Layout(width="420px")
STYLE = {"description_width": "90px"}


class Explorer:
    """Controls of one plan, image and question, with the model's answer and token map.

    Display the explorer itself or its ``box``. Every compressor of the registry is listed, and its
    options get controls by their types.

    Args:
        model: A supported vision-language model.
        processor: The model's processor.
        data: Entries with images or clips to choose from.
        draw: A function (image, view) that returns a figure.
        layer: The layer at first: "vision" or a decoder layer.
        compressor: The compressor's name at first.
        options: Values of the compressor's options at first.

    Attributes:
        layer: The control of the layer.
        compressor: The control of the compressor.
        options: The controls of the compressor's options, by name.
        entry: The control of the entry.
        question: The control of the question.
        path: The control for the path of the user's image.
        upload: The control for the upload of the user's image.
        message: The answer with its figures, or an error.
        image: The drawn figure.
        view: The latest ``inspect.View``; None if it could not be computed.
        box: All of these.
    """

    def __init__(
        self,
        model,
        processor,
        data: LlavaData,
        draw: Callable,
        layer: Layer,
        compressor: str,
        **options,
    ):
        self.model, self.processor, self.data, self.draw = model, processor, data, draw
        self.view: inspect.View | None = None
        # The user's images. The last one is in use while ``_use_own`` is set.
        self._own: list[Image.Image] = []
        self._use_own = False
        self._quiet = False  # set while code, not the user, changes a control
        # A cache, so that moving a slider back does not ask the model again.
        self._compute = lru_cache(256)(self._view)

        parts = find_parts(model)
        places = [VISION] * (parts.projector is not None) + list(range(len(parts.layers)))
        # The last layer, where the model has none of this number.
        layer = layer if layer in places else places[-1]
        self.layer = ui.SelectionSlider(
            options=places,
            value=layer,
            continuous_update=False,
            description="layer K",
            layout=WIDE,
            style=STYLE,
        )
        names = sorted(COMPRESSORS)  # those of the user as well, if they are defined by now
        self.compressor = ui.Dropdown(
            options=names, value=compressor, description="compressor", style=STYLE
        )
        self.options: dict[str, ui.Widget] = {}
        self._option_box = ui.VBox()
        self.entry = ui.Dropdown(
            options=self._entries(), description="picture", layout=WIDE, style=STYLE
        )
        self.question = ui.Combobox(
            description="question", layout=WIDE, style=STYLE, continuous_update=False
        )
        self.path = ui.Text(
            description="image path",
            placeholder="a picture file",
            layout=WIDE,
            style=STYLE,
            continuous_update=False,
        )
        self.upload = ui.FileUpload(
            accept="image/*", description="upload a picture", layout=ui.Layout(width="180px")
        )
        self.message = ui.HTML()
        self.image = ui.Image(
            format="png", layout=ui.Layout(max_width="100%", object_fit="contain")
        )
        controls = [
            self.compressor,
            self.layer,
            self._option_box,
            self.entry,
            self.question,
            self.path,
            self.upload,
        ]
        self.box = ui.HBox(
            [ui.VBox([*controls, self.message]), self.image],
            layout=ui.Layout(flex_flow="row wrap", align_items="flex-start"),
        )

        # Controls are observed only from here on, so that setting them up draws once.
        self._show_options(**options)
        self._choose_entry()
        self.refresh()
        self.compressor.observe(self._on_compressor, "value")
        self.layer.observe(self.refresh, "value")
        self.entry.observe(self._on_entry, "value")
        self.question.observe(self.refresh, "value")
        self.path.observe(self._on_path, "value")
        self.upload.observe(self._on_upload, "value")

    def _ipython_display_(self) -> None:
        display(self.box)

    @property
    def plan(self) -> str:
        """The plan's text, from the controls."""
        values = {name: control.value for name, control in self.options.items()}
        # The text of a wrapped compressor stands last in a plan.
        inner = [values.pop("inner")] if "inner" in values else []
        # A switch that is off by default is left out of the text.
        off = {
            f.name
            for f in dataclasses.fields(COMPRESSORS[self.compressor.value])
            if f.default is False
        }
        given = [
            f"{name}={value}"
            for name, value in values.items()
            if value is not False or name not in off
        ] + inner
        return ":".join([str(self.layer.value), self.compressor.value, *given])

    @property
    def picture(self) -> Image.Image:
        """The user's image or the entry's first one; of a clip, its first frame."""
        look = self._looks(self.entry.value, self._own_number)[0]
        return look[0] if isinstance(look, list) else look

    def _looks(self, entry: int, own: int | None) -> list:
        """The images to ask about, and clips as lists of frames."""
        if own is not None:
            return [self._own[-1]]
        return self.data[entry].looks

    def refresh(self, change=None) -> None:
        """Compute and draw the view of the controls, or show an error in one line.

        Args:
            change: The event of a control, which is not used.
        """
        if self._quiet:
            return
        try:
            self.view = self._compute(
                self.plan, self.question.value, self.entry.value, self._own_number
            )
        except (UserError, ValueError) as error:
            self.view = None
            self.message.value = (
                f"<b style='color:#a00'>{type(error).__name__}: {escape(str(error))}</b>"
            )
            self.image.value = b""
            return
        self.message.value = self._text(self.view)
        self.image.value = png(self.draw(self.picture, self.view))

    @property
    def _own_number(self) -> int | None:
        """The number of the user's image, or None for an entry; a key for the cache."""
        return len(self._own) if self._use_own else None

    def _view(self, plan: str, question: str, entry: int, own: int | None) -> inspect.View:
        """Ask the model; all arguments are keys of the cache."""
        if found := re.search("<image>|<video>", question):
            raise ConfigError(
                f"the question holds the placeholder {found[0]}; "
                "leave it out, the picture is put in"
            )
        check_words([question], self.processor.tokenizer, "the question")
        asked, looks = question, self._looks(entry, own)
        if own is None:
            # A question of the entry is asked with its images in place, others after all images.
            example = self.data[entry]
            turn = next(
                (
                    one["turn"]
                    for one in self.data.questions_of(entry)
                    if one["question"] == question
                ),
                None,
            )
            if turn is not None:
                asked, looks = evaluation.alone(example, turn)
            else:
                system = [message for message in example.messages if message["role"] == "system"]
                asked = [*system, *evaluation.chat_of(question, looks)]
        return inspect.view(self.model, self.processor, asked, looks, plan)

    def _text(self, view: inspect.View) -> str:
        """The answer, the reference answer if it is known, and the cost, as HTML."""
        truth = (
            ""
            if self._use_own
            else next(
                (q["answer"] for q in self._here() if q["question"] == self.question.value), ""
            )
        )
        rows = {
            "answer": f"<b>{escape(view.answer)}</b>"
            + (f" (right: {escape(truth)})" if truth else ""),
            "compression ratio": f"{view.ratio:.3f}",
            "training FLOPs": f"{view.flops:.1%} of no compression",
        }
        return "<br>".join(f"{name}: {value}" for name, value in rows.items())

    def _here(self) -> list[dict]:
        """The questions of the chosen entry."""
        return self.data.questions_of(self.entry.value)

    def _entries(self, most: int = 200) -> list[tuple[str, int]]:
        """(id, index) of the first ``most`` entries with an image or clip."""
        pictured = np.flatnonzero(self.data.has_image)[:most].tolist()
        if not pictured:
            raise ConfigError(f"{self.data.file.name} has no entry with a picture to explore")
        return [(str(self.data.entry(index).get("id", index)), index) for index in pictured]

    def _choose_entry(self) -> None:
        """Offer the entry's questions."""
        asked = [question["question"] for question in self._here()]
        self.question.options = list(dict.fromkeys(asked))
        if self.question.value not in asked:
            self.question.value = asked[0]

    def _show_options(self, **values) -> None:
        """Make the controls of the compressor's options, with ``values`` or their defaults."""
        kind = COMPRESSORS[self.compressor.value]
        types = typing.get_type_hints(kind)
        # Sliders need an end: the tokens of an image, or those of LLaVA-1.5 where they vary.
        tokens = getattr(self.model.config, "image_seq_length", None) or 576
        self.options = {}
        for option in dataclasses.fields(kind):
            made = option.default_factory is not dataclasses.MISSING
            default = option.default_factory() if made else option.default
            default = None if default is dataclasses.MISSING else default
            control = _control(
                option.name, types.get(option.name), values.get(option.name, default), tokens
            )
            control.observe(self.refresh, "value")
            self.options[option.name] = control
        self._option_box.children = list(self.options.values())

    def _on_compressor(self, change) -> None:
        self._show_options()
        # Such a compressor works before the decoder only, so move the layer there.
        if "tower" in COMPRESSORS[self.compressor.value].needs and VISION in self.layer.options:
            self._quiet, self.layer.value = True, VISION
            self._quiet = False
        self.refresh()

    def _on_entry(self, change) -> None:
        self._use_own, self._quiet = False, True
        self._choose_entry()  # which may set the question
        self._quiet = False
        self.refresh()

    def _on_path(self, change) -> None:
        try:
            file = Path(self.path.value.strip()).expanduser()
            self._show_own(
                open_image(file.parent, file.name, "image path")
                if self.path.value.strip()
                else None
            )
        except UserError as error:
            self.message.value = f"<b style='color:#a00'>{escape(str(error))}</b>"
        except (RuntimeError, ValueError, OSError) as error:
            # Path raises these for an unknown user's home, or text that cannot be a path.
            self.message.value = f"<b style='color:#a00'>image path: {escape(str(error))}</b>"

    def _on_upload(self, change) -> None:
        if not self.upload.value:
            return
        try:
            self._show_own(to_rgb(Image.open(io.BytesIO(self.upload.value[0]["content"]))))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            self.message.value = (
                f"<b style='color:#a00'>the upload is no picture: {escape(str(error))}</b>"
            )

    def _show_own(self, picture: Image.Image | None) -> None:
        """Use the user's image from now on, or the entry again for None."""
        self._use_own = picture is not None
        if picture is not None:
            self._own.append(picture)
        self.refresh()


def redundancy_explorer(
    model, processor, data: LlavaData, layer: Layer = 2, compressor: str = "avgpool", **options
) -> Explorer:
    """Make an explorer that draws the token map and the answer's most likely first tokens.

    Args:
        model: A supported vision-language model.
        processor: The model's processor.
        data: Entries with images or clips to choose from.
        layer: The layer at first.
        compressor: The compressor's name at first.
        options: Values of the compressor's options at first, such as ``stride=8``.

    Returns:
        The explorer.
    """
    return Explorer(
        model, processor, data, token_maps.picture_with_tokens, layer, compressor, **options
    )


def design_explorer(
    model, processor, data: LlavaData, layer: Layer = 2, compressor: str = "avgpool", **options
) -> Explorer:
    """Make an explorer that draws the token map and the visual tokens of each decoder layer.

    The arguments are those of ``redundancy_explorer``.
    """
    return Explorer(
        model, processor, data, token_maps.picture_with_layers, layer, compressor, **options
    )


class CostExplorer:
    """Sliders of a scheme with three stages, and what it costs.

    Display the explorer itself or its ``box``. The first stage pools at layer K, the second at half
    the depth with the same stride, and the rest is not compressed.

    Args:
        model: The cost model.
        speed: The speed of the hardware.
        examples: Examples of training.
        step: Options of ``CostModel.step``, such as text_tokens and images.

    Attributes:
        layer: The slider of layer K.
        stride: The slider of stride S.
        share: The slider of the first stage's share of the steps.
        light: The slider of the second stage's share of the steps.
        table: The ``planner.scheme_table`` of "yours" and "no compression".
        message: The scheme with its cost, or an error.
        image: The drawn figure.
        box: All of these.
    """

    def __init__(self, model: CostModel, speed: Speed, examples: int, **step):
        self.model, self.speed, self.examples, self.step = model, speed, examples, step
        depth, tokens = len(model.layers), model.visual

        # continuous_update=False: compute when a slider is released, not while it moves.
        def slider(kind, value, low, high, text, **more):
            return kind(
                value,
                min=low,
                max=high,
                description=text,
                continuous_update=False,
                style=STYLE,
                **more,
            )

        self.layer = slider(ui.IntSlider, max(1, depth // 16), 0, depth - 1, "layer K")
        self.stride = slider(ui.IntSlider, 8, 1, tokens, "stride S")
        self.share = slider(ui.FloatSlider, 0.33, 0, 1, "share", step=0.01)
        self.light = slider(ui.FloatSlider, 0.33, 0, 1, "light share", step=0.01)
        self.message = ui.HTML()
        self.image = ui.Image(
            format="png", layout=ui.Layout(max_width="100%", object_fit="contain")
        )
        sliders = [self.layer, self.stride, self.share, self.light]
        self.box = ui.HBox(
            [ui.VBox([*sliders, self.message]), self.image], layout=ui.Layout(flex_flow="row wrap")
        )
        for control in sliders:
            control.observe(self.refresh, "value")
        self.refresh()

    def _ipython_display_(self) -> None:
        display(self.box)

    @property
    def scheme(self) -> Scheme:
        """The scheme of the sliders. Raises ConfigError if the shares sum to more than 1."""
        rest = 1 - self.share.value - self.light.value
        half = len(self.model.layers) // 2
        stride = self.stride.value
        parts = [
            (f"{self.layer.value}:avgpool:{stride}", self.share.value),
            (f"{half}:avgpool:{stride}", self.light.value),
        ]
        if rest < -1e-9:  # more than a rounding error
            raise ConfigError(f"the shares sum to {1 - rest:.2f}, above 1; lower one of them")
        # A stage must have a share above 0, so empty ones are left out.
        stages = [Stage(plan, share) for plan, share in [*parts, ("none", rest)] if share > 1e-9]
        return Scheme("yours", tuple(stages))

    def refresh(self, change=None) -> None:
        """Compute and draw the cost of the sliders' scheme, or show an error in one line.

        Args:
            change: The event of a slider, which is not used.
        """
        try:
            schemes = {"no compression": Scheme.equal("none", "none"), "yours": self.scheme}
            self.table = scheme_table(self.model, schemes, self.examples, self.speed, **self.step)
        except (UserError, ValueError) as error:
            self.message.value = (
                f"<b style='color:#a00'>{type(error).__name__}: {escape(str(error))}</b>"
            )
            self.image.value = b""
            return
        row = self.table.loc["yours"]
        stages = "; ".join(f"{stage.plan} ({stage.share:.0%})" for stage in schemes["yours"].stages)
        self.message.value = (
            f"{escape(stages)}<br>compression ratio: {row.ratio:.2f}"
            f"<br>training FLOPs: {row.flops_ratio:.1%}<br>"
            f"hours: {row.hours:.2f} of {self.table.hours.iloc[0]:.2f}"
        )
        # A plan that occurs in two stages gets one bar.
        costs = {"none": "none"} | {stage.plan: stage.plan for stage in schemes["yours"].stages}
        self.image.value = png(
            plots.step_cost_bars(
                {plan: self.model.step(plan, **self.step) for plan in costs}, "training step"
            )
        )


def _control(name: str, kind, value, tokens: int) -> ui.Widget:
    """The control for one option of a compressor, by its type and default.

    ``tokens`` is the largest value of a whole number's slider.
    """
    common = dict(description=name, layout=WIDE, style=STYLE)
    if typing.get_origin(kind) is typing.Literal:
        return ui.Dropdown(options=typing.get_args(kind), value=value, **common)
    if kind is bool:
        return ui.Checkbox(bool(value), **common)
    if kind is int:
        least = 0 if value == 0 else 1
        start = min(8, tokens) if value is None else value
        return ui.IntSlider(start, least, max(tokens, start), continuous_update=False, **common)
    if kind is float:
        start = 0.5 if value is None else value
        return ui.FloatSlider(
            start, min=0.01, max=max(1.0, start), step=0.01, continuous_update=False, **common
        )
    return ui.Text("" if value is None else str(value), continuous_update=False, **common)


def png(figure) -> bytes:
    """Render a figure as PNG, and close it, so that the notebook does not show it a second time.

    Args:
        figure: A matplotlib figure.

    Returns:
        The bytes of the PNG.
    """
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=80)
    plt.close(figure)
    return out.getvalue()
