"""Writes docs/errors.md anew."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from tests.gallery.page import PAGE, page

PAGE.write_text(page())
