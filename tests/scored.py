"""What scores the models of the tests of searches: functions of tensors, no language models."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence

import torch

TARGETS = {f"q{number}": number / 40 for number in range(40)}


def closeness(model: Mapping[str, torch.Tensor], questions: Sequence[str] | None = None):
    """Return how close the mean weight is to each of several numbers around 0.5."""
    mean = float(model["w"].double().mean())
    names = TARGETS if questions is None else questions
    return {name: -((mean - 0.5 - 0.2 * (TARGETS[name] - 0.5)) ** 2) for name in names}


def two_tasks(model: Mapping[str, torch.Tensor], questions=None):
    """Return how close the weights are to 1, and how close to 0."""
    mean = float(model["w"].double().mean())
    names = questions or {task: list(TARGETS) for task in ("one", "zero")}
    return {
        task: {name: -abs(mean - (task == "one") + TARGETS[name] / 100) for name in own}
        for task, own in names.items()
    }


def slow(model, questions=None):
    """Take for ever at a trial that a variable names: the calls that many after the first ones."""
    global calls
    calls += questions is not None and len(questions) == 4  # the last share of 8 questions
    if calls == int(os.environ.get("SLOW_AT", "-1")):
        time.sleep(60)
    return closeness(model, questions)


calls = 0


def fails_above_one(model, questions=None):
    """Fail for merges with large weights."""
    mean = float(model["w"].double().mean())
    if mean > 0.9 and questions is not None:
        raise ValueError("too large")
    return closeness(model, questions)


def fails_but_for_known(model, questions=None):
    """Fail for all but the models that are asked all questions."""
    if questions is not None:
        raise RuntimeError("out of luck")
    return closeness(model)


def fails(model):
    """Fail."""
    raise RuntimeError("out of luck")


def returns_nan(model):
    """Give a score that is none."""
    return {name: float("nan") for name in TARGETS}


def returns_text(model):
    """Give no scores."""
    return "good"


def two_questions(model):
    """Give too few scores."""
    return {"a": 1.0, "b": 2.0}


def unhurried(model, questions=None):
    """Take a moment, so that others get trials, too."""
    time.sleep(0.2)
    return closeness(model, questions)


def means(model, questions=None):
    """Return how close each tensor's mean is to what is best for it."""
    best = {"layers.0.up.w": 0.0, "layers.1.up.w": 0.5, "head": 0.4}
    error = sum(abs(float(model[name].mean()) - wanted) for name, wanted in best.items())
    names = TARGETS if questions is None else questions
    return {name: -error for name in names}


def gives_others(model, questions=None):
    """Give scores for other questions than those that are asked."""
    found = closeness(model)
    return found if questions is None else {f"other {name}": 0.0 for name in questions}


def gives_no_task(model, questions=None):
    """Give a task, which is lacking when only some questions are asked."""
    return {"one" if questions is None else "other": closeness(model)}


def exits(model, questions=None):
    """End the program, as functions do that are main functions, too."""
    raise SystemExit(3)


def interrupted(model, questions=None):
    """Be interrupted at a call on some questions that a variable names."""
    global interruptions
    interruptions += questions is not None
    if interruptions == int(os.environ.get("INTERRUPT_AT", "-1")):
        raise KeyboardInterrupt
    return closeness(model, questions)


interruptions = 0


def hangs_above(model, questions=None):
    """Never return for merges with large weights, in code that no exception of Python ends."""
    if questions is not None and float(model["w"].double().mean()) > 0.9:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()
    return closeness(model, questions)


def loud(model, questions=None):
    """Print something, and give numbers of torch's."""
    print("so far, so good")
    return {name: torch.tensor(score) for name, score in closeness(model, questions).items()}


def returns_pairs(model):
    """Give tensors of two numbers."""
    return {name: torch.ones(2) for name in TARGETS}


def returns_huge(model):
    """Give numbers that no float holds."""
    return dict.fromkeys(TARGETS, 10**400)
