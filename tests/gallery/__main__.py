"""Writes docs/errors.md anew."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from tests.gallery.page import PAGE, page

PAGE.write_text(page())
