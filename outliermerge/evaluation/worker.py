"""The subprocess of one model: loads it once and lets lmms-eval evaluate task after task.

worker_process.py starts it with a request as JSON on standard input. It reports events as lines of
JSON on standard output; everything that lmms-eval and the model print goes to standard error. It is
a separate process because importing lmms-eval changes torch's global settings.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# If generation fails, llava_hf answers with an empty text and continues.
_SWALLOWED = "in generating"
# Multiplied by a scale of 100 it is still a valid score (formats.LARGEST).
_LARGEST = 1e138


def main() -> None:
    """Evaluate the tasks of the request."""
    request = json.load(sys.stdin)
    threading.Thread(target=_end_with, args=(request["parent"],), daemon=True).start()
    with os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8") as events:
        os.dup2(2, 1)

        def tell(**event: Any) -> None:
            events.write(json.dumps(event, allow_nan=False) + "\n")

        _evaluate_all(request, tell)


def _end_with(parent: int) -> None:
    """End this process when its parent is gone, because nobody would read the results."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _evaluate_all(request: Mapping[str, Any], tell: Callable[..., None]) -> None:
    import lmms_eval.evaluator  # noqa: F401  before the sinks: importing it removes all of them
    from lmms_eval import models
    from lmms_eval.tasks import TaskManager
    from loguru import logger

    _refuse_made_up_weights()
    swallowed: list[str] = []
    logger.add(
        lambda message: swallowed.append(message.record["message"]),
        level="ERROR",
        filter=lambda record: _SWALLOWED in record["message"],
    )
    logger.add(sys.stderr, level="WARNING")
    try:
        model = models.get_model(request["model_type"]).create_from_arg_string(
            "", {**request["model_args"], "batch_size": request["batch_size"]}
        )
    except Exception as error:
        tell(event="not loaded", reason=_reason(error))
        raise
    # lmms-eval drops the weights after a task, but here the next task needs them.
    model.clean = lambda: None
    tasks = TaskManager(
        "WARNING", include_path=request["tasks_folder"], model_name=request["model_type"]
    )
    tell(event="loaded", image_backend=_image_backend(model))
    for entry in request["tasks"]:
        tell(event="started", title=entry["title"])
        swallowed.clear()
        started = time.monotonic()
        try:
            result = _evaluate(model, tasks, entry, request)
            if swallowed:
                raise RuntimeError(f"{len(swallowed)} answers could not be made: {swallowed[0]}")
        except Exception as error:
            tell(event="failed", title=entry["title"], reason=_reason(error))
            continue
        result["seconds"] = time.monotonic() - started
        tell(event="finished", title=entry["title"], result=result)


def _refuse_made_up_weights() -> None:
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


def _evaluate(
    model: Any, tasks: Any, entry: Mapping[str, Any], request: Mapping[str, Any]
) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate

    name, metric = entry["task"], entry["metric"]
    task = _load_task(tasks, entry, "simple" if model.is_simple else "chat")
    results = simple_evaluate(
        model=model,
        tasks=[task or name],
        task_manager=tasks,
        limit=entry["limit"],
        batch_size=request["batch_size"],
        bootstrap_iters=0,  # this package computes standard errors from the units
        log_samples=True,
        verbosity="WARNING",
        # Several threads would share one random generator: MMMU guesses if it finds no answer.
        process_docs_parallel=1,
        # Otherwise images are decoded once more to score texts.
        cli_args=Namespace(
            process_with_media=False, output_path=request["work_folder"], log_samples_suffix=""
        ),
    )
    samples = results["samples"].get(name, [])
    _write_answers(samples, entry["answers_path"])
    found = {key: _number(value) for key, value in results["results"].get(name, {}).items()}
    metrics = {
        key: value for key, value in found.items() if value is not None and "_stderr" not in key
    }
    if metric not in metrics:
        raise LookupError(f"the results have no number {metric!r}. {_known(metrics)}")
    answers = {sample["doc_id"]: _answer(sample) for sample in samples}
    asked = results["n-samples"].get(name, {}).get("effective")
    if asked is not None and answers.keys() != set(range(asked)):
        raise RuntimeError(f"{asked} questions were asked, {len(answers)} came back")
    return {
        "score": metrics[metric] * entry["scale"],
        "metrics": metrics,
        "num_samples": len(answers),
        "num_empty": sum(not answer.strip() for answer in answers.values()),
        "units": _unit_scores(task, samples, metric, entry["scale"]),
    }


def _load_task(tasks: Any, entry: Mapping[str, Any], kind: str) -> Any:
    """Return a task with its generation settings; None if the name is that of a group."""
    from lmms_eval.api.task import Task

    name = entry["task"]
    if name not in tasks.all_tasks:
        raise LookupError(f"lmms-eval has no task of this name ({name})")
    task = tasks.load_task_or_group([name], kind).get(name)
    if not isinstance(task, Task):
        if entry["generation"]:
            raise ValueError(f"{name} is a group of tasks, which take no generation settings")
        return None
    if entry["metric"].partition(",")[0] not in task.aggregation():
        raise LookupError(f"no metric {entry['metric']!r}. {_known(task.aggregation())}")
    task.set_config("generation_kwargs", entry["generation"], update=True)
    return task


def _known(metrics: Iterable[str]) -> str:
    return f"The task has: {', '.join(sorted(metrics)) or 'none'}"


def _unit_scores(
    task: Any, samples: Iterable[Mapping[str, Any]], metric: str, scale: float
) -> dict[str, float]:
    """Return the score of each unit: the task's own aggregation of that unit alone.

    A unit is a question, or all questions whose values name the same `unit`. If the aggregation
    cannot be applied to a single unit, the result is empty.
    """
    name = metric.partition(",")[0]
    units: dict[str, list[Any]] = {}
    documents = set()
    for sample in samples:
        if name not in sample or sample["doc_id"] in documents:
            return {}  # a group of tasks, or several filters whose values cannot be told apart
        documents.add(sample["doc_id"])
        value = sample[name]
        unit = value["unit"] if isinstance(value, dict) and "unit" in value else sample["doc_id"]
        units.setdefault(str(unit), []).append(value)
    try:
        aggregate = task.aggregation()[name]
        scores = {unit: _number(aggregate(values)) for unit, values in units.items()}
    except Exception:  # a task's own code may raise anything; its score exists anyway
        return {}
    return {unit: score * scale for unit, score in scores.items() if score is not None}


def _number(value: Any) -> float | None:
    """Return a metric as a number; "12.34%" is 12.34.

    >>> _number("12.34%"), _number(1), _number("N/A")
    (12.34, 1.0, None)
    """
    try:
        number = float(value.removesuffix("%") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        return None
    return number if abs(number) < _LARGEST else None  # NaN is not


def _answer(sample: Mapping[str, Any]) -> str:
    answer = sample["resps"]
    while isinstance(answer, list):
        answer = answer[0] if answer else ""
    return str(answer)


def _write_answers(samples: Iterable[Mapping[str, Any]], path: str) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:  # noqa: PTH123
        for sample in samples:
            kept = {
                key: value
                for key, value in sample.items()
                if key not in ("input_media", "token_counts", "doc_hash")
            }
            file.write(json.dumps(kept, ensure_ascii=False, default=str) + "\n")


def _reason(error: BaseException) -> str:
    """Return in a few lines what went wrong."""
    attempt = getattr(error, "last_attempt", None)  # tenacity's RetryError hides the cause
    if attempt is not None and attempt.exception() is not None:
        error = attempt.exception()
    text = str(error).strip() or type(error).__name__
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    reason = f"{type(error).__name__}: " + "\n".join(lines[:6])[:1500]
    # File names may have bytes that are not valid text.
    return reason.encode("utf-8", "backslashreplace").decode()


def _image_backend(model: Any) -> str:
    """Return which library prepares images, because pixels differ slightly between them."""
    processor = getattr(model, "_image_processor", getattr(model, "processor", None))
    kind = type(getattr(processor, "image_processor", processor)).__name__
    return "pil" if kind.endswith("Pil") else f"torchvision ({kind})"


if __name__ == "__main__":
    main()
