"""Makes the drawings of this folder anew: ``python make.py PACKAGES`` (with ``pip install resvg_py pillow pandas``).

PACKAGES is a folder with the unpacked npm packages that LICENSES.txt names:

    npm pack @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 @lobehub/fluent-emoji-3d@1.1.0
    for file in *.tgz; do mkdir ${file%.tgz} && tar xzf $file -C ${file%.tgz} --strip 1; done

Of each object in objects.csv the drawing of its code point ("unified") becomes SLUG.webp, those of "other_views"
SLUG.2.webp and on, as far as a vendor has them.
"""

import io
import json
import sys
from pathlib import Path

import pandas as pd
import resvg_py
from PIL import Image

HERE = Path(__file__).parent
SIDE = 96  # pixels


def from_iconify(package: Path):
    """A function from a code point to its picture; None where the package has none."""
    icons, names = json.loads((package / "icons.json").read_text()), json.loads((package / "chars.json").read_text())

    def draw(code: str) -> Image.Image | None:
        name = names.get(code) or names.get(code.removesuffix("-fe0f"))
        icon = icons["icons"].get(name)
        if icon is None:
            return None
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        side = max(width, height)  # the drawing in the middle of a square
        box = f"{(width - side) / 2} {(height - side) / 2} {side} {side}"
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">'
        svg = f"{head}{icon['body']}</svg>"
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE))))

    return draw


def from_files(package: Path):
    def draw(code: str) -> Image.Image | None:
        files = [package / "assets" / f"{name}.webp" for name in (code, code.removesuffix("-fe0f"))]
        file = next((file for file in files if file.exists()), None)
        return Image.open(file).resize((SIDE, SIDE), Image.Resampling.LANCZOS) if file else None

    return draw


def main(packages: Path) -> None:
    vendors = {
        "noto": from_iconify(packages / "iconify-json-noto-1.2.9"),
        "twemoji": from_iconify(packages / "iconify-json-twemoji-1.2.5"),
        "fluent3d": from_files(packages / "lobehub-fluent-emoji-3d-1.1.0"),
    }
    table = pd.read_csv(HERE / "objects.csv", keep_default_na=False)
    for vendor, draw in vendors.items():
        (HERE / vendor).mkdir(exist_ok=True)
        for row in table.itertuples():
            pictures = [picture for code in [row.unified, *row.other_views.split()] if (picture := draw(code))]
            if not pictures:
                sys.exit(f"{vendor} has no drawing of {row.name} ({row.unified})")
            for number, picture in enumerate(pictures, start=1):
                name = row.slug if number == 1 else f"{row.slug}.{number}"
                picture.convert("RGBA").save(HERE / vendor / f"{name}.webp", quality=80)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
