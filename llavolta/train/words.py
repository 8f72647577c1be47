"""A projector fitted to words before any text is read: each patch of an object towards its name and its place."""

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

BATCH = 1024  # patches
PICTURES = 4000  # at most, whose patches are kept in memory
LEARNING_RATE = 2e-3
SHARPNESS = 20.0  # of the cosine similarities that names are told by
PLACES = (
    ("top left", "top middle", "top right"),
    ("middle left", "center", "middle right"),
    ("bottom left", "bottom middle", "bottom right"),
)


def fit_to_words(
    model: nn.Module, processor, data: LlavaData, steps: int, seed: int, progress: bool
) -> float:
    """Train the projector of ``model``, a LLaVA, for ``steps`` on the patches of the objects that ``data`` names.

    Entries tell them by ``objects``: [{name, box}], box x0, y0, x1, y1 in pixels of the picture. A patch whose centre
    is in a box (the smallest of several) is drawn to the mean input embedding of its name's tokens plus that of its
    place in the picture (``PLACES``, interpolated between their centres), by squared error and, less its place, by
    cross-entropy over all names; other patches are drawn to 0. Returns the share of the last tenth of the pictures'
    patches, which it is not fitted to, that are named right. Raises ConfigError if no entry names an object.
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
    fitted, scale = (~patches.heldout).nonzero()[:, 0], words.pow(2).mean()
    with torch.enable_grad():
        for _ in tqdm(
            range(steps), desc="words: projector", mininterval=2, disable=not progress, leave=False
        ):
            chosen = fitted[torch.randint(len(fitted), (BATCH,), generator=generator)]
            wanted, out = label[chosen], projector(features[chosen].to(words))
            shown = wanted >= 0
            at = places[place[chosen]]
            target = torch.where(shown[:, None], words[wanted.clamp(min=0)] + at, 0)
            named = _similarities((out - at)[shown], words)
            loss = F.mse_loss(out, target) / scale + F.cross_entropy(named, wanted[shown])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    optimizer.zero_grad(set_to_none=True)
    asked = (patches.heldout & (label >= 0)).nonzero()[:, 0]
    with torch.no_grad():
        named = [
            _similarities(projector(features[part].to(words)) - places[place[part]], words).argmax(
                1
            )
            for part in asked.split(8192)
        ]
    return (torch.cat(named) == label[asked]).float().mean().item()


def _similarities(out: Tensor, words: Tensor) -> Tensor:
    return SHARPNESS * F.normalize(out, dim=1) @ F.normalize(words, dim=1).T


class _Patches(NamedTuple):
    """features (P, C_v); label (P,), a name's number, -1 for the background; place (P,) in a grid of side * side;
    heldout (P,), whether of a picture that is not fitted to."""

    features: Tensor
    names: list[str]
    label: Tensor
    place: Tensor
    side: int
    heldout: Tensor


@torch.no_grad()
def _patches(model, processor, data: LlavaData, seed: int, progress: bool) -> _Patches:
    parts, held = find_parts(model), []
    if parts.projector is None:
        raise ConfigError(
            "align_words fits a projector that works patch by patch; set it to 0 for this projector"
        )
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
            rows = [(data.entry(i), data[i].images[0]) for i in order[start : start + 32]]
            rows = [(entry["objects"], image) for entry, image in rows if entry.get("objects")]
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
                background = (label < 0).nonzero()[:, 0]
                kept = torch.cat(
                    [
                        (label >= 0).nonzero()[:, 0],
                        background[:: max(1, 4 * len(background) // len(label))],
                    ]
                )
                features.append(feature[kept].half())
                labels.append(label[kept])
                places.append(kept)
                counts.append(len(kept))
    finally:
        hook.remove()
    if not numbers:
        raise ConfigError(
            f"align_words needs entries with 'objects', which {data.file.name} has not; set it to 0"
        )
    heldout = torch.arange(len(counts)) >= len(counts) - max(1, len(counts) // 10)
    heldout = heldout.repeat_interleave(torch.tensor(counts)).to(device)
    label, place = torch.cat(labels).to(device), torch.cat(places).to(device)
    return _Patches(torch.cat(features), list(numbers), label, place, side, heldout)


def _labels(
    objects: list[dict], size: tuple[int, int], side: int, pixels: int, numbers: dict[str, int]
) -> Tensor:
    """(side * side,) of a picture of ``size`` (width, height), scaled by its shorter side and cut at the centre."""
    scale = pixels / min(size)
    label = torch.full((side, side), -1)
    centre = (torch.arange(side) + 0.5) * pixels / side
    area = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (thing["box"] for thing in objects)]
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
    """(N, C) the mean input embedding of each name's tokens, as they stand inside of a text; float32."""
    table = model.get_input_embeddings().weight.detach().float()
    ids = processor.tokenizer([f" {name}" for name in names], add_special_tokens=False)["input_ids"]
    return torch.stack([table[row].mean(0) for row in ids])


def _places(model, processor, side: int) -> Tensor:
    """(side * side, C) the embedding of each patch's place in a grid, between those of PLACES."""
    said = _embeddings(model, processor, [name for row in PLACES for name in row])
    grid = said.T.reshape(1, -1, len(PLACES), len(PLACES[0]))
    return (
        F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=False)[0].flatten(1).T
    )


@torch.no_grad()
def _standardise(projector: nn.Module, features: Tensor) -> None:
    """Scale and shift what the projector's first layer reads, in its weights: a tower's channels differ by far."""
    first = next(part for part in projector.modules() if isinstance(part, nn.Linear))
    sample = features[:: max(1, len(features) // 20000)].float()
    mean, deviation = sample.mean(0), sample.std(0) + 1e-5
    first.weight.copy_(torch.randn_like(first.weight) * first.in_features**-0.5 / deviation)
    if first.bias is not None:
        first.bias.copy_(-first.weight @ mean)
