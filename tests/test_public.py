"""The public surface is what `__all__` says, and the drawn errors are the real ones."""

from __future__ import annotations

import inspect
import re

import pytest

import reshard
from reshard import errors


def test_all_is_sorted() -> None:
    assert reshard.__all__ == sorted(reshard.__all__)


@pytest.mark.parametrize("name", reshard.__all__)
def test_every_public_name_is_there_and_explains_itself(name: str) -> None:
    value = getattr(reshard, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__doc__
        assert not name.startswith("_")


def test_nothing_else_is_public() -> None:
    extra = {n for n in vars(reshard) if not n.startswith("_")} - set(reshard.__all__)
    modules = {n for n in extra if inspect.ismodule(getattr(reshard, n))}
    assert extra - modules - {"TYPE_CHECKING", "Any", "annotations"} == set()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        reshard.nothing  # type: ignore[attr-defined]


def test_lazy_names_are_those_of_the_type_checker() -> None:
    assert set(reshard._WHERE) <= set(reshard.__all__)


def drawn() -> dict[str, str]:
    """Class to base class, as the docstring of `errors` draws them."""
    parents, bases = ["Exception"], {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"(?P<indent>[│├└─ ]*)(?P<name>[A-Z]\w+)(?:\s{2,}.*)?$", line)
        if match and (match["name"] == "ReshardError" or match["indent"]):
            depth = len(match["indent"]) // 4 + 1
            bases[match["name"]] = parents[depth - 1]
            parents[depth:] = [match["name"]]
    return bases


def test_the_tree_of_errors_is_as_drawn() -> None:
    real = {
        name: value.__bases__[0].__name__
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, Exception)
    }
    assert drawn() == real


def test_every_error_carries_a_hint() -> None:
    error = errors.Corrupt("no", hint="yes")
    assert (str(error), error.hint) == ("no", "yes")
    assert errors.NotFound("no").hint is None


def test_long_lists_are_cut_with_their_number() -> None:
    assert errors.listed("abc") == "a, b, c"
    assert errors.listed(map(str, range(12)), 10) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
