"""Renames a finished output to its final name; a kill at any moment loses nothing.

Before the first rename, all files are synced to disk, and the journal says by inode numbers what is
moved where. Old and new output are exchanged in one step where the system can do that. The next
process that opens the journal finishes an interrupted renaming.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from outliermerge.checkpoint.folders.folder import MANIFEST_NAME
from outliermerge.errors import OutlierMergeError
from outliermerge.output.journal import Journal
from outliermerge.output.names import manifest_path, partial_folder, replaced_path
from outliermerge.output.ownership import owned_files
from outliermerge.storage.failures import failure
from outliermerge.storage.system import exchange, inode, move_new, remove_files, sync_folder


@dataclass(frozen=True)
class Move:
    """One rename: the file or folder that gets a final name.

    Attributes:
        source: its name within OUT.partial; empty for the folder itself.
        new: the inode number of the file or folder that is moved.
        old: the inode number of the old holder of the name; None if the name is free.
    """

    source: str
    new: int
    old: int | None


def begin_naming(journal: Journal, *, shard: str | None, old: Sequence[int | None]) -> None:
    """Note in the journal what will be renamed; all of it is synced to disk.

    Args:
        shard: the name of the file in OUT.partial, if the output is a single file.
        old: the result of `old_inodes` at the start of the run.
    """
    sources = [""] if shard is None else [shard, MANIFEST_NAME]
    numbers = [inode(partial_folder(journal.final) / source) for source in sources]
    moves = [
        Move(source, new, before)
        for source, new, before in zip(sources, numbers, old, strict=True)
        if new is not None
    ]
    journal.add({"naming": [asdict(move) for move in moves]})
    journal.sync()


def old_inodes(final: Path, *, is_one_file: bool) -> list[int | None]:
    """Return the inode numbers of the files that now have an output's final names."""
    return [inode(final), *([inode(manifest_path(final))] if is_one_file else [])]


def is_named(journal: Journal) -> bool:
    """Tell whether the renaming of an output has begun."""
    replaced = inode(replaced_path(journal.final))
    return any(
        inode(_target(journal, move)) == move.new
        or (not move.source and replaced is not None and replaced == move.old)
        for move in _moves(journal)
    )


def finish_naming(journal: Journal) -> Path | None:
    """Do the renames of an output that are still to be done, and remove the old output.

    Returns:
        Where files are kept that somebody else put into the old output; usually None.

    Raises:
        OutlierMergeError: something else took the name meanwhile, or a call failed. The written
            files stay, and the same command continues.
    """
    moves = _moves(journal)
    done: list[Move] = []
    for move in moves:
        target = _target(journal, move)
        if inode(target) == move.new:
            continue
        try:
            _place(journal, move, target)
        except OSError as error:
            for other in reversed(done):
                _take_back(journal, other)
            why = str(failure(target, "given its name", error))
            if isinstance(error, FileExistsError):
                why = f"{target}: something else has got this name while the merge ran; it is left "
                why += "alone."
            raise OutlierMergeError(
                f"{why} What was written stays in {partial_folder(journal.final)}, and the same "
                "command goes on from there."
            ) from error
        done.append(move)
    sync_folder(journal.final.absolute().parent)
    try:
        if not_kept := journal.last("not kept"):
            remove_files(journal.final, {*not_kept})
        return _remove_old(journal, moves)
    except OSError as error:
        place = Path(error.filename or partial_folder(journal.final))
        raise OutlierMergeError(
            f"{failure(place, 'removed', error)} {journal.final} is made and whole; this is left "
            "of what was there before. The same command removes it."
        ) from error


def _moves(journal: Journal) -> list[Move]:
    return [Move(**entry) for entry in journal.last("naming") or []]


def _target(journal: Journal, move: Move) -> Path:
    final = journal.final
    return manifest_path(final) if move.source == MANIFEST_NAME else final


def _place(journal: Journal, move: Move, target: Path) -> None:
    source = partial_folder(journal.final) / move.source
    replaced = replaced_path(journal.final)
    found = inode(target)
    if found is None:
        move_new(source, target)
        return
    if found != move.old:
        raise FileExistsError
    if not exchange(source, target):
        if not move.source:
            move_new(target, replaced)
            move_new(source, target)
        else:
            source.replace(target)
        return
    if inode(source) != move.old:  # it was replaced between the two calls
        exchange(source, target)
        raise FileExistsError


def _take_back(journal: Journal, move: Move) -> None:
    source, target = partial_folder(journal.final) / move.source, _target(journal, move)
    if inode(source) is None:
        move_new(target, source)
    else:
        exchange(target, source)


def _remove_old(journal: Journal, moves: Sequence[Move]) -> Path | None:
    partial, replaced = partial_folder(journal.final), replaced_path(journal.final)
    if moves[0].source:
        if partial.is_dir() and not partial.is_symlink():
            remove_files(partial, {move.source for move in moves})
        return partial if partial.is_dir() else None
    for place in (partial, replaced):
        if moves[0].old is None or inode(place) != moves[0].old:
            continue
        remove_files(place, owned_files(place))
        if place.is_dir():  # the manifest goes last: after a kill it still lists our files
            remove_files(place, {MANIFEST_NAME})
        if place.is_dir():
            if place == partial:
                move_new(place, replaced)
            return replaced
    return None
