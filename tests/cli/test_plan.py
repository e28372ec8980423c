"""`orbax-nnx plan`: its status, its JSON, and what its options do."""

import json
import os
import subprocess
import sys

import pytest

from orbax_nnx_handler import plan_restore
from tests.cli.conftest import MODEL


def test_a_checkpoint_that_fits_gives_status_0_and_the_plan(cli, root) -> None:
    said = cli("plan", root, f"{MODEL}:make_train")

    assert said.status == 0
    assert said.err == ""
    assert said.out.splitlines()[:2] == [
        "RestorePlan: fits: 40 restored, 2 defaulted, 0 missing, 0 mismatched, 0 unexpected",
        f"checkpoint: {root}/200/default (layout: Flax TrainState, 40 stored leaves)",
    ]


def test_a_checkpoint_that_does_not_fit_gives_status_1_and_the_cause(cli, root) -> None:
    said = cli("plan", root, f"{MODEL}:make_train(layers=4)")

    assert said.status == 1
    assert said.out.splitlines()[0] == (
        "RestorePlan: does not fit: 40 restored, 2 defaulted, 6 missing, 0 mismatched, 0 unexpected"
    )
    (cause,) = [line for line in said.out.splitlines() if line.startswith("cause: ")]
    assert "3 layers" in cause


@pytest.mark.parametrize(
    ("target", "status", "error"),
    [("make_train", 0, None), ("make(layers=4)", 1, "MissingParamError")],
)
def test_json_is_the_plan_s_own_dict_with_the_error(
    cli, root, target: str, status: int, error: str | None
) -> None:
    from orbax_nnx_handler.commands.user_code import load_factory

    said = cli("plan", root, f"{MODEL}:{target}", "--json")

    plan = plan_restore(root, load_factory(f"{MODEL}:{target}").target())
    wrong = None if error is None else {"type": error, "message": str(plan.error())}
    assert said.status == status
    assert said.json == json.loads(json.dumps(plan.to_dict() | {"error": wrong}))


def test_weights_only_does_not_ask_for_the_optimizer(cli, root) -> None:
    said = cli("plan", root, f"{MODEL}:make_train", "--weights-only", "--json")

    assert said.status == 0
    assert len(said.json["restored"]) == 14
    assert len(said.json["skipped"]) == 26


def test_a_policy_for_one_key_leaves_the_others_strict(cli, root) -> None:
    target = f"{MODEL}:make(layers=4)"

    allowed = cli("plan", root, target, "--policy", "hidden=init", "--json")
    strict = cli("plan", root, target, "--policy", "up=warn")

    assert allowed.status == 0
    assert {item["policy"] for item in allowed.json["missing"]} == {"init"}
    assert strict.status == 1


def test_renames_bring_linen_s_own_names_home(cli, auto_named) -> None:
    renames = ["Dense_0=embed", "LayerNorm_0=norm", "Dense_1=head"]

    without = cli("plan", auto_named, f"{MODEL}:make_named")
    said = cli(
        "plan", auto_named, f"{MODEL}:make_named", *(a for r in renames for a in ("--rename", r)), "--json"
    )

    assert without.status == 1
    assert said.status == 0
    assert {item["path"]: item["stored"] for item in said.json["restored"]} == {
        "embed/bias": ["params/Dense_0/bias"],
        "embed/kernel": ["params/Dense_0/kernel"],
        "norm/bias": ["params/LayerNorm_0/bias"],
        "norm/scale": ["params/LayerNorm_0/scale"],
        "head/bias": ["params/Dense_1/bias"],
        "head/kernel": ["params/Dense_1/kernel"],
    }


@pytest.mark.parametrize(
    "options",
    [
        ["--rename", "Dense_0"],
        ["--policy", "sometimes"],
        ["--policy", "init", "--policy", "warn"],
        ["--layout", "nobody's"],
        ["--no-such-option"],
    ],
)
def test_a_mistake_in_the_command_is_status_2(cli, root, options: list[str]) -> None:
    said = cli("plan", root, f"{MODEL}:make", *options)

    assert said.status == 2
    assert said.out == ""
    assert said.err != ""
    assert "Traceback" not in said.err


def test_a_rule_without_effect_is_an_error_in_plain_text(cli, root) -> None:
    said = cli("plan", root, f"{MODEL}:make", "--rename", "no_such_layer=up")

    assert said.status == 1
    assert said.err.startswith("UnusedRuleError: ")
    assert "\x1b" not in said.err


def test_the_program_runs_from_its_module_and_leaves_the_current_directory_importable(root, tmp_path) -> None:
    (tmp_path / "mine.py").write_text(MODEL.read_text())
    environment = os.environ | {"PYTHONPATH": str(MODEL.parents[2])}

    ran = subprocess.run(
        [sys.executable, "-m", "orbax_nnx_handler", "plan", str(root), "mine:make", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["fits"] is True
    assert ran.stderr == ""
