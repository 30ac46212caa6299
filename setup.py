"""Copies the launch files into the package when a wheel is built; pyproject.toml says everything else."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

FOLDER = "accelerate_configs"


class BuildWithLaunchFiles(build_py):
    """In an editable install the launch files stay where they are: `saekit.cli.launch` looks there as well."""

    def _launch_files(self) -> dict[str, str]:
        """The files to write, each with its source."""
        if self.editable_mode:
            return {}
        inside = Path(self.build_lib, "saekit", FOLDER)
        return {str(inside / file.name): str(file) for file in sorted(Path(FOLDER).glob("*.yaml"))}

    def run(self) -> None:
        """Build the package, launch files included."""
        super().run()
        for target, source in self._launch_files().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Name all files that `run` writes."""
        return [*super().get_outputs(include_bytecode), *self._launch_files()]


setup(cmdclass={"build_py": BuildWithLaunchFiles})
