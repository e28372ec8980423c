"""Managers: what a training loop without NNX sees is what it sees of Orbax's own handler."""

import re

import numpy as np
import orbax.checkpoint as ocp
import pytest

from orbax_nnx_handler import NNXLinenHandler, NNXLinenSave
from tests.conformance import managers, settings
from tests.conformance.kits import OURS, STOCK, outcome

PROGRAMS = managers.PROGRAMS | settings.PROGRAMS


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_manager_gives_what_it_gives_with_orbaxs_own_handler(tmp_path, name) -> None:
    stock = outcome(PROGRAMS[name], STOCK, tmp_path / "stock")
    ours = outcome(PROGRAMS[name], OURS, tmp_path / "ours")

    assert ours == stock


def test_stock_args_in_item_handlers_are_answered_with_what_to_write_instead(tmp_path) -> None:
    # Orbax finds an item's handler by the class of its args, before any handler is asked.
    with ocp.CheckpointManager(tmp_path, item_handlers=NNXLinenHandler()) as manager:
        manager.save(1, args=NNXLinenSave({"w": np.ones(2)}))
        manager.wait_until_finished()
        with pytest.raises(
            ValueError, match=re.escape("handler_registry=orbax_nnx_handler.handler_registry(")
        ):
            manager.restore(1, args=ocp.args.PyTreeRestore())
