"""Records of leaves are dataclasses like any other, but for the time that they take."""

import copy
import dataclasses
import inspect
import pickle

import pytest

from orbax_nnx_handler.planning.core.leaves import derived, record


@record
class Named:
    """A value with a default."""

    path: tuple[str, ...]
    count: int = 0
    beside: object = dataclasses.field(default=None, compare=False)

    @derived
    def name(self) -> str:
        """The path in one word."""
        calls.append(self.path)
        return "/".join(self.path)


calls: list[tuple[str, ...]] = []


def test_a_record_is_a_frozen_dataclass_of_keywords() -> None:
    made = Named(path=("a", "b"), count=2)
    assert made == Named(path=("a", "b"), count=2, beside="something else")
    assert made != Named(path=("a", "b"))
    assert hash(made) == hash(Named(path=("a", "b"), count=2))
    assert repr(made) == "Named(path=('a', 'b'), count=2, beside=None)"
    assert dataclasses.replace(made, count=3) == Named(path=("a", "b"), count=3)
    assert [field.name for field in dataclasses.fields(made)] == ["path", "count", "beside"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.count = 3  # type: ignore[misc]


def test_what_is_missing_is_said() -> None:
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'path'"):
        Named()  # type: ignore[call-arg]
    assert "path" in inspect.signature(Named).parameters


def test_a_record_pickles_and_copies() -> None:
    made = Named(path=("a",))
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made
    assert pickle.loads(pickle.dumps(made)).count == 0


def test_a_derived_value_is_worked_out_once_and_for_each_record_anew() -> None:
    calls.clear()
    made = Named(path=("a", "b"))
    assert (made.name, made.name) == ("a/b", "a/b")
    assert calls == [("a", "b")]
    assert dataclasses.replace(made, path=("c",)).name == "c"
    assert Named.name.__doc__ == "The path in one word."
