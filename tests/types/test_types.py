"""Two type checkers, at their strictest, on a user's program and on one with mistakes."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections import defaultdict

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
FILES = ("program.py", "mistakes.py")
# What is looked at is this package; Orbax has no types, and JAX and Flax take minutes.
_MYPY = """[mypy]
strict = True
[mypy-orbax_nnx_handler.*]
follow_imports = silent
[mypy-jax.*,flax.*,optax.*,orbax.*,tensorstore.*,numpy.*,ml_dtypes.*,absl.*,etils.*,rich.*,fsspec.*,zstandard.*]
follow_imports = skip
ignore_missing_imports = True
"""


def _run(*words: str) -> str:
    found = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode in (0, 1), found.stderr
    return found.stdout


def mypy(scratch: pathlib.Path) -> dict[str, dict[int, str]]:
    """Returns what mypy says of each file, by line."""
    settings = scratch / "mypy.ini"
    settings.write_text(_MYPY)
    files = [str(HERE / name) for name in FILES]
    said = _run("mypy", "--config-file", str(settings), "--cache-dir", os.devnull, *files)
    assert "checked 2 source files" in said, said
    faults = defaultdict(dict)
    for name, line, text in re.findall(r"(\w+\.py):(\d+): error: (.*)", said):
        faults[name][int(line)] = text
    return faults


def pyright(scratch: pathlib.Path) -> dict[str, dict[int, str]]:
    """Returns what pyright says of each file, by line."""
    settings = scratch / "pyrightconfig.json"
    settings.write_text(json.dumps({"typeCheckingMode": "strict", "extraPaths": [str(ROOT)]}))
    for name in FILES:
        shutil.copy(HERE / name, scratch)
    said = json.loads(_run("pyright", "--pythonpath", sys.executable, "--outputjson", "-p", str(settings)))
    assert said["summary"]["filesAnalyzed"] == 2
    faults = defaultdict(dict)
    for item in said["generalDiagnostics"]:
        if item["severity"] == "error":
            faults[pathlib.Path(item["file"]).name][item["range"]["start"]["line"] + 1] = item["message"]
    return faults


@pytest.mark.parametrize("checked", [mypy, pyright], ids=["mypy", "pyright"])
def test_a_right_program_has_no_fault_and_each_mistake_is_seen(checked, tmp_path):
    pytest.importorskip(checked.__name__)
    lines = (HERE / "mistakes.py").read_text().splitlines()

    found = checked(tmp_path)

    assert found["program.py"] == {}
    assert sorted(found["mistakes.py"]) == [n for n, line in enumerate(lines, 1) if line.endswith("# error")]
