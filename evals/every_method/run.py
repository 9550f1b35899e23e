"""Every method on two small families: the LLaVA of evals/family, and a CLIP that it trains.

    python evals/every_method/run.py [--seeds 1 2 3] [--family clip] [--only adamerging]

What was trained, merged and scored is kept in the user's cache; what was stopped goes on where it
was. Writes results.json and table.md. With --only, other rows stay as they are in results.json, if
the plain average scores there as here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import transformers

import outliermerge
from evals.every_method import by_files
from evals.every_method.clip import Clip
from evals.every_method.llava import Llava
from evals.evidence.methods import LEFT_OUT, SPACES, candidates, merged, methods_of
from evals.evidence.packages import cache, versions
from evals.evidence.results import AVERAGE, _examples, _row
from evals.evidence.run import Seed
from evals.evidence.training import Family, State, Statistics

RESULTS, TABLE = Path(__file__).with_name("results.json"), Path(__file__).with_name("table.md")
FAMILIES: dict[str, Family] = {family.name: family for family in (Llava(), Clip())}
TITLES = {"llava": "LLaVA", "clip": "CLIP"}
SIZE = 2  # models of a merge
METHODS = [*methods_of(SIZE), *LEFT_OUT]  # what the study leaves out for its time is quick here
SPACES_OF = SPACES | by_files.SPACES


class Small(Seed):
    """One seed of a family of two task models, measured by `outliermerge measure`."""

    def measured(self, task: str, distance: str) -> Statistics:
        """Return statistics of a fine-tune on examples of its task."""
        world: Any = self.world
        state = self.tuned(task)[distance]
        make = partial(world.statistics, self.base(), state, task)
        return self._kept(f"{distance}-{task}-statistics", make)

    def score(self, only: Collection[str] = ()) -> None:
        """Score the models, and the merges by every method: with all defaults first."""
        tasks, seed, base = self.family.tasks, self.seed, self.base()["state"]
        for distance in self.family.steps:
            self.score_parents(distance)
            merge = partial(
                merged,
                base=base,
                models=[self.tuned(task)[distance] for task in tasks],
                seed=seed,
                statistics=lambda at=distance: [self.measured(task, at) for task in tasks],
            )
            merges = {method: partial(merge, method) for method in METHODS}
            with tempfile.TemporaryDirectory() as place:
                merges |= self._by_files(distance, Path(place))
                folder = f"{distance}/{SIZE}"
                wanted = {AVERAGE.removesuffix("-default"), *only} if only else merges.keys()
                chosen = [method for method in merges if method in wanted]
                for method in chosen:
                    make = partial(self._default, merges[method])
                    self._scored(f"{folder}/{method}-default", tasks, make)
                for method in chosen:
                    if SPACES_OF.get(method):
                        tried = candidates(SPACES_OF[method])
                        choose = partial(self._chosen, merges[method], tried, tasks)
                        self._scored(f"{folder}/{method}-chosen", tasks, choose)

    def _by_files(self, distance: str, place: Path) -> dict[str, Callable[..., State]]:
        """Return the merges that take folders, which are written to `place` when one is made."""
        world: Any = self.world
        written = []

        def merge(method: str, parameters: Mapping[str, Any]) -> State:
            if not written:
                tasks = self.family.tasks
                models = [self.tuned(task)[distance] for task in tasks]
                written.append(world.files(self.base()["state"], models, tasks, place))
            state: State = world.opened(by_files.merged(method, written[0], parameters, place))
            return state

        family: Any = self.family
        return {method: partial(merge, method) for method in family.by_files}


def collected(
    seeds: Mapping[str, list[Small]], earlier: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the scores of all models by family and seed, as far as they are there.

    Args:
        earlier: results with rows that are kept where they are not there now.
    """
    found: dict[str, Any] = {}
    for name, every in seeds.items():
        found[name] = {"tasks": every[0].family.tasks, "seeds": {}}
        for seed in every:
            folder = seed.folder / "scores"
            (distance,) = seed.family.steps
            own = folder / distance / str(SIZE)
            average = _examples(own / f"{AVERAGE}.npz")
            singles = {"base": folder / "base.npz"}
            singles |= {task: folder / distance / f"{task}.npz" for task in seed.family.tasks}
            family: Any = seed.family
            methods = (*METHODS, *family.by_files)
            rows = [f"{method}-{how}" for how in ("default", "chosen") for method in methods]
            there = {
                row: _row(path, average) for row in rows if (path := own / f"{row}.npz").is_file()
            }
            if earlier:
                before = earlier["families"][name]["seeds"][str(seed.seed)]["merges"]
                if before[AVERAGE] != there[AVERAGE]:
                    raise SystemExit(f"{name}, seed {seed.seed}: the average scored "
                                     f"{before[AVERAGE]} before, now {there[AVERAGE]}: score all "
                                     "again, without --only")  # fmt: skip
                known = before | there
                there = {row: known[row] for row in rows if row in known}
            found[name]["seeds"][str(seed.seed)] = {
                "models": {model: _row(path, average) for model, path in singles.items()},
                "merges": there,
            }
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {one.__name__: one.__version__ for one in (torch, transformers, outliermerge)},
        "packages": (earlier["packages"] if earlier else {}) | versions(),
        "recipes": {name: every[0].family.recipe.__dict__ for name, every in seeds.items()},
        "families": found,
    }


def _cell(rows: list[dict[str, Any]], averages: list[dict[str, Any]] | None) -> str:
    """Return a mean score, or what it gains over the average with its standard error."""
    means = [100 * statistics.fmean(row["scores"]) for row in rows]
    if averages is None:
        return f"{statistics.fmean(means):.1f}"
    gains = [a - 100 * statistics.fmean(b["scores"]) for a, b in zip(means, averages, strict=True)]
    if len(gains) > 1:
        error = statistics.stdev(gains) / len(gains) ** 0.5
    else:
        (row,) = rows
        error = 100 * float(np.hypot.reduce(row["errors"])) / len(row["errors"])
    return f"{statistics.fmean(gains):+.1f} ± {error:.1f}"


def table(found: Mapping[str, Any]) -> str:
    """Return the table: a row for each model and method, of both families."""
    families = found["families"]
    first = next(iter(next(iter(families.values()))["seeds"].values()))
    methods = list(dict.fromkeys(row.rpartition("-")[0] for row in first["merges"]))
    every = {name: list(family["seeds"].values()) for name, family in families.items()}

    def cells(name: str, kind: str, row: str, column: str) -> str:
        seeds = every[name]
        if kind == "models" and row != "base":
            row = families[name]["tasks"][int(row)]
        ending = "" if kind == "models" else "-chosen" if column == "chosen" else "-default"
        rows = [seed[kind].get(row + ending) for seed in seeds]
        if None in rows or (kind == "models" and column == "chosen"):
            return "–"
        if row + ending == AVERAGE and column != "mean":
            return "–"
        averages = [seed["merges"][AVERAGE] for seed in seeds]
        return _cell(rows, None if column == "mean" else averages)

    columns = [
        (name, column)
        for name, seeds in every.items()
        for column in ("mean", "default", "chosen")
        if column != "chosen" or any(row.endswith("chosen") for row in seeds[0]["merges"])
    ]
    rows = [
        ("the base", "models", "base"),
        ("the first task's model", "models", "0"),
        ("the second task's model", "models", "1"),
        *((f"`{method}`", "merges", method) for method in methods),
    ]
    heads = [f"{TITLES[name]}, {column}" for name, column in columns]
    lines = ["| | " + " | ".join(heads) + " |", "|:--|" + "--:|" * len(heads)]
    for title, kind, row in rows:
        own = [cells(name, kind, row, column) for name, column in columns]
        lines.append(f"| {title} | " + " | ".join(own) + " |")
    said = ", ".join(
        f"{TITLES[name]}: {len(seeds)} seed{'s' * (len(seeds) > 1)}"
        for name, seeds in every.items()
    )
    return "\n".join(lines) + f"\n\n{said}; {found['date']}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the CLIP")
    parser.add_argument("--family", choices=FAMILIES, help="score only this, and write no table")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="and the average")
    parser.add_argument("--collect", action="store_true", help="only write what has been scored")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    seeds: dict[str, list[Small]] = {}
    for name, family in FAMILIES.items():
        numbers = options.seeds if name == "clip" else [0]
        seeds[name] = [Small(family, number, cache() / "every_method") for number in numbers]
        waits = options.collect or options.family not in (None, name)
        for seed in () if waits else seeds[name]:
            seed.train()
            seed.score(options.only)
            print(f"{name}, seed {seed.seed}: scored", flush=True)
    if options.family:
        return
    found = collected(seeds, json.loads(RESULTS.read_text()) if options.only else None)
    RESULTS.write_text(json.dumps(found, separators=(",", ":")).replace("},", "},\n") + "\n")
    TABLE.write_text(table(found))
    print(TABLE.read_text())


if __name__ == "__main__":
    main()
