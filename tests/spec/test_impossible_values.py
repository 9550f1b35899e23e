"""Every parameter of every method refuses the values that it cannot have, at their lines."""

from __future__ import annotations

import pytest

from outliermerge.errors import SpecError
from outliermerge.methods.parameter import Parameter
from outliermerge.methods.table import EVERY, MODIFIERS
from outliermerge.spec.check import parse_spec

LARGE = ["1e39", "1" + "0" * 320, "1e30", "1000001"]
OF_NUMBERS = [".nan", "-.inf", *LARGE[:2], "-1.0e+300", "x", "true", "[]", "null"]
BY_TYPE = {
    float: OF_NUMBERS,
    int: [*OF_NUMBERS, *LARGE[2:], "2.5", "-1", "[1, 0.5]"],
    bool: [".nan", "2", "-1", "0.5", "x", "[]", "null"],
    str: [".nan", "1", "nonesuch", "[]", "null"],
}


def impossible(parameter: Parameter) -> list[str]:
    """Return texts of values that a parameter cannot have."""
    bounds = parameter.bounds
    below = [f"{limit - 0.25}" for limit in (bounds.ge,) if limit is not None]
    above = [f"{limit + 0.25}" for limit in (bounds.le,) if limit is not None]
    on = [f"{limit}" for limit in (bounds.gt, bounds.lt) if limit is not None]
    # A number of models is compared with theirs when it is known to be a whole number.
    by_type = [v for v in BY_TYPE[parameter.type] if not (parameter.counts_models and v in LARGE)]
    return [*by_type, *below, *above, *on]


@pytest.mark.parametrize(
    ("method", "name"), [(m, name) for m in EVERY for name in EVERY[m].parameters], ids=str
)
@pytest.mark.sampled(3)
def test_a_value_that_a_parameter_cannot_have_is_refused_at_its_line(method, name):
    found = EVERY[method]
    model = "statistics: s" if found.auxiliary else "extra: drop"
    num_models = (found.max_models or 2) - (found.base_as == "first")
    head = [
        f"merge_method: {method}",
        *(["base_model: b"] if found.needs_base else []),
        "models:",
        *(f"- {{model: m{number}, {model}}}" for number in range(num_models)),
        "parameters:",
        f"  {name}:",
    ]
    values = impossible(found.parameters[name])
    entries = [f"  - {{filter: f{number}, value: {value}}}" for number, value in enumerate(values)]
    with pytest.raises(SpecError) as raised:
        parse_spec("\n".join([*head, *entries]), file="FILE")
    told = [str(each).partition(": ")[0].split(":")[1] for each in raised.value.all]
    first = len(head) + 1
    assert [int(line) for line in dict.fromkeys(told)] == list(range(first, first + len(values)))


@pytest.mark.parametrize(
    ("modifier", "name"),
    [(m, name) for m in MODIFIERS for name in MODIFIERS[m].parameters],
    ids=str,
)
def test_a_value_that_a_modifiers_parameter_cannot_have_is_refused_at_its_line(modifier, name):
    for value in impossible(MODIFIERS[modifier].parameters[name]):
        text = (
            "merge_method: ties\nbase_model: b\nmodels: [{model: m}]\nmodifiers:\n"
            f"- modifier: {modifier}\n  parameters:\n    {name}: {value}"
        )
        with pytest.raises(SpecError, match=rf"^FILE:7:\d+: modifiers\[0\].parameters.{name}: "):
            parse_spec(text, file="FILE")


def test_every_whole_number_has_a_least_and_a_greatest_value():
    every = [one for method in EVERY.values() for one in method.parameters.values()]
    of_whole = [one for one in every if one.type is int]
    assert len(of_whole) > 4
    for one in of_whole:
        assert one.bounds.ge is not None
        assert one.bounds.le is not None or one.counts_models
