"""Searches: merges with values that a sampler chooses, scored question by question."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outliermerge.api import plan
from outliermerge.errors import ArgumentError, OutlierMergeError, argument, shown
from outliermerge.output.names import as_local
from outliermerge.output.options import RunOptions
from outliermerge.search.ledger import Ledger
from outliermerge.search.parents import parents_of
from outliermerge.search.questions import Sample, mean_of, sample
from outliermerge.search.result import DEFAULTS, Candidate, Found, make_rows, mean
from outliermerge.search.samplers import SAMPLERS, check_sampler, grid_points, make_sampler
from outliermerge.search.scorer import Scorer
from outliermerge.search.space import Ask, Space
from outliermerge.search.space_check import check_space
from outliermerge.search.strategies import STRATEGIES, Drawn, GreedySoup, Prune, Strategy
from outliermerge.search.trials import Running, Trial, Trials, exclusive
from outliermerge.search.workplace import Workplace
from outliermerge.spec.check import MergeSpec
from outliermerge.storage.failures import naming
from outliermerge.storage.files import load_json, write_whole

SETTINGS_NAME, RESULT_NAME, TABLE_NAME, BEST_NAME = (
    "search.json", "result.json", "search.md", "best.yaml",
)  # fmt: skip
NUM_CONFIRMED = 3
_MOST_FAILURES = 5  # before the first trial with a score


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a search is to do.

    Attributes:
        trials: how many merges are tried.
        sampler: what chooses their values.
        seed: of the sampler, and of which questions are asked.
        questions: how many questions of each task a trial is asked.
        strategy: `sampler`, `greedy-soup` or `prune`.
    """

    trials: int = 30
    sampler: str = "tpe"
    seed: int = 0
    questions: int = 100
    strategy: str = "sampler"

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


class Listener:
    """Callbacks for events of a search. These do nothing."""

    def asking(self, name: str) -> None:
        """A model that is known before the search is asked all questions."""

    def begun(self, questions: Sample, *, in_memory: bool) -> None:
        """The questions are chosen."""

    def trial(self, trial: Trial, most: int) -> None:
        """A trial is over."""

    def confirming(self, name: str) -> None:
        """A trial is asked the questions that were held out."""


def search(
    spec: MergeSpec,
    space: Space | None,
    scorer: Scorer,
    *,
    output: str | Path,
    wanted: Wanted,
    options: RunOptions | None = None,
    listener: Listener | None = None,
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
    settings = {
        "spec": document,
        "space": space.text if space else "",
        "strategy": wanted.strategy,
        "scorer": dict(scorer.identity()),
        "sampler": wanted.sampler,
        "seed": wanted.seed,
        "questions": wanted.questions,
        "files": _stamps(spec),
    }
    _check_same(folder, settings)
    with ExitStack() as stack:
        stack.callback(scorer.close)
        workplace = stack.enter_context(Workplace(folder / "work", chosen))
        ledger = Ledger(folder / "scores", workplace, scorer)
        known, notes = _ask_known(spec, ledger, scorer, folder, listener)
        questions = sample(
            [each.answers for each in known], number=wanted.questions, seed=wanted.seed
        )
        tasks_apart = wanted.sampler == "nsga2" and len(questions.asked) > 1
        trials = Trials(folder, len(questions.asked) if tasks_apart else 1)
        stack.callback(trials.close)
        listener.begun(questions, in_memory=workplace.is_in_memory(plan(spec)))
        if strategy.in_order:  # then one process at a time
            stack.enter_context(exclusive(folder / "work" / "order.lock"))
        strategy.begin(known, questions)
        sampler = make_sampler(wanted.sampler, wanted.seed, points)
        while (values := strategy.follow(trials.all())) is not None:
            if (running := trials.next(strategy.most, sampler, values or None)) is None:
                break
            _try(running, document, strategy, ledger, questions, apart=tasks_apart)
            everyone = trials.all()
            listener.trial(everyone[running.number - 1], strategy.most)
            _refuse_hopeless(everyone)
        trials.wait()
        with exclusive(folder / "work" / "result.lock"):
            found = _confirm(
                trials, known, document, strategy, ledger, questions,
                listener=listener, settings=settings, notes=notes, apart=tasks_apart,
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


def _stamps(spec: MergeSpec) -> list[list[Any]]:
    """Return the models' files as they are, by which a changed model is known."""
    found = plan(spec).files
    return [
        [str(path), stamp.num_bytes, stamp.mtime_ns] for path, stamp in found if stamp is not None
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


def _ask_known(
    spec: MergeSpec, ledger: Ledger, scorer: Scorer, folder: Path, listener: Listener
) -> tuple[list[Candidate], list[str]]:
    """Ask the parents and the spec as it is all questions."""
    documents, notes = dict(parents_of(spec)), list[str]()
    known: list[Candidate] = []
    with exclusive(folder / "work" / "known.lock"):
        if scorer.learns:
            base = spec.base.reference if spec.base else None
            for name, document in documents.items():
                if document["models"][0]["model"] != base:
                    scorer.learn(name, ledger.merge(document))
        for name, document in documents.items():
            listener.asking(name)
            try:
                answers = ledger.ask(document, None)
            except OutlierMergeError as error:
                notes.append(f"{name} is not in the table: it has no scores by itself: {error}")
                continue
            known.append(Candidate(name, "parent", document, answers))
        listener.asking(DEFAULTS)
        document = spec.as_dict()
        known.append(Candidate(DEFAULTS, "defaults", document, ledger.ask(document, None)))
    return known, notes


def _try(
    running: Running,
    spec: Mapping[str, Any],
    strategy: Strategy,
    ledger: Ledger,
    questions: Sample,
    *,
    apart: bool,
) -> None:
    """Merge and score a trial; one that is hopeless is stopped after a part of the questions."""
    document = strategy.build(spec, running.ask)
    is_stopped_early = not (apart or strategy.in_order)
    steps = questions.shares() if is_stopped_early else questions.shares()[-1:]
    try:
        for number, step in enumerate(steps):
            tasks = questions.estimate(ledger.ask(document, step), step)
            is_last = step is steps[-1]
            if is_stopped_early and running.is_hopeless(mean(tasks), number) and not is_last:
                running.stopped()
                return
    except OutlierMergeError as error:
        running.failed(str(error))
        return
    running.done(list(tasks.values()) if apart else [mean(tasks)])


def _refuse_hopeless(trials: Sequence[Trial]) -> None:
    """Stop a search of which nothing comes."""
    failed = [trial for trial in trials if trial.state == "failed"]
    if len(failed) >= _MOST_FAILURES and not any(trial.steps or trial.values for trial in trials):
        raise OutlierMergeError(
            f"the first {len(failed)} trials failed. The last of them: {failed[-1].reason}"
        )


def _confirm(
    trials: Trials,
    known: Sequence[Candidate],
    spec: Mapping[str, Any],
    strategy: Strategy,
    ledger: Ledger,
    questions: Sample,
    *,
    listener: Listener,
    settings: Mapping[str, Any],
    notes: Sequence[str],
    apart: bool,
) -> Found:
    """Ask the best trials all questions, and choose the winner by those of the search."""
    everyone = trials.all()
    done = sorted((t for t in everyone if t.values), key=lambda t: (-sum(t.values), t.number))
    candidates: dict[str, Candidate] = {}
    everything = {
        task: [*own, *questions.held_out[task]] for task, own in questions.searched.items()
    }
    for trial in done:
        if len(candidates) == NUM_CONFIRMED:
            break
        document = strategy.build(spec, _answering(trial.point))
        if any(document == other.document for other in candidates.values()):
            continue
        name = f"trial {trial.number}"
        listener.confirming(name)
        answers = ledger.ask(document, everything)
        candidates[name] = Candidate(name, "trial", document, answers, trial.point)
    *parents, defaults = known

    def searched(candidate: Candidate) -> float:
        return mean(mean_of(candidate.answers, questions.searched))

    ordered = sorted(candidates.values(), key=searched, reverse=True)
    best = max([defaults, *ordered], key=searched)
    failed = [trial for trial in everyone if trial.state == "failed"]
    reasons = [f"trial {trial.number} failed: {trial.reason}" for trial in failed[:3]]
    more = [f"{len(failed) - 3} more failed"] if len(failed) > 3 else []
    return Found(
        rows=tuple(make_rows([*parents, defaults, *ordered], questions)),
        best=best.name,
        document=best.document,
        checksum=ledger.checksum(best.document),
        questions={
            task: {
                "asked": len(asked),
                "searched": len(questions.searched[task]),
                "held_out": len(questions.held_out[task]),
            }
            for task, asked in questions.asked.items()
        },
        trials=tuple(everyone),
        front=tuple(trials.front()) if apart else (),
        settings=settings,
        notes=(*notes, *reasons, *more),
    )


def _answering(point: Mapping[str, Any]) -> Ask:
    return lambda dimension: point[dimension.name]


def _write(found: Found, folder: Path) -> None:
    """Write the files of a result."""
    text = json.dumps(found.as_dict(), indent=1, ensure_ascii=False, default=str)
    for name, content in (
        (RESULT_NAME, text + "\n"),
        (TABLE_NAME, found.as_markdown() + "\n"),
        (BEST_NAME, found.best_yaml()),
    ):
        write_whole(folder / name, content.encode("utf-8", "backslashreplace"))
