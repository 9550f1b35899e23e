"""How far the parts of an output are, by the journals or records that they keep."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from outliermerge.errors import OutlierMergeError, argument, listing
from outliermerge.output.bucket_parts import seen_in_store, written_in_store
from outliermerge.output.division import divided, part_of
from outliermerge.output.folder import begun_by_another, differing, has_no_tensor
from outliermerge.output.journal import BusyError, Journal, parts, told
from outliermerge.output.manifest import identity
from outliermerge.output.names import Final, journal_path, partial_folder, real_final
from outliermerge.output.naming import is_named
from outliermerge.output.resumed import compared_in, marks_of
from outliermerge.planning.plan import Options, Plan


@dataclass(frozen=True)
class PartState:
    """How far a part of an output is.

    Attributes:
        number: of the part, counted from 1.
        num_parts: how many there are.
        num_tensors: that it has to write.
        lacking: the names of those that are not written, or whose bytes are not as written.
        holder: in words, the process that is writing it now; empty if none is.
        compared: the numbers of the plan's checks that it has done with the inputs as they are.
    """

    number: int
    num_parts: int
    num_tensors: int
    lacking: tuple[str, ...]
    holder: str = ""
    compared: frozenset[int] = frozenset()

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to be done for it."""
        return not self.lacking and not self.holder

    @property
    def in_words(self) -> str:
        """What a person should know of it."""
        said = f"part {self.number}/{self.num_parts}"
        if self.holder:
            return f"{said} is being written{self.holder}"
        return f"{said} lacks {len(self.lacking)} of {self.num_tensors} tensors"

    def as_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "part": self.number,
            "num_parts": self.num_parts,
            "num_tensors": self.num_tensors,
            "is_being_written": bool(self.holder),
            "lacking": list(self.lacking),
        }


class NotWholeError(OutlierMergeError):
    """An output cannot be joined, since parts of it lack tensors or are being written.

    Attributes:
        states: of all parts.
    """

    def __init__(self, final: Final, states: Sequence[PartState]) -> None:
        self.final, self.states = final, tuple(states)
        left = self.unfinished
        super().__init__(
            f"{final}: is not whole, {len(left)} of {len(self.states)} parts are not done:\n"
            f"{listing(state.in_words for state in left)}\nRun these parts, then join again."
        )

    @property
    def unfinished(self) -> list[PartState]:
        """The parts that are not done."""
        return [state for state in self.states if not state.is_whole]


def states_of_all(
    plans: Sequence[tuple[Plan, Final]], options: Options, *, pass_over_empty: bool = False
) -> list[list[PartState] | None]:
    """Return for each output how far its parts are; None where nothing of it is written.

    They are as `states_of` returns them. Of outputs that get their names together, the first may
    be the last that has a journal.

    Args:
        pass_over_empty: return None for an output on a disk that was begun, but of which no tensor
            is finished and no part is being written.
    """
    found: list[list[PartState] | None] = []
    for plan, output in plans:
        final = real_final(output)
        if isinstance(final, str):
            is_begun, is_there = seen_in_store(final)
        else:
            is_begun, is_there = os.path.lexists(journal_path(final)), final.exists()
            if is_begun and pass_over_empty and _is_empty(final):
                found.append(None)
                continue
        if is_begun:
            found.append(states_of(plan, final, options))
        else:
            found.append([] if found[:1] == [[]] and is_there else None)
    return found


def _is_empty(final: Path) -> bool:
    journal = Journal(final)
    try:
        return has_no_tensor(final, journal)
    finally:
        journal.close()


def states_of(plan: Plan, final: Final, options: Options) -> list[PartState]:
    """Return how far the parts of an output are, by their journals; empty if all is named already.

    Args:
        final: the path that `real_output` returned, or an address.

    Raises:
        BusyError: another process holds the whole output.
        OutlierMergeError: nothing of it is written, or it was begun by another merge.
    """
    facts = json.loads(json.dumps(identity(plan, options)))
    if isinstance(final, str):
        found = written_in_store(plan, final, facts)
        if found is None:
            return []
        return _states(plan, *found, {}, whole_files=True)
    if not os.path.lexists(journal_path(final)):
        if final.exists():
            raise OutlierMergeError(
                f"{final}: exists already, and no part of it is being written. It was joined "
                "before, or is another output; `outliermerge verify` checks it."
            )
        if parts(final):
            raise OutlierMergeError(
                f"{journal_path(final)}: is missing, and without it nobody can tell what was "
                f"begun in {partial_folder(final)}. Put it back, or remove that folder and the "
                "journals beside it, and run the parts again."
            )
        raise OutlierMergeError(
            f"{final}: no part of it is being written. Run its parts first, each with "
            f"{argument('part', '1/N')} to {argument('part', 'N/N')}."
        )
    whole = Journal(final)
    try:
        if is_named(whole):
            return []
        if changed := differing(whole.identity, facts):
            raise begun_by_another(final, changed, in_parts=True)
        num_parts = whole.last("num_parts")
        if num_parts is None:
            raise OutlierMergeError(
                f"{final}: was begun by a run that was not divided into parts. The same run goes "
                "on with it."
            )
        done = _written(whole, facts)
    finally:
        whole.close()
    holders, compared = dict[str, str](), dict[str, set[int]]()
    for name in parts(final):
        try:
            journal = Journal(final, name)
        except BusyError as error:
            said = {key: value for key, value in error.holder.items() if key != "part"}
            holders[name] = told(said) or " by another process"
            continue
        try:
            done |= _written(journal, facts)
            if journal.identity == facts:
                compared[name] = compared_in(journal.lines, marks_of(plan))
        finally:
            journal.close()
    return _states(plan, num_parts, done, compared, holders)


def _states(
    plan: Plan,
    num_parts: int,
    done: set[str],
    compared: Mapping[str, set[int]],
    holders: Mapping[str, str],
    *,
    whole_files: bool = False,
) -> list[PartState]:
    """Return the states of all parts, from what is done, and by part what it has compared."""
    return [
        PartState(
            number,
            num_parts,
            len(jobs),
            tuple(job.name for job in jobs if job.name not in done),
            holders.get(f"{number}-of-{num_parts}", ""),
            frozenset(compared.get(f"{number}-of-{num_parts}", ())),
        )
        for number, jobs in enumerate(divided(plan, num_parts, whole_files=whole_files), 1)
    ]


def _written(journal: Journal, facts: dict[str, Any]) -> set[str]:
    return set(journal.all("tensor")) if journal.identity == facts else set()


def without(plan: Plan, state: PartState, lost: set[str], final: Final) -> PartState:
    """Return the state of a part after tensors of it were found to be damaged."""
    jobs = part_of(plan, state.number, state.num_parts, whole_files=isinstance(final, str))
    return replace(state, lacking=tuple(job.name for job in jobs if job.name in lost))
