"""Which questions a search asks: halves that do not meet, samples whose weights add up."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outliermerge.errors import OutlierMergeError
from outliermerge.search.questions import mean_of, sample


def known(num_questions: int, differing: int) -> list[dict[str, dict[str, float]]]:
    """Return the answers of three models, which differ on the first questions only."""
    first = {f"q{i}": float(i % 2) for i in range(num_questions)}
    other = {name: 1 - v if i < differing else v for i, (name, v) in enumerate(first.items())}
    return [{"task": first}, {"task": other}, {"task": first}]


@settings(deadline=None, max_examples=60)
@given(
    num_questions=st.integers(4, 120), share=st.floats(0, 1), number=st.integers(1, 150),
    seed=st.integers(0, 5),
)  # fmt: skip
def test_a_sample_stands_for_its_half(num_questions, share, number, seed):
    answers = known(num_questions, int(share * num_questions))
    found = sample(answers, number=number, seed=seed)
    asked, searched, held_out = (
        one["task"] for one in (found.asked, found.searched, found.held_out)
    )
    assert sorted([*searched, *held_out]) == sorted(answers[0]["task"])
    assert set(asked) <= set(searched)
    assert len(asked) == min(max(number, 1), len(searched)) or len(asked) <= 4
    assert sum(asked.values()) == pytest.approx(len(searched))
    assert list(found.shares()[-1]["task"]) == list(asked)
    assert found == sample(answers, number=number, seed=seed)


def test_questions_on_which_models_differ_are_asked_rather():
    found = sample(known(400, 80), number=40, seed=0)
    differing = [name for name in found.asked["task"] if int(name[1:]) < 80]
    assert 20 <= len(differing) <= 30  # of 40, where 8 would be their share
    for step in found.shares():  # and so in each part of a trial
        own = [name for name in step["task"] if int(name[1:]) < 80]
        assert 0.4 * len(step["task"]) <= len(own) <= 0.8 * len(step["task"])


def test_the_estimate_is_without_bias_and_closer_than_a_plain_sample():
    answers = known(400, 80)
    # A merge that has something of both, and fails here and there.
    merge = {
        "task": {
            name: value if i % 3 else answers[1]["task"][name]
            for i, (name, value) in enumerate(answers[0]["task"].items())
        }
    }
    errors, plain = [], []
    for seed in range(200):
        found = sample(answers, number=40, seed=seed)
        true = mean_of(merge, found.searched)["task"]
        errors.append(found.estimate(merge)["task"] - true)
        first = found.searched["task"][:40]
        plain.append(statistics.fmean(merge["task"][name] for name in first) - true)
    assert abs(statistics.fmean(errors)) < 3 * statistics.stdev(errors) / 200**0.5
    assert statistics.stdev(errors) < 0.75 * statistics.stdev(plain)


def test_too_few_questions_are_refused():
    with pytest.raises(OutlierMergeError, match="has 3 questions: a search needs at least 4"):
        sample(known(3, 1), number=2, seed=0)


def test_models_that_were_asked_other_questions_are_refused():
    answers = known(10, 2)
    del answers[1]["task"]["q3"]
    with pytest.raises(OutlierMergeError, match="not asked the same questions"):
        sample(answers, number=2, seed=0)
