"""The zoo leaves out no module, and the docs say what the zoo shows."""

import re

import flax
import flax.linen as nn
from flax import nnx

from tests.zoo.modules import PAIRS
from tests.zoo.table import PAGE, rewritten

# Bases, and the inner parts of other modules: nothing to restore by themselves.
NOT_A_LAYER = {"Module", "RNNCellBase"}
# Linen's float8 operations for dense layers all store what the two in the zoo store.
FLOAT8 = {"Fp8DotGeneralOp", "NANOOFp8DotGeneralOp"}


def shown(side: str) -> set[str]:
    return {word for pair in PAIRS for word in re.findall(r"\w+", getattr(pair, side))}


def modules_of(namespace: object, base: type) -> set[str]:
    return {
        name for name, item in vars(namespace).items() if isinstance(item, type) and issubclass(item, base)
    }


def test_every_linen_module_is_in_the_zoo() -> None:
    missing = modules_of(nn, nn.Module) - NOT_A_LAYER - FLOAT8 - shown("linen_name")

    assert not missing, (
        f"flax {flax.__version__} has modules that no pair shows: nn.{', nn.'.join(sorted(missing))}"
    )


def test_every_nnx_module_is_in_the_zoo() -> None:
    missing = modules_of(nnx, nnx.Module) - NOT_A_LAYER - shown("nnx_name")

    assert not missing, (
        f"flax {flax.__version__} has modules that no pair shows: nnx.{', nnx.'.join(sorted(missing))}"
    )


def test_the_table_of_modules_in_the_docs_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")

    assert page == rewritten(page), "run: python -m tests.zoo.table"
