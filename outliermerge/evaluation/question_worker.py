"""The subprocess of a search: stays, and asks one model after the other some questions.

worker_process.py starts it with a request as a line of JSON on standard input. Each further line
names a model and, by title of a task, the questions that it is asked. The first event says that the
process is ready.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from outliermerge.evaluation.worker import reason_of, refuse_made_up_weights, telling
from outliermerge.evaluation.worker_results import Runner


def main() -> None:
    """Ask models what the lines say."""
    request = json.loads(sys.stdin.readline())
    with telling(request["parent"]) as tell:
        try:
            runner: Runner = import_module(request["worker"]).Worker(request)
            for entry in request["tasks"]:
                runner.check(entry)
            refuse_made_up_weights()
        except Exception as error:
            tell(event="failed", reason=reason_of(error), is_over=True)
            return
        tell(event="ready")
        loaded = ""
        for line in sys.stdin:
            asked = json.loads(line)
            try:
                if asked["model"] != loaded:
                    loaded = ""
                    request["model_args"][request["path_argument"]] = asked["path"]
                    runner.load()
                    loaded = asked["model"]
                _ask(runner, request, asked["questions"], tell)
            except Exception as error:
                tell(event="failed", reason=reason_of(error))


def _ask(
    runner: Runner, request: Mapping[str, Any], questions: Any, tell: Callable[..., None]
) -> None:
    answers = {}
    for entry in request["tasks"]:
        title = entry["title"]
        if questions is not None and title not in questions:
            continue
        wanted = None if questions is None else questions[title]
        result = runner.evaluate({**entry, "questions": wanted})
        sign = -1 if result["lower_is_better"] else 1
        answers[title] = {name: sign * score for name, score in result["questions"].items()}
    tell(event="answered", answers=answers)


if __name__ == "__main__":
    main()
