"""Prints the lowest version of each dependency that pyproject.toml allows, as constraints for pip."""

import pathlib
import tomllib

PROJECT = tomllib.loads((pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

for requirement in PROJECT["dependencies"]:
    name, _, versions = requirement.partition(">=")
    print(f"{name.partition('[')[0]}=={versions.partition(',')[0]}")
