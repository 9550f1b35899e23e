"""lm-eval in the process of one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
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

_NOT_KEPT = ("doc_hash", "prompt_hash", "target_hash")


class Worker:
    """lm-eval: its tasks, and the model once it is loaded."""

    def __init__(self, request: Mapping[str, Any]) -> None:
        from lm_eval.tasks import TaskManager

        _find_data_beside_tasks()
        self._request = request
        folder, wanted = request["tasks_folder"], [entry["task"] for entry in request["tasks"]]
        self._tasks = TaskManager(include_path=folder, include_defaults=False)
        if not all(_is_whole(name, self._tasks.task_index) for name in wanted):
            self._tasks = TaskManager(include_path=folder)  # with lm-eval's own 14,000, in seconds

    def check(self, entry: Mapping[str, Any]) -> None:
        """Raise LookupError if there is no such task or group."""
        name, tasks = entry["task"], self._tasks
        if name in tasks.all_tags:
            members = sorted(tasks.task_index[name].tags)
            raise LookupError(
                f"{name} is a tag of lm-eval for {len(members)} tasks, without a score of its own. "
                f"Name the tasks: {', '.join(members[:10])}{', …' if len(members) > 10 else ''}"
            )
        if name not in tasks.all_tasks:
            raise no_such_task("lm-eval", name, tasks.all_tasks)

    def load(self) -> str:
        """Load the model."""
        from lm_eval.api.registry import get_model

        request = self._request
        name = request["model_type"]
        model_class = _hf_8bit() if name == "hf_8bit" else get_model(name)
        self._model: Any = None  # that of the trial before, if a search goes on with another
        self._model = model_class.create_from_arg_obj(
            dict(request["model_args"]), {"batch_size": request["batch_size"]}
        )
        return ""

    def evaluate(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Ask a task's questions; return its numbers and the units' scores."""
        from lm_eval.evaluator import simple_evaluate

        request, name = self._request, entry["task"]
        loaded = self._tasks.load([name])
        tasks = loaded["tasks"]
        wanted = entry.get("questions")
        if "questions" in entry and name not in tasks:
            raise ValueError(f"{name} is a group of tasks: name the tasks to search by")
        chosen = None if wanted is None else documents_of(wanted)
        for task in tasks.values():
            _check_examples(task, entry["num_fewshot"])
        results = simple_evaluate(
            model=self._model,
            tasks=[loaded["groups"].get(name) or tasks[name]],
            task_manager=self._tasks,
            num_fewshot=entry["num_fewshot"],
            limit=entry["limit"] if chosen is None else None,
            samples=None if chosen is None else {name: chosen},
            batch_size=request["batch_size"],
            bootstrap_iters=0,  # this package computes standard errors from the units
            gen_kwargs=dict(entry["generation"]) or None,
            apply_chat_template=request["apply_chat_template"],
            system_instruction=request["system_instruction"],
            fewshot_as_multiturn=request["fewshot_as_multiturn"],
            confirm_run_unsafe_code=request["confirm_run_unsafe_code"],
        )
        for task in tasks:
            _refuse_no_numbers(results["samples"][task])
        metrics = {
            key: value
            for key, found in results["results"].get(name, {}).items()
            if "," in key and "_stderr," not in key and (value := number(found)) is not None
        }
        if entry["metric"] not in metrics:
            raise LookupError(f"the results have no number {entry['metric']!r}. {known(metrics)}")
        metric, _, filtered = entry["metric"].partition(",")
        samples = {
            task: [sample for sample in results["samples"][task] if sample["filter"] == filtered]
            for task in tasks
        }
        for task, answered in samples.items():
            asked = chosen or range(_asked(tasks[task], entry["limit"]))
            if {sample["doc_id"] for sample in answered} != set(asked):
                raise RuntimeError(f"{len(asked)} questions were asked, {len(answered)} came back")
        write_answers(
            ({"task": task, **sample} for task, given in samples.items() for sample in given),
            entry["answers_path"],
            without=_NOT_KEPT,
        )
        given = [(tasks[task], sample) for task in samples for sample in samples[task]]
        score = metrics[entry["metric"]] * entry["scale"]
        return {
            "score": score,
            "metrics": metrics,
            "num_samples": len(given),
            "num_empty": sum(
                task.OUTPUT_TYPE == "generate_until" and not answer_of(sample).strip()
                for task, sample in given
            ),
            "units": {
                unit if name in tasks else f"{task}/{unit}": value * entry["scale"]
                for task in tasks
                for unit, value in _units(tasks[task], samples[task], metric).items()
            },
            **(
                {"questions": _questions(tasks[name], samples[name], entry)}
                if "questions" in entry
                else {}
            ),
            "lower_is_better": any(
                task.higher_is_better().get(metric) is False for task in tasks.values()
            ),
        }


def _is_whole(name: str, index: Mapping[str, Any]) -> bool:
    """Return whether an index has a task, or a group with all its tasks."""
    if name not in index:
        return False
    members = (index[name].cfg or {}).get("task")
    return not isinstance(members, list) or all(
        _is_whole(member if isinstance(member, str) else member.get("task", ""), index)
        for member in members
    )


def _find_data_beside_tasks() -> None:
    """Let lm-eval look for a task's data files beside its YAML file first, as lmms-eval does."""
    from lm_eval.api.task import ConfigurableTask

    download = ConfigurableTask.download

    def download_beside(self: Any, dataset_kwargs: Any = None, **options: Any) -> None:
        source = (self.config.metadata or {}).get("config_source")
        files = (dataset_kwargs or {}).get("data_files")
        if source and files:
            found = _beside(files, Path(source).parent)
            dataset_kwargs = {**dataset_kwargs, "data_files": found}
        download(self, dataset_kwargs, **options)

    ConfigurableTask.download = download_beside


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, Mapping):
        return {split: _beside(names, folder) for split, names in files.items()}
    if isinstance(files, list):
        return [_beside(name, folder) for name in files]
    return str(folder / files) if (folder / files).is_file() else files


def _hf_8bit() -> Any:
    """Return lm-eval's class for transformers, loading in 8 bit by bitsandbytes."""
    from lm_eval.models.huggingface import HFLM
    from transformers import BitsAndBytesConfig

    class Loaded8Bit(HFLM):  # type: ignore[misc]
        def _create_model(self, *arguments: Any, **options: Any) -> None:
            options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
            super()._create_model(*arguments, **options)

    return Loaded8Bit


def _check_examples(task: Any, asked: int | None) -> None:
    """Refuse numbers of examples that lm-eval would leave out, or take from the questions asked."""
    if not asked:
        return
    name = task.task_name
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise ValueError(f"{name} scores whole texts, without examples: set its num_fewshot to 0")
    if task.config.num_fewshot == 0:
        raise ValueError(
            f"{name} is asked without examples by its own file, which lm-eval obeys: set its "
            "num_fewshot to 0"
        )
    config = getattr(task, "fewshot_cfg", None)  # a task that is a class has none
    named = config is not None and (config.split or config.samples)
    if not (named or task.has_training_docs() or task.has_validation_docs()):
        raise ValueError(
            f"{name} has no examples to show: it names no fewshot_split, training_split or "
            "validation_split, and lm-eval would take the questions of the test with their answers"
        )
    sampler = getattr(task, "sampler", None)
    if sampler is not None and len(sampler.df) < asked:
        raise ValueError(f"{name} has {len(sampler.df)} examples to show, not {asked}")


def _asked(task: Any, limit: int | None) -> int:
    num_questions = len(task.eval_docs)
    return num_questions if limit is None else min(limit, num_questions)


def _refuse_no_numbers(samples: Sequence[Mapping[str, Any]]) -> None:
    """Refuse likelihoods that are no numbers: lm-eval takes the first choice for the likeliest."""
    broken = sum(any(map(math.isnan, _numbers(sample["resps"]))) for sample in samples)
    if broken:
        raise ArithmeticError(
            f"the model's likelihoods are no numbers (NaN) in {broken} of {len(samples)} answers"
        )


def _numbers(value: Any) -> Iterable[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner)


def _units(task: Any, samples: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Return each unit's score, or what it contributes to a ratio of sums."""
    from lm_eval.api import metrics

    aggregate = task.aggregation().get(name, metrics.mean)
    of_ratio: dict[Callable[..., float], Callable[[float], tuple[float, float]]] = {
        # The score and its derivative by the negative mean likelihood.
        metrics.bits_per_byte: lambda nats: (nats / math.log(2), 1 / math.log(2)),
        metrics.weighted_perplexity: lambda nats: (math.exp(nats), math.exp(nats)),
        metrics.perplexity: lambda nats: (math.exp(nats), math.exp(nats)),
    }
    if aggregate not in of_ratio:
        return unit_scores(samples, name, aggregate)
    pairs = [value if isinstance(value := s[name], tuple) else (value, 1) for s in samples]
    return dict(
        zip(
            (str(sample["doc_id"]) for sample in samples),
            _contributions(pairs, of_ratio[aggregate]),
            strict=True,
        )
    )


def _questions(
    task: Any, samples: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]
) -> dict[str, float]:
    """Return the score of each question alone, such as the bits per byte of each text."""
    from lm_eval.api import metrics

    metric = entry["metric"].partition(",")[0]
    scores = question_scores(samples, metric, task.aggregation().get(metric, metrics.mean))
    return {name: score * entry["scale"] for name, score in scores.items()}


def _contributions(
    pairs: Sequence[tuple[float, float]], score: Callable[[float], tuple[float, float]]
) -> list[float]:
    """Return u_i = s + s' (n_i − r w_i) / w̄, where r = Σ n / Σ w and s is the score of r.

    Their mean is s, and their standard error that of s by the delta method; differences of two
    models' are those of the difference.

    Args:
        pairs: the log-likelihood −n_i and the weight w_i (bytes, words) of each text.
        score: the score of a ratio and its derivative.

    >>> _contributions([(-2.0, 1), (-6.0, 3)], lambda ratio: (ratio, 1.0))
    [2.0, 2.0]
    """
    weight = sum(weight for _, weight in pairs)
    ratio = -sum(likelihood for likelihood, _ in pairs) / weight
    value, slope = score(ratio)
    mean_weight = weight / len(pairs)
    return [value + slope * (-nats - ratio * w) / mean_weight for nats, w in pairs]
