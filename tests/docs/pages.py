"""The pages that the suite runs, each with the world it begins in."""

import pathlib
from collections.abc import Callable

from tests.docs import worlds

ROOT = pathlib.Path(__file__).parents[2]

PAGES: dict[str, Callable[[pathlib.Path], worlds.World]] = {
    "README.md": worlds.tiny,
    "docs/index.md": worlds.tiny,
    "docs/getting_started.md": worlds.nothing,
    "docs/migrating.md": worlds.migration,
    "docs/drop_in.md": worlds.empty_directory,
    "docs/policies.md": worlds.policies,
    "docs/rules.md": worlds.rules,
    "docs/hugging_face.md": worlds.nothing,
    "docs/scanned_models.md": worlds.nothing,
    "docs/proving.md": worlds.nothing,
    "docs/maxtext.md": worlds.migration,
    "docs/tunix.md": worlds.gemma,
    "docs/several_networks.md": worlds.empty_directory,
    "docs/ema.md": worlds.empty_directory,
    "docs/lora.md": worlds.empty_directory,
    "docs/object_storage.md": worlds.empty_directory,
    "docs/layouts.md": worlds.layouts,
    "docs/command_line.md": worlds.nothing,
    "docs/how_it_works.md": worlds.migration,
    "docs/performance.md": worlds.nothing,
}
