"""Fits a projector to words: each patch of an object is mapped to the embedding of its name."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from llavolta.compression.families import find_parts
from llavolta.data import LlavaData
from llavolta.errors import ConfigError
from llavolta.train.models import has_bfloat16

BATCH = 1024  # patches of a step
PICTURES = 4000  # images whose patches are kept in memory, at most
LEARNING_RATE = 2e-3
SHARPNESS = 20.0  # factor of the cosine similarities in the softmax over names
PLACES = (
    ("top left", "top middle", "top right"),
    ("middle left", "center", "middle right"),
    ("bottom left", "bottom middle", "bottom right"),
)


def fit_to_words(
    model: nn.Module, processor, data: LlavaData, steps: int, seed: int, progress: bool
) -> float:
    """Train the projector of a LLaVA on the objects that a data set names.

    Entries name them in ``objects``: [{name, box}], with the box x0, y0, x1, y1 in pixels of the
    image. The target of a patch whose centre is in a box (in the smallest of several) is the mean
    input embedding of the name's tokens, plus that of its place in the image (``PLACES``,
    interpolated between their centres). The target of other patches is 0. The loss is the squared
    error, plus the cross-entropy over all names of the output without the place's part.

    Args:
        model: A LLaVA; its projector is changed in place.
        processor: Its processor.
        data: The data set; at most ``PICTURES`` of its images are used.
        steps: Optimizer steps, of ``BATCH`` patches each.
        seed: Seed of the order of images and patches.
        progress: Whether to show progress bars.

    Returns:
        Share of the patches of objects that are named right, on the last tenth of the images, which
        the projector is not fitted to.

    Raises:
        ConfigError: No entry names an object, or the projector merges patches.
    """
    patches = _patches(model, processor, data, seed, progress)
    features, label, place = patches.features, patches.label, patches.place
    words = _embeddings(model, processor, patches.names)  # (N, C)
    places = _places(model, processor, patches.side)  # (side * side, C)
    projector = find_parts(model).projector
    _standardise(projector, features)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    # The squared error is measured in units of the embeddings' mean square.
    fitted, scale = (~patches.heldout).nonzero()[:, 0], words.pow(2).mean()
    with torch.enable_grad():
        for _ in tqdm(
            range(steps), desc="words: projector", mininterval=2, disable=not progress, leave=False
        ):
            chosen = fitted[torch.randint(len(fitted), (BATCH,), generator=generator)]
            wanted, out = label[chosen], projector(features[chosen].to(words))  # (B,), (B, C)
            shown = wanted >= 0  # (B,) False for the background
            at = places[place[chosen]]  # (B, C)
            target = torch.where(shown[:, None], words[wanted.clamp(min=0)] + at, 0)
            named = _similarities((out - at)[shown], words)  # (patches of objects, N)
            loss = F.mse_loss(out, target) / scale + F.cross_entropy(named, wanted[shown])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad(set_to_none=True)
    asked = (patches.heldout & (label >= 0)).nonzero()[:, 0]  # patches of objects, not fitted to
    with torch.no_grad():
        named = [
            _similarities(projector(features[part].to(words)) - places[place[part]], words).argmax(
                1
            )
            for part in asked.split(8192)
        ]
    return (torch.cat(named) == label[asked]).float().mean().item()


def _similarities(out: Tensor, words: Tensor) -> Tensor:
    """Return the scaled cosine similarities of outputs (P, C) and names (N, C): (P, N)."""
    return SHARPNESS * F.normalize(out, dim=1) @ F.normalize(words, dim=1).T


class _Patches(NamedTuple):
    """Features of patches, and what they show.

    Attributes:
        features: (P, C_v) input of the projector.
        names: The N names of objects.
        label: (P,) index of the name; -1 for the background.
        place: (P,) index into the grid of side * side patches.
        side: Patches along the side of an image.
        heldout: (P,) bool, True for patches of images that are not fitted to.
    """

    features: Tensor
    names: list[str]
    label: Tensor
    place: Tensor
    side: int
    heldout: Tensor


@torch.no_grad()
def _patches(model, processor, data: LlavaData, seed: int, progress: bool) -> _Patches:
    """Collect the patches that the projector reads, with some of the background."""
    parts, held = find_parts(model), []
    if parts.projector is None:
        raise ConfigError(
            "align_words fits a projector that works patch by patch; set it to 0 for this projector"
        )
    # The hook collects what the projector reads: the features of a batch's patches (I, L, C_v).
    hook = parts.projector.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[
        :PICTURES
    ].tolist()
    numbers: dict[str, int] = {}
    features, labels, places, counts = [], [], [], []
    device, dtype = model.device, model.dtype
    try:
        for start in tqdm(
            range(0, len(order), 32),
            desc="words: pictures",
            mininterval=2,
            disable=not progress,
            leave=False,
        ):
            chosen = [(i, data.entry(i).get("objects")) for i in order[start : start + 32]]
            rows = [(objects, data[i].images[0]) for i, objects in chosen if objects]
            if not rows:
                continue
            pixels = processor.image_processor([image for _, image in rows], return_tensors="pt")[
                "pixel_values"
            ]
            with torch.autocast(device.type, torch.bfloat16, enabled=has_bfloat16()):
                model.get_image_features(pixel_values=pixels.to(device, dtype))
            found = held.pop()
            side = round(found.shape[1] ** 0.5)
            for (objects, image), feature in zip(rows, found, strict=True):
                label = _labels(objects, image.size, side, pixels.shape[-1], numbers)
                # The background is thinned out to about a quarter of all patches.
                background = (label < 0).nonzero()[:, 0]
                kept = torch.cat(
                    [
                        (label >= 0).nonzero()[:, 0],
                        background[:: max(1, 4 * len(background) // len(label))],
                    ]
                )
                features.append(feature[kept].half())  # all are kept in memory
                labels.append(label[kept])
                places.append(kept)
                counts.append(len(kept))
    finally:
        hook.remove()
    if not numbers:
        raise ConfigError(
            f"align_words needs entries with 'objects', which {data.file.name} has not; set it to 0"
        )
    # The last tenth of the images, (images,) -> (P,)
    heldout = torch.arange(len(counts)) >= len(counts) - max(1, len(counts) // 10)
    heldout = heldout.repeat_interleave(torch.tensor(counts)).to(device)
    label, place = torch.cat(labels).to(device), torch.cat(places).to(device)
    return _Patches(torch.cat(features), list(numbers), label, place, side, heldout)


def _labels(
    objects: list[dict], size: tuple[int, int], side: int, pixels: int, numbers: dict[str, int]
) -> Tensor:
    """Return the index of the name, or -1, of each patch of an image: (side * side,).

    Args:
        objects: The objects of the entry. Names that are new are added to ``numbers``.
        size: (width, height) of the image, which the processor scales by its shorter side and crops
            at the centre.
        side: Patches along the side of the cropped image.
        pixels: Pixels along that side.
        numbers: Index of each name.
    """
    scale = pixels / min(size)
    label = torch.full((side, side), -1)
    centre = (torch.arange(side) + 0.5) * pixels / side
    area = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (thing["box"] for thing in objects)]
    # The smallest box is written last, so it wins where boxes overlap.
    for place in sorted(range(len(objects)), key=area.__getitem__, reverse=True):
        number = numbers.setdefault(objects[place]["name"], len(numbers))
        cut = [(length * scale - pixels) / 2 for length in size]
        x0, y0, x1, y1 = (
            at * scale - cut[axis % 2] for axis, at in enumerate(objects[place]["box"])
        )
        label[((centre >= y0) & (centre < y1))[:, None] & ((centre >= x0) & (centre < x1))] = number
    return label.flatten()


@torch.no_grad()
def _embeddings(model, processor, names: list[str]) -> Tensor:
    """Return the mean input embedding (N, C) of the tokens of each name, in float32."""
    table = model.get_input_embeddings().weight.detach().float()
    ids = processor.tokenizer([f" {name}" for name in names], add_special_tokens=False)["input_ids"]
    return torch.stack([table[row].mean(0) for row in ids])


def _places(model, processor, side: int) -> Tensor:
    """Return the embedding (side * side, C) of each patch's place, interpolated from PLACES."""
    said = _embeddings(model, processor, [name for row in PLACES for name in row])
    grid = said.T.reshape(1, -1, len(PLACES), len(PLACES[0]))  # (9, C) -> (1, C, 3, 3)
    return (
        F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)[0].flatten(1).T
    )


@torch.no_grad()
def _standardise(projector: nn.Module, features: Tensor) -> None:
    """Initialise the projector's first layer so that it standardises each channel it reads."""
    first = next(part for part in projector.modules() if isinstance(part, nn.Linear))
    sample = features[:: max(1, len(features) // 20000)].float()
    mean, deviation = sample.mean(0), sample.std(0) + 1e-5
    # W x + b = R (x - mean) / deviation with random R: W = R / deviation, b = -W mean.
    first.weight.copy_(torch.randn_like(first.weight) * first.in_features**-0.5 / deviation)
    if first.bias is not None:
        first.bias.copy_(-first.weight @ mean)
