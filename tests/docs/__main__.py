"""Writes what the pages' blocks print into the pages, and the API reference anew."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import pathlib
import sys
import tempfile

from tests.docs.blocks import run
from tests.docs.figures import rewritten
from tests.docs.pages import PAGES, ROOT
from tests.docs.reference import PAGE, reference

PAGE.write_text(reference())
(ROOT / "README.md").write_text(rewritten((ROOT / "README.md").read_text()))
for name in sys.argv[1:] or PAGES:
    page = ROOT / name
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        sys.path.insert(0, directory)
        where = pathlib.Path(directory).resolve()
        text = page.read_text()
        for block, printed in run(page, PAGES[name](where), where):
            text = text.replace(f"```text\n{block.code}```", f"```text\n{printed}\n```", 1)
        page.write_text(text)
        sys.path.remove(directory)
        for module in [
            name
            for name, m in sys.modules.items()
            if getattr(m, "__file__", None) and directory in str(m.__file__)
        ]:
            del sys.modules[module]
        os.chdir(ROOT)
