"""What the process of a harness is asked, and what a suite needs besides."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outliermerge.errors import SpecError
from outliermerge.evaluation.model_types import model_arguments
from outliermerge.evaluation.suite import Suite, SuiteTask

# How lm_eval asks all tasks of a suite.
HOW_ASKED = ("apply_chat_template", "system_instruction", "fewshot_as_multiturn")


def request_of(
    suite: Suite,
    tasks: Sequence[SuiteTask],
    *,
    path: Path,
    device: str,
    dtype: str,
    work_folder: Path,
    answers: Mapping[str, Path],
) -> dict[str, Any]:
    """Return what a worker is sent.

    Args:
        path: the model's folder.
        answers: by title of a task the file for the answers.
    """
    name, arguments = model_arguments(
        suite.model_type,
        path=str(path),
        device=device,
        dtype=dtype,
        load_in_8bit=suite.document.load_in_8bit,
        extra=suite.document.model_args,
        harness=suite.document.harness,
    )
    return {
        "worker": suite.harness.worker,
        "model_type": name,
        "model_args": arguments,
        "batch_size": "auto" if suite.kind.own_batches else suite.document.batch_size,
        **{key: getattr(suite.document, key) for key in (*HOW_ASKED, "confirm_run_unsafe_code")},
        "tasks_folder": str(suite.tasks_folder) if suite.tasks_folder else None,
        "work_folder": str(work_folder),
        "tasks": [
            {
                "title": task.title,
                "task": task.task,
                "metric": task.metric,
                "scale": task.scale,
                "limit": suite.limit_of(task),
                "generation": suite.generation_of(task),
                "num_fewshot": suite.shots_of(task),
                "answers_path": str(answers[task.title]),
            }
            for task in tasks
        ],
    }


def environment_of(suite: Suite, device: str, threads: int) -> dict[str, str]:
    """Return the variables that a worker is started with."""
    environment = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if device == "cpu":
        # Without this setting, one run was ten times slower on a busy machine.
        environment["OMP_NUM_THREADS"] = str(threads)
    if suite.document.confirm_run_unsafe_code:
        environment["HF_ALLOW_CODE_EVAL"] = "1"  # the metric of such tasks asks for it
    return environment


def dtype_of(suite: Suite, device: str) -> str:
    """Return the dtype that a model is loaded in."""
    dtype = suite.document.dtype
    is_slow = dtype == "auto" and device == "cpu" and suite.kind.takes_dtype
    return "float32" if is_slow else dtype


def check_judge(suite: Suite) -> None:
    """Refuse a suite that needs a judge, where none is named.

    Raises:
        SpecError: none is.
    """
    if os.environ.get("API_TYPE") == "dummy":
        raise SpecError("API_TYPE=dummy makes lmms-eval's judge invent scores: unset it")
    if suite.document.judge and not (
        os.environ.get("OPENAI_API_KEY")
        or (os.environ.get("API_TYPE") == "local" and os.environ.get("LLM_JUDGE_URL"))
    ):
        raise SpecError(
            f"the suite {suite.name} needs a judge: set OPENAI_API_KEY (and OPENAI_API_URL, "
            "MODEL_VERSION where they are not OpenAI's), or API_TYPE=local and LLM_JUDGE_URL"
        )
