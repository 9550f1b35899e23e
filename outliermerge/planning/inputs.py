"""Opens the models of a spec: folders, files, hub ids, adapters; renamed and dequantised."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

from outliermerge.checkpoint.adapters.config import base_of_adapter, is_adapter
from outliermerge.checkpoint.adapters.single_file import is_single_file, open_single_file
from outliermerge.checkpoint.folders.absent import meant_inside, models_in
from outliermerge.checkpoint.folders.beside import files_in, sidecars_of
from outliermerge.checkpoint.folders.folder import open_checkpoint, refuse_unfinished
from outliermerge.checkpoint.folders.foreign import refuse_foreign_adapter
from outliermerge.checkpoint.folders.hub import is_hub_id, refuse_absent, resolve
from outliermerge.checkpoint.quantized.gguf import SUFFIX, gguf_home
from outliermerge.checkpoint.quantized.opened import dequantize
from outliermerge.checkpoint.sources import Checkpoint
from outliermerge.errors import OutlierMergeError, as_path, nearest, quoted, shown
from outliermerge.planning.adapted_heads import settle_heads
from outliermerge.planning.adapted_layout import open_over
from outliermerge.planning.extra_state import one_extra_state
from outliermerge.planning.one_layout import in_one_layout
from outliermerge.planning.owners import kind_of
from outliermerge.planning.plan import Input
from outliermerge.planning.scalars import in_shapes_of
from outliermerge.planning.tied import tied_heads, with_embeddings
from outliermerge.planning.vocabulary_ids import CONFIGS
from outliermerge.spec.check import MergeSpec
from outliermerge.spec.models import ModelSpec
from outliermerge.spec.rename import Rename, best_rename
from outliermerge.spec.settings import SettingError, SpecPath
from outliermerge.spec.stages import stage_of
from outliermerge.spec.text import Mistakes, SpecText
from outliermerge.storage.addresses import is_address
from outliermerge.storage.stamps import told_by_name
from outliermerge.storage.stand_ins import naming_addresses

_NO_STAGES: Mapping[str, Callable[[], Input]] = {}


def open_inputs(
    spec: MergeSpec, open_stage: Callable[[str], Input]
) -> tuple[tuple[Input, ...], list[int]]:
    """Open every model once; return all inputs, and the numbers of the merged ones in order.

    Args:
        open_stage: plans a stage of the spec, and returns it as a model.

    Raises:
        SpecError: a rule of a `rename` matches nothing, or gives two tensors one name.
        OutlierMergeError: a model is absent or broken; the message starts with the spec's line.
    """
    _refuse_absent(spec)
    inputs: list[Input] = []
    unties = spec.document.tie_word_embeddings is False
    stages = {name: partial(open_stage, name) for name in spec.stages}

    def number_of(model: ModelSpec, role: Literal["base", "model"]) -> int:
        base = inputs[0] if inputs and inputs[0].role == "base" else None
        if (name := stage_of(model.reference, stages)) is not None:
            stages[name]()  # its mistakes have lines of their own
        try:
            with told_by_name():
                entry = open_model(
                    model.reference, model.rename, role, base, unties=unties, stages=stages
                )
        except SettingError as error:
            raise spec.source.error(error.path, str(error), at_key=error.at_key) from error
        except OutlierMergeError as error:
            path = model.path if role == "base" else (*model.path, "model")
            raise OutlierMergeError(str(spec.source.error(path, str(error)))) from error
        for number, other in enumerate(inputs):
            if _same(entry, other):
                return number
        inputs.append(entry)
        return len(inputs) - 1

    if spec.base is not None:
        number_of(spec.base, "base")
    numbers: list[int] = []
    for model in spec.models:
        number = 0 if model is spec.base else number_of(model, "model")
        is_twice = number in numbers or (number == 0 and spec.base and spec.method.uses_base)
        if is_twice and not spec.slices:  # of slices each is looked at by itself
            other = inputs[number].reference
            raise spec.source.error(
                (*model.path, "model"), f"{model.reference!r} is the same model as {other!r}"
            )
        numbers.append(number)
    try:
        inputs = in_one_layout(spec, inputs)
    except SettingError as error:
        raise spec.source.error(error.path, str(error)) from error
    first, *others = one_extra_state(inputs)
    tensors = first.checkpoint.tensors
    return (first, *(in_shapes_of(tensors, entry) for entry in others)), numbers


def open_tokenizer(spec: MergeSpec, inputs: Sequence[Input]) -> Input | None:
    """Return the model whose tokenizer the output has, if the spec names it in other words.

    It is an input under another path, or a model that is not merged: of the hub only its tokenizer
    files and configs are fetched.

    Raises:
        OutlierMergeError: there is no such folder, or it cannot be read.
    """
    request = spec.tokenizer
    if request is None or not request.is_outside:
        return None
    try:
        with told_by_name():
            found = tokenizer_of(request.source)
    except OutlierMergeError as error:
        raise OutlierMergeError(str(spec.source.error(request.path, str(error)))) from error
    same = (e for e in inputs if e.tokenizer_home.resolve() == found.home.resolve())
    return next(same, found)


def tokenizer_of(reference: str) -> Input:
    """Open only the tokenizer and the configs of a model, which may have no weights.

    Raises:
        OutlierMergeError: there is no such folder, or it cannot be read.
    """
    root = resolve(reference, _is_of_tokenizer)
    if not root.is_dir():
        raise OutlierMergeError(f"{root}: is a file, expected a folder with a tokenizer")
    names = (*filter(_is_of_tokenizer, sidecars_of(files_in(root), [""])),)
    return Input(reference, "model", Checkpoint(root, {}, (), names, ()), root)


def _is_of_tokenizer(name: str) -> bool:
    """Tell whether a file belongs to a tokenizer, or says which ids begin and end a text."""
    return kind_of(name) == "tokenizer" or name in CONFIGS


def _refuse_absent(spec: MergeSpec) -> None:
    """Refuse all models of a merge at once that are certainly not there."""
    named: list[tuple[SpecPath, str]] = []
    for model in (spec.base, *spec.models) if spec.base else spec.models:
        at = model.path if model is spec.base else (*model.path, "model")
        named.append((at, model.reference))
        named += [((*model.path, "auxiliary", k), path) for k, path in model.auxiliary.items()]
    if spec.tokenizer is not None and spec.tokenizer.is_outside:
        named.append((spec.tokenizer.path, spec.tokenizer.source))
    refuse_absent_models(spec.source, named, stages=spec.stages)


def refuse_absent_models(
    source: SpecText, named: Iterable[tuple[SpecPath, str]], *, stages: Collection[str] = ()
) -> None:
    """Refuse all models at once that are certainly not there, before the hub is asked for others.

    Args:
        named: the models, each with its place in the file.
        stages: the names of the file's other merges.

    Raises:
        OutlierMergeError: there are such models.
    """
    mistakes, folder = Mistakes(source), Path(source.file).parent
    beside = folder if Path(source.file).is_file() else None
    for path, whole in named:
        for reference in _parts(whole):
            if reference in stages:
                continue
            try:
                refuse_absent(reference, beside=beside)
            except OutlierMergeError as error:
                near = nearest(reference, stages)
                meant = f" Did you mean the stage {quoted(near)}?" if near is not None else ""
                mistakes.found.append(source.error(path, error.marked + meant))
    mistakes.refuse(OutlierMergeError)


def _parts(reference: str) -> list[str]:
    """Return the models that a reference names: one, or a base and its adapters."""
    if not is_combined(reference):
        return [reference]
    stem, last = split_reference(reference)
    return [*_parts(stem), last]


def _same(entry: Input, other: Input) -> bool:
    """Tell whether two references lead to the same files."""
    if entry.made_of or other.made_of:
        return entry.reference == other.reference
    return _files(entry) == _files(other)


def _files(entry: Input) -> list[Path]:
    return [stamp.path.resolve() for stamp in entry.checkpoint.weight_files]


@naming_addresses()
def open_model(
    reference: str,
    rename: Rename,
    role: Literal["base", "model"],
    base: Input | None,
    *,
    unties: bool = False,
    stages: Mapping[str, Callable[[], Input]] = _NO_STAGES,
) -> Input:
    """Open a model: a folder, a file, a hub id, an adapter, or `base+adapter`.

    An adapter without `base+` is applied to the merge's base, or else to the base that its config
    names.

    Args:
        reference: the model's name in the spec.
        rename: the rename from its names to those of the other models.
        role: the model's role in the merge.
        base: the base model of the merge.
        unties: the spec gives the output a head of its own.
        stages: by name what opens the stages of the merge.

    Raises:
        SettingError: a rule of `rename` does not fit the names.
        OutlierMergeError: the model is absent or broken.
    """
    if reference in stages:
        return _renamed(replace(stages[reference](), role=role), rename)
    if is_combined(reference):
        stem, last = split_reference(reference)
        refuse_unfinished(folder := resolve(last))
        return _open_adapter(reference, folder, rename, role, base, stem, unties, stages)
    root = resolve(reference)
    refuse_unfinished(root)
    if root.is_dir() and is_adapter(root):
        return _open_adapter(reference, root, rename, role, base, None, unties, stages)
    checkpoint = open_checkpoint(root)
    if is_single_file(checkpoint):
        return _open_adapter(reference, root, rename, role, base, None, unties, stages)
    home = gguf_home(root) if root.suffix == SUFFIX and root.is_file() else root
    return _renamed(Input(reference, role, dequantize(checkpoint), home=home), rename)


def open_written(folder: Path, base: Input) -> Input:
    """Open an adapter of a base that is not finished yet."""
    return _open_adapter(str(folder), folder, Rename(), "model", base, None, False, _NO_STAGES)


def split_reference(reference: str) -> tuple[str, str]:
    """Split at the last `+` that is not part of a name; return the text before and after."""
    parts = reference.split("+")
    splits = [("+".join(parts[:at]), "+".join(parts[at:])) for at in range(len(parts) - 1, 0, -1)]
    return next((pair for pair in splits if _is_named(pair[1])), splits[0])


def is_combined(reference: str) -> bool:
    """Tell whether a reference names a model and an adapter; an address can have a `+` in it."""
    if "+" not in reference or as_path(reference).exists():
        return False
    return not is_address(reference) or _is_named(split_reference(reference)[1], loosely=False)


def _is_named(reference: str, *, loosely: bool = True) -> bool:
    """Tell whether a text names a model; loosely also where it may be the rest of an address."""
    if is_address(reference) or as_path(reference).exists():
        return True
    return is_hub_id(reference) and loosely


def _open_adapter(
    reference: str,
    folder: Path,
    rename: Rename,
    role: Literal["base", "model"],
    base: Input | None,
    stem: str | None,
    unties: bool,
    stages: Mapping[str, Callable[[], Input]],
) -> Input:
    """Open an adapter over the model named before the `+`, the base model, or its own base."""
    lora = None if folder.is_dir() and is_adapter(folder) else _single_file(folder)
    trained_on = base_of_adapter(folder) if lora is None else None
    if stem is not None:
        under = open_model(stem, Rename(), role, None, unties=unties, stages=stages)
        if base is not None and _same(under, base):
            under = base
    elif base is not None:
        under = base
    elif trained_on is not None:
        under = open_model(trained_on, Rename(), role, None, unties=unties)
    else:
        raise OutlierMergeError(
            f"{folder}: an adapter that names no base: write `base+adapter` as the model"
        )
    notes: list[str] = []
    if stem is None and trained_on and _last(trained_on) != _last(under.reference):
        notes.append(
            f"{shown(reference)} was trained on {shown(trained_on)}, and is taken as a change of "
            f"{shown(under.reference)}; `{shown(trained_on)}+{shown(reference)}` takes it as a "
            "change of the former"
        )
    is_over_base = under is base
    under = with_embeddings(under)
    seen: dict[str, None] = {}

    def target(name: str) -> str:
        seen[name] = None
        return rename(name) if is_over_base else name

    def tied(head: str) -> str | None:
        return tied_heads(under, [head]).get(head)

    try:
        adapted = (
            open_over(folder, under, target, tied)
            if lora is None
            else open_single_file(lora, under.checkpoint)
        )
    except OutlierMergeError as error:
        best = best_rename([rename(name) for name in seen], under.checkpoint.tensors)
        if best is None or "`rename`" not in str(error):
            raise
        advice = f"`rename: {best[0]}` on {shown(reference)} pairs {best[1]} of {len(seen)}."
        raise OutlierMergeError(f"{error}\n{advice}") from error
    heads = settle_heads(folder, under, adapted, unties=unties)
    notes += heads.notes
    checkpoint = replace(
        adapted,
        tensors=heads.tensors,
        sidecars=under.checkpoint.sidecars,
        left_behind=under.checkpoint.left_behind,
        components=under.checkpoint.components,
        notes=(*adapted.notes, *notes),
    )
    entry = Input(
        reference,
        role,
        checkpoint,
        home=under.home,
        parted=heads.parted,
        alike=heads.alike,
        made_of=under.made_of,
        checks=under.checks,
    )
    if not is_over_base:
        return _renamed(entry, rename)
    rename.apply(seen)
    return replace(entry, renamed=rename.counts(seen))


def _single_file(root: Path) -> Checkpoint:
    """Open what stands after a `+` and is no folder of PEFT's: a file that holds an adapter."""
    if root.is_dir():
        refuse_foreign_adapter(root)
    inside = [path for path in models_in(root) if is_adapter(path)]
    if inside:
        raise OutlierMergeError(f"{root}: is not an adapter, {meant_inside(inside, 'adapter')}")
    lora = open_checkpoint(root)
    if not is_single_file(lora):
        raise OutlierMergeError(
            f"{root}: stands after a `+` but is not an adapter that can be read: a folder of "
            "PEFT's, or a file of kohya's scripts, LyCORIS, diffusers or ComfyUI"
        )
    return lora


def _renamed(entry: Input, rename: Rename) -> Input:
    if not rename.rules:
        return entry
    tensors = entry.checkpoint.tensors
    names = rename.apply(tensors)
    checkpoint: Checkpoint = replace(
        entry.checkpoint, tensors={names[name]: source for name, source in tensors.items()}
    )
    return replace(
        entry,
        checkpoint=checkpoint,
        renamed=rename.counts(tensors),
        parted=tuple(map(rename, entry.parted)),
        alike=tuple((rename(head), rename(original), pair) for head, original, pair in entry.alike),
    )


def _last(reference: str) -> str:
    """Return the last part of a model's name; copies of a model usually keep it."""
    return Path(reference.partition("@")[0]).name
