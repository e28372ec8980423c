"""Whether the rename back makes what a rename has made its entries from."""

import numpy as np
import pytest

from orbax_nnx_handler import Rename
from orbax_nnx_handler.planning.core.recipes import Read
from orbax_nnx_handler.planning.rules.entries import Entry
from orbax_nnx_handler.planning.rules.inverse import leads_back


def entries(*paths):
    return [
        Entry(
            segments=tuple(path.split("/")),
            collection="params",
            recipe=Read(tuple(path.split("/"))),
            shape=(2,),
            dtype=np.dtype("float32"),
        )
        for path in paths
    ]


@pytest.mark.parametrize(
    ("pattern", "replacement", "beside", "expected"),
    [
        ("ln_0", "norm_0", "other/0/scale", True),
        ("ln_0", "norm_0", "norm/1/scale", True),
        ("ln_0", "norm_0", "norm/0/scale", False),
        ("ln_{i}", "norm_{i}", "norm/7/scale", False),
        ("ln_{i}", "norm_{i}", "norm/first/scale", True),
        ("ln_0", "norm/first", "norm/0/scale", True),
    ],
)
def test_a_rename_to_a_number_does_not_lead_back_beside_a_list_that_a_save_would_join(
    pattern, replacement, beside, expected
):
    rule, before = Rename(pattern, replacement), entries("ln_0/scale", beside)

    after = rule.apply(before).entries

    assert leads_back(rule, before, after) is expected
