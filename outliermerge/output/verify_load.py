"""The proof that a finished output loads, by reading its headers, configs and tokenizers again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from outliermerge.checkpoint.config import read_json, text_config
from outliermerge.checkpoint.folders.folder import open_checkpoint
from outliermerge.checkpoint.formats.safetensors_file import read_header
from outliermerge.checkpoint.layout import component_of
from outliermerge.checkpoint.tokens import read_tokens
from outliermerge.errors import OutlierMergeError, listing
from outliermerge.output.load_check import LoadCheck, Part, Shapes, Verdict, find_parts
from outliermerge.output.manifest_file import read_manifest
from outliermerge.planning.gguf import FILE
from outliermerge.planning.tied_names import ties_head, vocabulary_rows
from outliermerge.planning.vocabulary_config import named_ids
from outliermerge.spec.settings import find_layers


def check_folder(folder: Path) -> Verdict:
    """Return whether a finished output loads, and whether all its tokens have embedding rows.

    If transformers (or diffusers) is installed, it is asked. Otherwise the config is compared with
    the tensors' names and shapes. Problems that the base has as well are only noted.

    Raises:
        OutlierMergeError: the folder has no manifest.
    """
    manifest = read_manifest(folder)
    try:
        return _check(folder, manifest)
    except OutlierMergeError as error:  # no loader could read this file beside the weights
        return Verdict("does not load", problems=(str(error),))


def _check(folder: Path, manifest: Mapping[str, Any]) -> Verdict:
    if not folder.is_dir():
        note = "a single file has no config beside it: nothing says what loads it"
        return Verdict("not checked", notes=(note,))
    if FILE in {*manifest["shards"], *manifest["files"]}:
        note = "not checked that it loads: this check knows no GGUF files"
        return Verdict("not checked", notes=(note,))
    try:
        files = {name: _shapes(folder / name) for name in manifest["shards"]}
    except OutlierMergeError as error:
        return Verdict("not checked", notes=(f"not checked that it loads: {error}",))
    shapes = {
        _in(name.rpartition("/")[0], tensor): shape
        for name, tensors in files.items()
        for tensor, shape in tensors.items()
    }
    components = sorted({name.rpartition("/")[0] for name in files})
    parts, notes = find_parts(shapes, components, lambda name: read_json(folder / name))
    base = _Base.of(manifest)
    recorded = manifest.get("load_check")
    known = recorded.get("as_base", {}) if isinstance(recorded, dict) else None
    asked = [
        replace(part, found_in_base=known.get(home, {}))
        if isinstance(known, dict)
        else replace(part, base=base.parts.get(home))
        for home, part in parts.items()
    ]
    with LoadCheck([(asked, notes)]) as check:
        (verdict,) = check.verdicts()
    problems = [*verdict.problems, *_index_problems(folder, files)]
    said = list(verdict.notes)
    for home in components:
        own = _own(shapes, home, components)
        if home not in verdict.checked:
            problems += _config_problems(home, read_json(folder / home / "config.json"), own)
        rows = verdict.num_rows.get(home)
        found = {rows} if rows else vocabulary_rows(own)
        if len(found) == 1:
            new_problems, new_notes = _token_problems(folder, home, found.pop(), base)
            problems += new_problems
            said += new_notes
    status = "does not load" if problems else verdict.status
    return replace(verdict, status=status, problems=tuple(problems), notes=tuple(said))


@dataclass(frozen=True)
class _Base:
    """The base, if it is still where the merge read it; otherwise all fields are empty."""

    root: Path | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    components: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> _Base:
        inputs = manifest.get("inputs") or [{}]
        root = Path(str(inputs[0].get("path", "")))
        try:
            base = open_checkpoint(root)
        except OutlierMergeError:  # the base is gone, or has changed since
            return cls()
        shapes = {name: source.shape for name, source in base.tensors.items()}
        return cls(root, shapes, tuple(base.components)) if root.is_dir() else cls()

    @property
    def parts(self) -> Mapping[str, Part]:
        return find_parts(self.shapes, self.components, self.read)[0]

    def read(self, name: str) -> Mapping[str, Any]:
        return read_json(self.root / name) if self.root else {}

    def lacks_row(self, home: str, id_: int) -> bool:
        """Tell whether the base itself has no row for an id."""
        rows = vocabulary_rows(_own(self.shapes, home, self.components))
        return bool(rows) and id_ >= max(rows)


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    return {meta.name: meta.shape for meta in read_header(path)}


def _in(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _own(
    shapes: Mapping[str, tuple[int, ...]], home: str, components: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a component, by their names inside it."""
    start = f"{home}/" if home else ""
    return {
        name.removeprefix(start): shape
        for name, shape in shapes.items()
        if component_of(name, components) == home
    }


def _index_problems(folder: Path, files: Mapping[str, Shapes]) -> Iterator[str]:
    """Compare the indexes, which loaders use to find tensors, with the headers."""
    for path in sorted(folder.rglob("*.safetensors.index.json")):
        home = path.parent.relative_to(folder).as_posix()
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict):
            yield f"file {path.relative_to(folder)}: has no weight_map"
            continue
        here = {
            name.rpartition("/")[2]: tensors
            for name, tensors in files.items()
            if (name.rpartition("/")[0] or ".") == home
        }
        wrong = [
            f"{tensor}: {file} in the index"
            for tensor, file in weight_map.items()
            if tensor not in here.get(file, {})
        ]
        wrong += [
            f"{tensor}: in {file}, not in the index"
            for file, tensors in here.items()
            for tensor in tensors
            if tensor not in weight_map
        ]
        if wrong:
            yield f"file {path.relative_to(folder)}: is not what the shards hold:\n{listing(wrong)}"


def _config_problems(
    home: str, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Compare a config with names and shapes, if its class could not be built."""
    text = text_config(config)
    rows, size = vocabulary_rows(shapes), text.get("vocab_size")
    if isinstance(size, int) and rows and size not in rows:
        found = " and ".join(map(str, sorted(rows)))
        yield _named(home, f"config.json says vocab_size {size}, embeddings and head have {found}")
    depth = text.get("num_hidden_layers")
    stacks = {layer.stack: layer.num_layers for layer in find_layers(shapes).values()}
    # Further layers can be those that predict more tokens.
    if isinstance(depth, int) and stacks and max(stacks.values()) < depth:
        found = ", ".join(f"{count} in {stack}*" for stack, count in stacks.items())
        yield _named(home, f"config.json says num_hidden_layers {depth}, the tensors have {found}")
    if (
        str(config.get("architectures")).endswith("ForCausalLM']")
        and ties_head(config) is False
        and rows
        and not any("head" in name or "embed_out" in name for name in shapes)
    ):
        yield _named(home, "config.json ties no head to the embeddings, and none is stored")


def _named(home: str, text: str) -> str:
    return f"{home}: {text}" if home else text


def _token_problems(
    folder: Path, home: str, num_rows: int, base: _Base
) -> tuple[list[str], list[str]]:
    """Return the ids of tokenizers and configs that have no embedding row, and notes."""
    problems: list[str] = []
    notes: list[str] = []

    def add(what: str, ids: Mapping[int, str], theirs: Mapping[int, str] | None) -> None:
        beyond = {id_: text for id_, text in sorted(ids.items()) if id_ >= num_rows}
        own = {
            id_: text
            for id_, text in beyond.items()
            if not base.lacks_row(home, id_) or (theirs or {}).get(id_) != text
        }
        rows = f"the {num_rows} rows of the input embeddings"
        if own:
            lines = listing([f"{id_}: {text}" for id_, text in own.items()], limit=5)
            problems.append(_named(home, f"{what}: {len(own)} id(s) beyond {rows}:\n{lines}"))
        elif beyond:
            notes.append(_named(home, f"{what}: {len(beyond)} id(s) beyond {rows}, as in the base"))

    # The tokenizer of a pipeline's text_encoder_2 is in the folder tokenizer_2.
    place = home.replace("text_encoder", "tokenizer")
    if home == "" or place != home:
        try:
            ours = read_tokens(folder / place) or {}
            theirs = (read_tokens(base.root / place) if base.root and ours else None) or {}
            add(f"tokenizer {place}".strip(), _shown(ours), _shown(theirs))
        except OutlierMergeError as error:
            notes.append(f"not checked that all tokens have rows: {error}")
    for name in ("config.json", "generation_config.json"):
        said, theirs_said = read_json(folder / home / name), base.read(_in(home, name))
        add(name, _keys_by_id(said), _keys_by_id(theirs_said))
    return problems, notes


def _shown(tokens: Mapping[int, str]) -> dict[int, str]:
    return {id_: repr(token) for id_, token in tokens.items()}


def _keys_by_id(config: Mapping[str, Any]) -> dict[int, str]:
    """Return the config keys that name token ids, by id."""
    found: dict[int, list[str]] = {}
    for key, ids in named_ids(config).items():
        for id_ in ids:
            found.setdefault(id_, []).append(key)
    return {id_: ", ".join(keys) for id_, keys in found.items()}
