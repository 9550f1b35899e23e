"""Methods that other tools know: each is said not to be here, with the nearest that is."""

from __future__ import annotations

import pytest

from outliermerge.errors import SpecError
from outliermerge.methods.elsewhere import _KNOWN, _PLACES, _SAME, known_elsewhere
from outliermerge.methods.table import EVERY, find_method

FEW = ("min_sigma", "linear", "task_arithmetic", "ties", "passthrough")
NAMES = [name for groups in _KNOWN.values() for names in groups.values() for name in names.split()]


def test_no_name_is_listed_twice():
    assert sorted(NAMES) == sorted(_PLACES)
    assert set(_SAME) <= set(_PLACES)


@pytest.mark.parametrize("name", sorted(_PLACES))
@pytest.mark.parametrize("here", [FEW, tuple(EVERY)], ids=["few", "all"])
def test_each_names_its_tool_and_a_method_that_is_here(name, here):
    said = known_elsewhere(name, here)
    assert name in said
    near = said.rpartition("'")[0].rpartition("'")[2]
    assert near in here
    tool = _PLACES[name][0] or "known from papers"
    assert tool in said
    assert f"is here as {near!r}" in said or f"is not here; the nearest is {near!r}" in said


@pytest.mark.parametrize("name", ["dare_ties", "Dare-TIES", " DARE_TIES "])
def test_a_method_that_was_added_is_the_nearest_to_others(name):
    assert "the nearest is 'ties'" in known_elsewhere("ties_with_dare", FEW)
    assert "the nearest is 'dare_ties'" in known_elsewhere("ties_with_dare", (*FEW, "dare_ties"))
    assert "mergekit's" in known_elsewhere(name, FEW)


@pytest.mark.parametrize("name", [name for name in sorted(_PLACES) if name not in EVERY])
def test_the_table_says_it(name):
    with pytest.raises(SpecError) as raised:
        find_method(name)
    assert str(raised.value).startswith(known_elsewhere(name, EVERY))


@pytest.mark.parametrize("name", ["LiNeS", "SVC"])
def test_a_modifier_is_said_to_be_one(name):
    with pytest.raises(SpecError, match=f"{name} is a modifier: .* as '{name.lower()}'"):
        find_method(name)


@pytest.mark.parametrize("name", ["zzz", ""])
def test_a_name_that_nobody_knows_gets_all_valid_ones(name):
    with pytest.raises(SpecError) as raised:
        find_method(name)
    assert f"Valid: {', '.join(sorted(EVERY))}." in str(raised.value)
    assert "Did you mean" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "meant"), [("tise", "ties"), ("TIES", "ties"), ("Min-Sigma", "min_sigma")]
)
def test_a_slip_gets_the_name_that_was_meant(name, meant):
    with pytest.raises(SpecError) as raised:
        find_method(name)
    assert str(raised.value) == f"unknown merge method {name!r}. Did you mean {meant!r}?"
