"""One item and a handler: kinds of leaves, ways of asking for a part, options, calling forms."""

import pytest

from tests.conformance.kits import OURS, STOCK, outcome
from tests.conformance.programs import PROGRAMS


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_without_nnx_sees_what_it_sees_of_orbaxs_own_handler(tmp_path, name) -> None:
    (tmp_path / "stock").mkdir()
    (tmp_path / "ours").mkdir()

    stock = outcome(PROGRAMS[name], STOCK, tmp_path / "stock" / "item")
    ours = outcome(PROGRAMS[name], OURS, tmp_path / "ours" / "item")

    assert ours == stock
