"""One look for text, terminals and notebooks."""

import io
import re
from html.parser import HTMLParser
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from orbax_nnx_handler import MissingParamError, RestoreReport, Split
from orbax_nnx_handler.planning.core.lines import Sentence, joined
from orbax_nnx_handler.planning.options import RestoreOptions
from orbax_nnx_handler.planning.restore_plan import make_plan
from orbax_nnx_handler.planning.target import flatten_target
from orbax_nnx_handler.planning.verdict.leaf_verdicts import Unreadable
from tests.planning.models import model, plan
from tests.planning.plans import params, plan_of, stored_of

STORED = model(2)
PLANS = {
    "fits": plan(STORED, model(2, "", "layers/{}")),
    "does not fit": plan(STORED, model(3, "", "layers/{}")),
}


def printed(shown: object, *, terminal: bool, width: int = 200, height: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, force_terminal=terminal, width=width, height=height).print(shown, end="")
    return out.getvalue()


def test_a_plan_reads_counts_first_and_then_aligned_rows():
    assert str(PLANS["fits"]) == (
        "RestorePlan: fits: 8 restored, 0 defaulted, 0 missing, 0 mismatched, 0 unexpected\n"
        "checkpoint:  (layout: Linen variables, 8 stored leaves)\n"
        "  restored\n"
        "    embed/embedding            (11, 4) float32   <- params/embed/embedding\n"
        "    head/kernel                (4, 11) float32   <- params/head/kernel\n"
        "    layers/{0..1}/norm/scale   (4,) float32      <- params/layers_{0..1}/norm/scale\n"
        "    layers/{0..1}/up/bias      (6,) float32      <- params/layers_{0..1}/up/bias\n"
        "    layers/{0..1}/up/kernel    (4, 6) float32    <- params/layers_{0..1}/up/kernel"
    )


def test_a_plan_that_fits_because_policies_fill_everything_says_so():
    note = "note: nothing of the checkpoint is used: a policy fills every leaf."
    target = nnx.State({"other": nnx.Param(jax.ShapeDtypeStruct((2,), "float32"))})
    stored = {"params": {"dense": {"kernel": np.ones(3, np.float32)}}}

    filled, wrong = plan_of(target, stored, policy="warn"), plan_of(target, stored)
    partly = plan_of(
        nnx.State({**target, "dense": {"kernel": nnx.Param(jax.ShapeDtypeStruct((3,), "float32"))}}),
        stored,
        policy="warn",
    )

    assert filled.fits
    assert note in str(filled)
    assert partly.fits
    assert note not in str(partly)
    assert not wrong.fits
    assert note not in str(wrong)


@pytest.mark.parametrize("name", PLANS)
def test_without_a_terminal_rich_prints_the_plain_text(name):
    assert printed(PLANS[name], terminal=False, width=400).strip() == str(PLANS[name])


@pytest.mark.parametrize("width", [60, 200])
def test_a_terminal_shows_every_leaf_in_its_width(width):
    shown = re.sub(r"\x1b\[[0-9;]*m", "", printed(PLANS["does not fit"], terminal=True, width=width))

    assert "layers/2/up/kernel" in shown
    assert max(map(len, shown.splitlines())) <= width


def test_an_error_and_a_plain_plan_have_no_colour_codes():
    with pytest.raises(MissingParamError) as caught:
        PLANS["does not fit"].check()

    assert "\x1b" not in str(caught.value) + str(PLANS["does not fit"])


class _Balance(HTMLParser):
    """Fails on a tag that closes another than the one open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", PLANS)
def test_a_notebook_shows_tables_that_fold_and_the_share_of_bytes(name):
    page = PLANS[name]._repr_html_()

    balance = _Balance()
    balance.feed(page)
    assert balance.open == []
    assert "<details" in page
    widths = [float(width) for width in re.findall(r'width="([0-9.]+)" height="10"', page)]
    assert sum(widths) == pytest.approx(100, abs=0.1)


def test_the_share_of_bytes_is_that_of_the_leaves():
    page = PLANS["does not fit"]._repr_html_()

    restored = 4 * (11 * 4 + 4 * 11 + 2 * (4 * 6 + 6 + 4))
    missing = 4 * (4 * 6 + 6 + 4)
    assert f"restored: {restored} B" in page
    assert f"missing: {missing} B" in page


def test_names_in_a_notebook_are_text_and_no_markup():
    page = plan({"params/<b>/kernel": (2,)}, {"<b>/kernel": (2,)})._repr_html_()

    assert "<b>/kernel" not in page
    assert "&lt;b&gt;/kernel" in page


def test_a_notebook_keeps_the_columns_of_advice_and_shows_no_empty_ones():
    page = PLANS["does not fit"]._repr_html_()

    assert "<td></td>" not in re.sub(r"<td [^>]*>", "<td>", page)
    assert '<div style="white-space: pre-wrap"><b>hint:</b> ' in page
    assert re.search(r'<svg [^>]*role="img" aria-label="restored \d+ B, missing \d+ B"', page)


def test_a_report_says_what_was_done_and_how_fast():
    report = RestoreReport(plan=PLANS["fits"], seconds=0.5, nbytes=10**9)

    assert str(report).splitlines()[0] == (
        "RestoreReport: 1.00 GB in 0.50 s (2.00 GB/s): "
        "8 restored, 0 defaulted, 0 filled, 0 mismatched, 0 unexpected"
    )


def test_the_warning_names_every_path_in_full():
    made = plan(STORED | {"params/extra/kernel": (2,)}, model(3, "", "layers/{}"), policy="warn")

    assert RestoreReport(plan=made, seconds=1, nbytes=1).warning == (
        "3 missing weights were filled with zeros: "
        "layers/2/up/kernel, layers/2/up/bias, layers/2/norm/scale; "
        "1 stored leaf was not wanted: params/extra/kernel"
    )


def test_the_warning_folds_many_paths():
    made = plan(STORED, model(8, "", "layers/{}"), policy="warn")

    assert RestoreReport(plan=made, seconds=1, nbytes=1).warning == (
        "18 missing weights were filled with zeros: layers/{2..7}/norm/scale, layers/{2..7}/up/bias, "
        "layers/{2..7}/up/kernel"
    )


@pytest.mark.parametrize("show", [str, lambda shown: printed(shown, terminal=True)], ids=["text", "terminal"])
def test_a_plan_shows_what_no_list_does(show):
    made = plan({"params/a/kernel": (2,)}, {"b/kernel": (2,)}, renames=[("a", "c")])

    lines = [line.rstrip() for line in show(made).splitlines()]

    assert "1 rule leads to no wanted leaf:" in lines
    assert "  ('a', 'c'): params/a/kernel becomes c/kernel" in lines
    assert made.to_dict()["faults"] == [
        {"kind": "UnusedRuleError", "message": str(made.faults[0]), "paths": ["params/a/kernel"]}
    ]


def test_the_whole_list_is_in_the_exception_and_in_the_dict_where_the_message_is_cut():
    names = ["".join(chr(97 + int(digit)) for digit in f"{at:03d}") for at in range(90)]
    made = plan({"params/x/kernel": (1,)}, {f"{name}/kernel": (at + 2,) for at, name in enumerate(names)})

    error = made.error()

    assert "... and 50 more" in str(error)
    assert len(error.paths) == len(made.to_dict()["missing"]) == 90


def test_a_terminal_or_a_log_that_knows_only_ascii_is_enough():
    names = ["".join(chr(97 + int(digit)) for digit in f"{at:03d}") for at in range(90)]
    made = plan({"params/x/kernel": (1,)}, {f"{name}/kernel": (at + 2,) for at, name in enumerate(names)})
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")

    Console(file=terminal, force_terminal=True, width=80).print(made)

    terminal.flush()
    assert f"{made}{made.error()}".isascii()


def test_a_model_of_no_bytes_has_no_bar():
    page = plan({"params/a/kernel": (0, 4)}, {"a/kernel": (0, 4)})._repr_html_()

    assert "<svg" not in page


@pytest.mark.parametrize("width", [1, 3, 5])
def test_no_line_of_an_error_is_wider_than_it_must_be(width):
    layers = {
        f"decoder/layers/{at}/self_attention/{name}/kernel": (64, 4, width)
        for at in range(3)
        for name in "qkvo"
    }
    have = {f"params/{path}": (*shape[:2], 9) for path, shape in layers.items()}

    message = str(plan(have, layers | {"head/kernel": (64, 9)}).error())

    assert max(map(len, message.splitlines())) <= 124
    assert all(
        f"stored (64, 4, 9) float32   wanted (64, 4, {width}) float32" in line
        for line in message.splitlines()
        if "stored (" in line
    )


def test_code_in_a_hint_is_never_broken_inside_a_string():
    rules = ", ".join(f"Transpose('a module of {at}/kernel', (1, 0))" for at in range(9))
    hint = Sentence("hint", f"pass renames=[{rules}].")

    lines = joined([hint]).splitlines()

    assert max(map(len, lines)) <= 120
    assert " ".join(line.strip() for line in lines) == str(hint)
    assert all(line.count("'") % 2 == 0 for line in lines)


def test_a_narrow_terminal_hangs_sentences_and_keeps_the_legend_off_the_bar():
    file = io.StringIO()
    Console(file=file, force_terminal=True, width=60, no_color=True).print(PLANS["does not fit"])

    lines = [re.sub(r"\x1b\[\d*m", "", line).rstrip() for line in file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 60
    (bar,) = [at for at, line in enumerate(lines) if line.startswith("██")]
    assert set(lines[bar]) == {"█"}
    assert lines[bar + 1].startswith("restored ")
    (cause,) = [at for at, line in enumerate(lines) if line.startswith("cause: ")]
    assert lines[cause + 1].startswith("       ")


@pytest.mark.parametrize("width", [80, 120])
def test_a_plan_is_one_screen_and_what_is_wrong_is_cut_last(width):
    shapes = {f"part_{at}_of_a_model_with_long_names": np.zeros(at + 1, np.float32) for at in range(28)}
    leaves = {name: jax.ShapeDtypeStruct(value.shape, "float32") for name, value in shapes.items()}
    target = nnx.State({name: {"kernel": nnx.Param(leaf)} for name, leaf in leaves.items()})
    stored = {name: {"kernel": value} for name, value in shapes.items()}
    few = dict(list(stored.items())[:14])
    fits, lacks = plan_of(target, {"params": stored}), plan_of(target, {"params": few})

    def lines(shown, height):
        return printed(shown, terminal=True, width=width, height=height).splitlines()

    assert len(lines(fits, 24)) <= 22
    assert "... and " in "\n".join(lines(fits, 24))
    assert len(lines(fits, 100)) > 28
    assert len(lines(lacks, 24)) <= 22
    assert "missing: wanted, but not stored (14)" in "\n".join(lines(lacks, 24))
    assert "restored (14)" in lines(lacks, 24)[-1]
    assert all(name in "\n".join(lines(lacks, 32)) for name in list(stored)[14:])


def _seven_billion(*, layers: int = 32, width: int = 4096, named: str = "{}", odd: bool = False) -> Any:
    inner = 11008 * width // 4096

    def block(at: int) -> dict[str, Any]:
        shapes = {f"attention/{named.format(name)}/kernel": (width, width) for name in "qkvo"}
        shapes |= {f"mlp/{named.format(name)}/kernel": (width, inner) for name in ("gate", "up")}
        shapes |= {"mlp/down/kernel": (inner, width + at if odd and at % 3 else width)}
        return shapes | {f"{name}_norm/scale": (width,) for name in ("first", "second")}

    whole = {"embed/embedding": (32000, width), "norm/scale": (width,), "head/kernel": (width, 32000)}
    return whole | {f"layers_{at}/{name}": shape for at in range(layers) for name, shape in block(at).items()}


_OTHERS = {
    "is the same": {},
    "has more layers": {"layers": 40},
    "is wider": {"width": 5120},
    "has other names": {"named": "{}_proj"},
    "differs here and there": {"odd": True},
}


@pytest.mark.parametrize("height", [24, 40])
@pytest.mark.parametrize("other", _OTHERS)
def test_the_plan_of_seven_billion_parameters_is_one_screen_with_the_cause_first(other, height):
    stored = _seven_billion()
    moments = {f"opt_state/0/mu/{name}": shape for name, shape in stored.items()}
    have = {f"params/{name}": shape for name, shape in stored.items()} | moments
    wanted = _seven_billion(**_OTHERS[other])
    made = plan(have, {name.replace("layers_", "layers/"): shape for name, shape in wanted.items()})

    shown = printed(made, terminal=True, width=100, height=height)

    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).rstrip().splitlines()
    assert len(lines) <= height
    assert made.fits == (other == "is the same")
    if not made.fits:
        first = next(at for at, line in enumerate(lines) if line.startswith(("cause: ", "hint: ")))
        assert first <= 6
        assert not any(line.startswith("  restored") for line in lines[:first])


def test_a_report_tells_where_a_leaf_came_from_by_its_keys_and_as_it_is_printed():
    report = RestoreReport.of(PLANS["fits"], 1.0)

    by_keys = report.origin(("layers", 1, "up", "kernel"))

    assert report.origin("layers/1/up/kernel") is by_keys
    assert by_keys.wanted.path == ("layers", 1, "up", "kernel")
    with pytest.raises(KeyError, match="no leaf layers/1/up/kernl; the nearest: layers/1/up/kernel"):
        report.origin("layers/1/up/kernl")
    with pytest.raises(KeyError, match="no leaf heads/kernel; the nearest: head/kernel"):
        report.origin(("heads", "kernel"))


def test_two_leaves_that_are_printed_alike_are_told_apart_by_their_keys():
    wanted, stored = jax.ShapeDtypeStruct((2,), "float32"), np.zeros(2, np.float32)
    target, tree = {"a/b": wanted, "a": {"b": wanted}}, {"params": {"a/b": stored, "a": {"b": stored}}}
    report = RestoreReport.of(plan_of(target, tree, policy="warn"), 1.0)

    assert report.origin(("a", "b")).wanted.path == ("a", "b")
    with pytest.raises(KeyError, match="no leaf a/b"):
        report.origin("a/b")


def test_the_head_counts_what_no_list_of_leaves_shows():
    unused = plan({"params/a/kernel": (2,)}, {"b/kernel": (2,)}, renames=[("a", "c")])
    split = Split("qkv", ("q", "k", "rest"), axis=-1)
    parts = plan({"params/qkv/kernel": (2, 6)}, {"q/kernel": (2, 2), "k/kernel": (2, 2)}, renames=[split])
    twice = plan({"params/a/kernel": (2,), "params/b/kernel": (2,)}, {"a/kernel": (2,)}, renames=[("b", "a")])
    damaged = make_plan(
        flatten_target(params({"a": {"kernel": (2,)}})),
        stored_of({("params", "a", "kernel"): np.ones(2, "f")}),
        RestoreOptions(),
        broken=Unreadable(damaged={("params", "a", "kernel"): "the file ends before it does"}),
    )

    made = (unused, parts, twice, damaged)
    heads = [str(each).splitlines()[0].partition("unexpected, ")[2] for each in made]

    assert heads == ["1 rule without effect", "1 whose rule does not fit", "1 ambiguous", "1 unreadable"]
