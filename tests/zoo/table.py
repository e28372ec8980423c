"""Writes the module part of `docs/supported.md` from the zoo.

`python -m tests.zoo.table` rewrites the file; a test compares it.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.zoo.models import MODELS
from tests.zoo.models.base import ModelPair
from tests.zoo.modules import ALL
from tests.zoo.pairs import Pair

PAGE = Path(__file__).parents[2] / "docs" / "supported.md"
BEGIN, END = "<!-- zoo: begin (written by tests/zoo/table.py) -->", "<!-- zoo: end -->"

INTRODUCTION = """## Modules

Each row is a pair that the suite saves with stock Orbax from Linen, restores into NNX and runs on the
same input; every stored weight is then broken once to see the comparison fail.
“Names to give” means that Linen's automatic names differ from the NNX attributes and `renames=` bridges them.
"""

MODELS_INTRODUCTION = """## Whole models

Each row is a Linen train state after three steps, restored into an NNX model and its `nnx.Optimizer`.
Logits, every gradient, and every weight and statistic after one further optimizer step are those that
Linen computes.
"""


def section() -> str:
    """Returns the part of the page that the zoo knows."""
    modules = _table(("Linen", "NNX", "Shown for", "Compared", "Names to give"), _module_rows())
    models = _table(("Model", "Optimizer", "Names to give"), map(_model_row, MODELS))
    return "\n".join((BEGIN, INTRODUCTION, modules, MODELS_INTRODUCTION, models, END))


def _module_rows() -> Iterator[Sequence[str]]:
    def names(pair: Pair) -> tuple[str, str]:
        return pair.linen_name, pair.nnx_name

    order = {key: index for index, key in reversed([*enumerate(map(names, ALL))])}
    for key, group in itertools.groupby(sorted(ALL, key=lambda pair: order[names(pair)]), key=names):
        pairs = [*group]
        shown = "; ".join(pair.variant for pair in pairs if pair.variant)
        compared = "; ".join(dict.fromkeys(map(_compared, pairs)))
        yield f"`{key[0]}`", f"`{key[1]}`", shown, compared, _share(pair.renames for pair in pairs)


_STEPS = {0: "", 1: "one training step, ", 2: "two training steps, "}


def _compared(pair: Pair) -> str:
    steps = "forward" if pair.training is None else f"{_STEPS[pair.training.steps]}state, forward"
    return (
        f"{steps}; `{pair.without_variable[0].split('/', 1)[1]}` must be zero"
        if pair.without_variable
        else steps
    )


def _share(renames: Iterable[object]) -> str:
    given = [bool(rules) for rules in renames]
    if all(given):
        return "yes"
    return "where automatic" if any(given) else "no"


def _model_row(pair: ModelPair) -> Sequence[str]:
    return pair.name, pair.optimizer_name, "yes" if pair.renames else "no"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rewritten(page: str) -> str:
    """Returns the page with the zoo's part brought up to date."""
    if BEGIN not in page:
        return f"{page.rstrip()}\n\n{section()}\n".lstrip()
    before, rest = page.split(BEGIN, 1)
    return before + section() + rest.split(END, 1)[1]


if __name__ == "__main__":
    text = PAGE.read_text() if PAGE.exists() else "# What is supported\n"
    PAGE.write_text(rewritten(text))
