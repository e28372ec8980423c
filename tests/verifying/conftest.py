from collections.abc import Callable
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from tests.verifying.twins import Twin


@pytest.fixture(scope="package")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Twin], Path]:
    """Saves the random weights of a twin once, with stock Orbax."""
    paths: dict[str, Path] = {}

    def save(twin: Twin) -> Path:
        if twin.name not in paths:
            paths[twin.name] = tmp_path_factory.mktemp(twin.name) / "checkpoint"
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(paths[twin.name], twin.variables())
        return paths[twin.name]

    return save
