"""lmms-eval in the process of one model."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from outliermerge.evaluation.worker_results import (
    answer_of,
    documents_of,
    known,
    no_such_task,
    number,
    question_scores,
    unit_scores,
    write_answers,
)

# If generation fails, llava_hf answers with an empty text and continues.
_SWALLOWED = "in generating"
_NOT_KEPT = ("input_media", "token_counts", "doc_hash")


class Worker:
    """lmms-eval: its tasks, and the model once it is loaded."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        import lmms_eval.evaluator  # noqa: F401  before the sinks: importing it removes all of them
        from lmms_eval.tasks import TaskManager
        from loguru import logger

        self._request = request
        self._swallowed: list[str] = []
        logger.add(
            lambda message: self._swallowed.append(message.record["message"]),
            level="ERROR",
            filter=lambda record: _SWALLOWED in record["message"],
        )
        logger.add(sys.stderr, level="WARNING")
        self._tasks = TaskManager(
            "WARNING", include_path=request["tasks_folder"], model_name=request["model_type"]
        )

    def check(self, entry: Mapping[str, Any]) -> None:
        """Raise LookupError if there is no such task."""
        name = entry["task"]
        if name not in self._tasks.all_tasks:
            raise no_such_task("lmms-eval", name, self._tasks.all_tasks)

    def load(self) -> str:
        """Load the model; return the library that prepares images."""
        from lmms_eval import models

        request = self._request
        self._model: Any = None  # that of the trial before, if a search goes on with another
        self._model = models.get_model(request["model_type"]).create_from_arg_string(
            "", {**request["model_args"], "batch_size": request["batch_size"]}
        )
        # lmms-eval drops the weights after a task, but here the next task needs them.
        self._model.clean = lambda: None
        return _image_backend(self._model)

    def evaluate(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Ask a task's questions; return its numbers and the units' scores."""
        from lmms_eval.evaluator import simple_evaluate

        self._swallowed.clear()
        name, metric = entry["task"], entry["metric"]
        task, wanted = self._load_task(entry), entry.get("questions")
        with _only(None if wanted is None else documents_of(wanted)):
            results = simple_evaluate(
                model=self._model,
                tasks=[task or name],
                task_manager=self._tasks,
                limit=entry["limit"],
                batch_size=self._request["batch_size"],
                bootstrap_iters=0,  # this package computes standard errors from the units
                log_samples=True,
                verbosity="WARNING",
                # Several threads would share one random generator: MMMU guesses if it finds no
                # answer.
                process_docs_parallel=1,
                # Otherwise images are decoded once more to score texts.
                cli_args=Namespace(
                    process_with_media=False,
                    output_path=self._request["work_folder"],
                    log_samples_suffix="",
                ),
            )
        samples = results["samples"].get(name, [])
        write_answers(samples, entry["answers_path"], without=_NOT_KEPT)
        found = {key: number(value) for key, value in results["results"].get(name, {}).items()}
        metrics = {
            key: value for key, value in found.items() if value is not None and "_stderr" not in key
        }
        if metric not in metrics:
            raise LookupError(f"the results have no number {metric!r}. {known(metrics)}")
        answers = {sample["doc_id"]: answer_of(sample) for sample in samples}
        asked = results["n-samples"].get(name, {}).get("effective")
        expected: Sequence[int] | None = None if asked is None else range(asked)
        if wanted is not None:
            expected = documents_of(wanted)
        if expected is not None and answers.keys() != set(expected):
            raise RuntimeError(f"{len(expected)} questions were asked, {len(answers)} came back")
        if self._swallowed:
            first = self._swallowed[0]
            raise RuntimeError(f"{len(self._swallowed)} answers could not be made: {first}")
        return {
            "score": metrics[metric] * entry["scale"],
            "metrics": metrics,
            "num_samples": len(answers),
            "num_empty": sum(not answer.strip() for answer in answers.values()),
            "units": _units(task, samples, metric, entry["scale"]),
            **({"questions": _questions(task, samples, entry)} if "questions" in entry else {}),
            "lower_is_better": task is not None and _is_loss(task, metric),
        }

    def _load_task(self, entry: Mapping[str, Any]) -> Any:
        """Return a task with its generation settings; None if the name is that of a group."""
        from lmms_eval.api.task import Task

        name = entry["task"]
        kind = "simple" if self._model.is_simple else "chat"
        task = self._tasks.load_task_or_group([name], kind).get(name)
        if not isinstance(task, Task):
            if entry["generation"]:
                raise ValueError(f"{name} is a group of tasks, which take no generation settings")
            return None
        if entry["metric"].partition(",")[0] not in task.aggregation():
            raise LookupError(f"no metric {entry['metric']!r}. {known(task.aggregation())}")
        task.set_config("generation_kwargs", entry["generation"], update=True)
        return task


def _units(
    task: Any, samples: Iterable[Mapping[str, Any]], metric: str, scale: float
) -> dict[str, float]:
    if task is None:  # a group
        return {}
    name = metric.partition(",")[0]
    aggregate = task.aggregation()[name]
    return {unit: score * scale for unit, score in unit_scores(samples, name, aggregate).items()}


def _questions(
    task: Any, samples: Iterable[Mapping[str, Any]], entry: Mapping[str, Any]
) -> dict[str, float]:
    if task is None:
        raise ValueError(f"{entry['task']} is a group of tasks: name the tasks to search by")
    name = entry["metric"].partition(",")[0]
    scores = question_scores(samples, name, task.aggregation()[name])
    return {question: score * entry["scale"] for question, score in scores.items()}


@contextmanager
def _only(documents: Sequence[int] | None) -> Iterator[None]:
    """Let lmms-eval, which has no such option, go through some documents only; None for all."""
    from lmms_eval import evaluator, utils

    if documents is None:
        yield
        return
    made, wanted = utils.create_iterator, frozenset(documents)

    def create_iterator(raw: Iterable[Any], *arguments: Any, **options: Any) -> Iterator[Any]:
        for one in made(raw, *arguments, **options):
            if (one if isinstance(one, int) else one[0]) in wanted:
                yield one

    utils.create_iterator = evaluator.create_iterator = create_iterator
    try:
        yield
    finally:
        utils.create_iterator = evaluator.create_iterator = made


def _is_loss(task: Any, metric: str) -> bool:
    return task.higher_is_better().get(metric.partition(",")[0]) is False


def _image_backend(model: Any) -> str:
    """Return which library prepares images, because pixels differ slightly between them."""
    processor = getattr(model, "_image_processor", getattr(model, "processor", None))
    if processor is None:  # internvl2
        return "torchvision"
    kind = type(getattr(processor, "image_processor", processor)).__name__
    return "pil" if kind.endswith("Pil") else f"torchvision ({kind})"
