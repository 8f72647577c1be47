"""A wheel carries what the package reads from beside it in a checkout; all else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = {
    "data/tiny-llava": "tiny-llava",
    "papers/llavolta/published.csv": "published.csv",
    "data/pictures": "pictures",
    "data/nano-tuned": "nano-tuned",
}


class BuildWithData(build_py):
    def run(self):
        super().run()
        if self.editable_mode:
            return
        for source, name in SHIPPED.items():
            target = Path(self.build_lib, "llavolta", "shipped", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if Path(source).is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            else:
                shutil.copyfile(source, target)


setup(cmdclass={"build_py": BuildWithData})
