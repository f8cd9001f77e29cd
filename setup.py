"""Puts the configs into a wheel, as `ddim_pl/configs`. All else is in `pyproject.toml`."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = Path(__file__).parent / "configs"


class BuildWithConfigs(build_py):
    """Copies the configs; an editable install reads them where they are."""

    def run(self) -> None:
        """Build the packages, then copy."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "ddim_pl", "configs")
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(CONFIGS, target)


setup(cmdclass={"build_py": BuildWithConfigs})
