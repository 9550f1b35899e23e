"""Searches: merges with values that a sampler chooses, scored question by question."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.api import plan
from outliermerge.errors import ArgumentError, argument, shown
from outliermerge.output.names import as_local
from outliermerge.output.options import RunOptions
from outliermerge.planning.plan import Plan
from outliermerge.search.asking import Executor, Here
from outliermerge.search.ledger import Ledger
from outliermerge.search.on_ray import Cluster, OnRay
from outliermerge.search.phases import Listener, Trying, ask_known, confirm
from outliermerge.search.questions import sample
from outliermerge.search.result import Found
from outliermerge.search.samplers import SAMPLERS, check_sampler, grid_points, make_sampler
from outliermerge.search.scorer import Scorer
from outliermerge.search.space import Space
from outliermerge.search.space_check import check_space
from outliermerge.search.strategies import STRATEGIES, Drawn, GreedySoup, Prune, Strategy
from outliermerge.search.trials import Trials, exclusive
from outliermerge.search.workplace import Workplace
from outliermerge.spec.check import MergeSpec
from outliermerge.storage.failures import naming
from outliermerge.storage.files import load_json, write_whole

SETTINGS_NAME, RESULT_NAME, TABLE_NAME, BEST_NAME = (
    "search.json", "result.json", "search.md", "best.yaml",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a search is to do.

    Attributes:
        trials: how many merges are tried.
        sampler: what chooses their values.
        seed: of the sampler, and of which questions are asked.
        questions: how many questions of each task a trial is asked.
        strategy: `sampler`, `greedy-soup` or `prune`.
        trial_seconds: that a trial may take before it is stopped; None for as long as it takes.
    """

    trials: int = 30
    sampler: str = "tpe"
    seed: int = 0
    questions: int = 100
    strategy: str = "sampler"
    trial_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ArgumentError(
                f"{argument('sampler')}: found {shown(self.sampler)}, expected one of "
                f"{', '.join(SAMPLERS)}"
            )
        if self.strategy not in STRATEGIES:
            raise ArgumentError(
                f"{argument('strategy')}: found {shown(self.strategy)}, expected one of "
                f"{', '.join(STRATEGIES)}"
            )


def search(
    spec: MergeSpec,
    space: Space | None,
    scorer: Scorer,
    *,
    output: str | Path,
    wanted: Wanted,
    options: RunOptions | None = None,
    listener: Listener | None = None,
    cluster: Cluster | None = None,
) -> Found:
    """Search the settings of a merge, and write what was found.

    The parents and the spec as it is are asked all questions first. A half of the questions is held
    out; of the other half a part that tells models apart is asked of each trial. The best trials
    are then asked all, and the winner is chosen by the half that was searched.

    Args:
        spec: the merge.
        space: what varies; None for a strategy other than "sampler".
        scorer: scores merges.
        output: the folder for the result; a search that is there goes on.
        wanted: what to do.
        options: how merges are carried out.
        listener: its methods are called at each event.
        cluster: where merges are made and scored, if not in this process.

    Raises:
        SpecError: a key or value of the space is wrong.
        ArgumentError: the search in the folder is another one, or the sampler cannot do this.
        OutlierMergeError: a model cannot be merged or scored.
    """
    document = spec.as_dict()
    strategy, points = _strategy(spec, space, wanted)
    folder = as_local(output, "a search is written to a folder").absolute()
    with naming(folder, "made"):
        (folder / "work").mkdir(parents=True, exist_ok=True)
    chosen, listener = options or RunOptions(), listener or Listener()
    planned = plan(spec)
    settings = {
        "spec": document,
        "space": space.text if space else "",
        "strategy": wanted.strategy,
        "scorer": dict(scorer.identity()),
        "sampler": wanted.sampler,
        "seed": wanted.seed,
        "questions": wanted.questions,
        "files": _stamps(planned),
    }
    _check_same(folder, settings)
    with ExitStack() as stack:
        stack.callback(scorer.close)
        ledger = Ledger(folder / "scores")
        executor: Executor
        if cluster is None:
            workplace = stack.enter_context(Workplace(folder / "work", chosen))
            executor = Here(ledger, workplace, scorer)
        else:
            on_ray = OnRay(cluster, ledger, planned, chosen, folder / "work", scorer.device)
            executor = stack.enter_context(on_ray)
        known, notes = ask_known(spec, executor, ledger, scorer, folder, listener)
        questions = sample(
            [each.answers for each in known],
            number=wanted.questions,
            seed=wanted.seed,
            suites=scorer.suites,
        )
        num_objectives = len(questions.objectives(dict.fromkeys(questions.asked, 0.0)))
        apart = wanted.sampler == "nsga2" and num_objectives > 1
        trials = Trials(folder, num_objectives if apart else 1)
        stack.callback(trials.close)
        listener.begun(questions, where=executor.where(planned))
        if strategy.in_order:  # then one process at a time
            stack.enter_context(exclusive(folder / "work" / "order.lock"))
        strategy.begin(known, questions)
        trying = Trying(
            document, strategy, trials, ledger, questions, listener,
            apart=apart, seconds=wanted.trial_seconds,
        )  # fmt: skip
        sampler = make_sampler(wanted.sampler, wanted.seed, points)
        executor.run(trying.requests(sampler), trying.take, in_order=strategy.in_order)
        trials.wait()
        with exclusive(folder / "work" / "result.lock"):
            found = confirm(
                trials, known, document, strategy, executor, ledger, questions,
                listener=listener, settings=settings, notes=notes, apart=apart,
            )  # fmt: skip
            _write(found, folder)
    return found


def _strategy(
    spec: MergeSpec, space: Space | None, wanted: Wanted
) -> tuple[Strategy, list[dict[str, Any]]]:
    """Return what chooses the trials, and the points of a grid."""
    document = spec.as_dict()
    if wanted.strategy != "sampler":
        if space is not None:
            raise ArgumentError(
                f"{argument('space')}: {wanted.strategy} chooses what it tries: leave it out"
            )
        if wanted.strategy == "prune":
            return Prune(document, plan(spec), wanted.trials), []
        return GreedySoup(document), []
    if space is None:
        raise ArgumentError(f"{argument('space')}: name the file of what is searched")
    check_space(space, document)
    points = grid_points(lambda ask: space.build(document, ask)) if wanted.sampler == "grid" else []
    check_sampler(
        wanted.sampler,
        [space.dimensions(document, methods) for methods in space.combinations(document)],
    )
    return Drawn(space, min(wanted.trials, len(points)) if points else wanted.trials), points


def _stamps(planned: Plan) -> list[list[Any]]:
    """Return the models' files as they are, by which a changed model is known."""
    return [
        [str(path), stamp.num_bytes, stamp.mtime_ns]
        for path, stamp in planned.files
        if stamp is not None
    ]


def _check_same(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a folder with another search; note the settings of a new one."""
    path = folder / SETTINGS_NAME
    plain = json.loads(json.dumps(settings, default=str))
    if (found := load_json(path)) is None:
        write_whole(path, (json.dumps(plain, indent=1, ensure_ascii=False) + "\n").encode())
        return
    changed = [key for key in plain if not isinstance(found, dict) or found.get(key) != plain[key]]
    if changed:
        raise ArgumentError(
            f"{folder}: holds a search with other settings: {', '.join(changed)} changed since. "
            f"Name another folder by {argument('output')}, or remove this one"
        )


def _write(found: Found, folder: Path) -> None:
    """Write the files of a result."""
    text = json.dumps(found.as_dict(), indent=1, ensure_ascii=False, default=str)
    for name, content in (
        (RESULT_NAME, text + "\n"),
        (TABLE_NAME, found.as_markdown() + "\n"),
        (BEST_NAME, found.best_yaml()),
    ):
        write_whole(folder / name, content.encode("utf-8", "backslashreplace"))
