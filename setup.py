"""Put configs/ into the wheel, as jaxtrain/configs; pyproject.toml has all the rest."""

import pathlib
import shutil

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """`build_py`, and the configurations beside the package's modules."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # there the checkout's own folder is read
            target = pathlib.Path(self.build_lib, "jaxtrain", "configs")
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree("configs", target, dirs_exist_ok=True, ignore=ignored)


setup(cmdclass={"build_py": BuildWithConfigs})
