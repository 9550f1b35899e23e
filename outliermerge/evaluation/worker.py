"""The subprocess of one model: loads it once and lets a harness evaluate task after task.

worker_process.py starts it with a request as JSON on standard input. It reports events as lines of
JSON on standard output; everything that the harness and the model print goes to standard error. It
is a separate process because importing lmms-eval changes torch's global settings.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from outliermerge.evaluation.worker_results import Runner


def main() -> None:
    """Evaluate the tasks of the request."""
    request = json.load(sys.stdin)
    with telling(request["parent"]) as tell:
        _evaluate_all(request, tell)


@contextmanager
def telling(parent: int) -> Iterator[Callable[..., None]]:
    """Yield what tells events to the parent; this process ends when the parent does."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as events:
        os.dup2(2, 1)

        def tell(**event: Any) -> None:
            events.write(json.dumps(event, allow_nan=False) + "\n")

        yield tell


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, because nobody would read the results."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _evaluate_all(request: Mapping[str, Any], tell: Callable[..., None]) -> None:
    runner: Runner = import_module(request["worker"]).Worker(request)
    entries = []
    for entry in request["tasks"]:
        try:
            runner.check(entry)
            entries.append(entry)
        except Exception as error:
            tell(event="failed", title=entry["title"], reason=reason_of(error))
    if not entries:
        return
    refuse_made_up_weights()
    try:
        image_backend = runner.load()
    except Exception as error:
        tell(event="not loaded", reason=reason_of(error))
        raise
    tell(event="loaded", image_backend=image_backend)
    for entry in entries:
        tell(event="started", title=entry["title"])
        started = time.monotonic()
        try:
            result = runner.evaluate(entry)
        except Exception as error:
            tell(event="failed", title=entry["title"], reason=reason_of(error))
            continue
        result["seconds"] = time.monotonic() - started
        tell(event="finished", title=entry["title"], result=result)


def refuse_made_up_weights() -> None:
    """Make transformers fail if a checkpoint lacks weights, instead of drawing them at random."""
    import transformers

    PreTrainedModel: Any = transformers.PreTrainedModel
    load = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: type, *arguments: Any, **options: Any) -> Any:
        model, found = load(cls, *arguments, **{**options, "output_loading_info": True})
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"its files lack {len(missing)} tensors: {', '.join(missing[:5])}")
        return model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def reason_of(error: BaseException) -> str:
    """Return in a few lines what went wrong."""
    attempt = getattr(error, "last_attempt", None)  # tenacity's RetryError hides the cause
    if attempt is not None and attempt.exception() is not None:
        error = attempt.exception()
    text = str(error).strip() or type(error).__name__
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    reason = f"{type(error).__name__}: " + "\n".join(lines[:6])[:1500]
    # File names may have bytes that are not valid text.
    return reason.encode("utf-8", "backslashreplace").decode()


if __name__ == "__main__":
    main()
