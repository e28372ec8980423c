"""`--memory`: a bound of the whole process, and without it one that does for any process."""

import pytest

from orbax_nnx_handler.storage.converting import blocks


@pytest.fixture(params=[0.4e9, 40e9], ids=["small process", "large process"])
def held(request, monkeypatch) -> float:
    """What the process holds before the command starts, in bytes."""
    monkeypatch.setattr(blocks, "_resident_bytes", lambda: int(request.param))
    return request.param


def test_commands_work_inside_any_process(cli, root, tmp_path, held) -> None:
    converted = cli("convert", root, tmp_path / "out")
    compared = cli("diff", root, tmp_path / "out", "--values")

    assert (converted.status, compared.status) == (0, 0), converted.err + compared.err


def test_a_bound_below_what_the_process_holds_is_said_before_anything_is_written(
    cli, root, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(blocks, "_resident_bytes", lambda: 3_040_000_000)

    said = cli("convert", root, tmp_path / "out", "--memory", 2)

    assert said.status == 1
    assert said.err == (
        "RestoreError: 2.00 GB of memory are too little: the process holds 3.04 GB already, and reading and "
        "writing take 0.31 GB beside the values.\nhint: allow 3.4 GB or more.\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("amount", ["0", "-1", "nan", "inf", "lots"])
def test_what_is_no_amount_is_status_2(cli, root, tmp_path, amount) -> None:
    said = cli("convert", root, tmp_path / "out", "--memory", amount)

    assert said.status == 2
    assert "error: argument --memory: " in said.err


def test_the_default_is_in_the_help(cli) -> None:
    said = cli("convert", "--help")

    assert "(default: 1 more than it holds" in " ".join(said.out.split())


def test_freed_memory_goes_back_after_every_batch(cli, root, tmp_path, monkeypatch) -> None:
    released: list[None] = []
    monkeypatch.setattr(blocks, "_BATCH_LEAVES", 4)
    monkeypatch.setattr(blocks, "release_freed", lambda: released.append(None))

    said = cli("convert", root, tmp_path / "out")

    assert said.status == 0
    # 40 leaves in batches of 4, written once and read again once; the last batch has none after it.
    assert len(released) == 2 * 9
