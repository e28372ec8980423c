"""What is imported before a verdict is printed: importing takes longer than many a plan."""

import os
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest

import orbax_nnx_handler
from orbax_nnx_handler import cli
from tests.processes import COMMAND_LINE, Forked

_PROGRAM = """
import sys
from orbax_nnx_handler.cli import main
status = main(sys.argv[1:])
print(status, *(name for name in sys.modules if name.startswith(("orbax.", "rich.progress", "orbax_nnx"))))
from orbax_nnx_handler import restore, suggest
print(*sys.modules)
"""


@pytest.fixture(scope="module")
def imported(root, tmp_path_factory) -> list[list[str]]:
    """The status of a verdict and what it imported; then what is there for restores and proposals too."""
    model = tmp_path_factory.mktemp("program") / "model.py"
    model.write_text(
        "import jax\nfrom flax import nnx\n"
        "def make():\n"
        "    return nnx.State({'only': nnx.Param(jax.ShapeDtypeStruct((2,), 'float32'))})\n"
    )
    words = ["plan", str(root / "200" / "default"), f"{model}:make"]

    # A job whose environment this is holds the accelerator; a verdict needs none.
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}

    ran = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *words], capture_output=True, text=True, check=True, env=environment
    )

    return [line.split() for line in ran.stdout.splitlines()[-2:]]


def test_a_verdict_on_an_item_needs_nothing_that_reads_or_writes_arrays(imported) -> None:
    status, *names = imported[0]
    assert status == "1"
    assert "orbax_nnx_handler.planning.verdict" in names
    assert not {"orbax.checkpoint", "rich.progress", "orbax_nnx_handler.handler"} & set(names)
    assert not {name for name in names if name.startswith("orbax_nnx_handler.storage.reading")}


def test_a_restore_loads_no_optimiser_of_scipy_which_only_a_proposal_needs(imported) -> None:
    assert "orbax_nnx_handler.api" in imported[1]
    assert "scipy.optimize" not in imported[1]


def test_a_terminal_that_lacks_the_characters_of_a_name_shows_them_escaped(tmp_path) -> None:
    ocp.PyTreeCheckpointer().save(tmp_path / "item", {"params": {"größe": np.ones(2, np.float32)}})

    ascii_only = "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')"
    ran = Forked(f"{ascii_only}; {COMMAND_LINE}", "tree", str(tmp_path / "item"))

    assert ran.wait() == 0, ran.stderr
    assert r"params/gr\xf6\xdfe" in ran.stdout
    assert ran.stderr == ""


def test_a_platform_that_is_not_there_is_one_line(tmp_path, capsys, monkeypatch) -> None:
    def absent(*_):
        raise RuntimeError("Unable to initialize backend 'tpu': no libtpu.so (set JAX_PLATFORMS='')")

    monkeypatch.setattr(cli, "_stay_off_accelerators", absent)

    assert cli.main(["tree", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "RuntimeError: Unable to initialize backend 'tpu': no libtpu.so (set JAX_PLATFORMS='')\n"
    )


def test_every_public_name_has_a_home() -> None:
    assert {name for name in orbax_nnx_handler.__all__ if hasattr(orbax_nnx_handler, name)} == {
        *orbax_nnx_handler.__all__
    }
    assert set(orbax_nnx_handler._HOME_OF) == set(orbax_nnx_handler.__all__)
    assert set(orbax_nnx_handler.__all__) <= set(dir(orbax_nnx_handler))
    assert not hasattr(orbax_nnx_handler, "no_such_name")
