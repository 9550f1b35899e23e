"""The files beside a model's weights, by owner: its config, its tokenizer or its processor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from outliermerge.checkpoint.config import read_json
from outliermerge.errors import OutlierMergeError, shown
from outliermerge.planning.plan import Input
from outliermerge.storage.files import check_file, load_json, small_bytes
from outliermerge.storage.json_text import refuse_other_content, utf8_text
from outliermerge.storage.stamps import same_bytes

Kind = Literal["config", "tokenizer", "processor"]
KINDS: tuple[Kind, ...] = ("config", "tokenizer", "processor")

# Names of the files that tokenizers load. They are from VOCAB_FILES_NAMES of all classes in
# transformers 4 and 5 (Jukebox's files are lists of its conditions), and from mistral-common,
# fairseq, pyctcdecode and sentence-transformers (which stores SentencePiece's model).
_TOKENIZER = re.compile(
    r"tokeniz|vocab|merges|special_tokens_map|added_tokens|chat_template|tekken|sentencepiece"
    r"|^(dict(\.[\w-]+)?\.txt|(byte_maps|emoji|normalizer|encoder|alphabet|unigram|artists|genres"
    r"|lyrics|word_(shape|pronunciation))\.json)$"
    r"|\.(model(\.v\d+\w*)?|tiktoken|spm|jinja|codes)$"
)
_PROCESSOR = re.compile(
    r"processor.*_config\.json$|processor\w*\.py$|^(\w+_)?processing_\w*\.py$"
    r"|^feature_extract\w*\.(py|json)$"
)
# The files beside a config that loaders read; a model may lack all others.
_LOADED = re.compile(
    r"(^|/)((generation_|sentence_bert_)?config|config_sentence_transformers)\.json$|\.py$"
)
# Files of a tokenizer that are not enough for one by themselves.
_NO_TOKENIZER = re.compile(r"\.(py|jinja)$|^chat_template\.json$|^special_tokens_map\.json$")
# The files with an `auto_map`, which names code, and the owner of the code by its class.
_MAPS = re.compile(r"^(config|tokenizer_config|\w*processor_config)\.json$")
_OBJECT = re.compile(
    r"^(((generation_|tokenizer_|adapter_|scheduler_|sentence_bert_|\w*processor_)?config"
    r"|config_sentence_transformers|model_index)\.json"
    r"|(vocab|added_tokens|special_tokens_map|chat_template|tokenizer|tekken)\.json)$"
)
_TEXT = re.compile(r"\.(jinja|tiktoken|py)$|^(vocab|merges|dict)\.txt$")
_MODULE = re.compile(r"^([A-Za-z_]\w*)\.\w+$")
_RELATIVE = re.compile(r"^\s*(?:from\s+\.([A-Za-z_]\w*)\s+import|import\s+\.([A-Za-z_]\w*))", re.M)


def kind_of(name: str) -> Kind:
    """Return the owner of a file by its name: tokenizer or processor, or else the config.

    >>> kind_of("additional_chat_templates/rag.jinja"), kind_of("1_Pooling/config.json")
    ('tokenizer', 'config')
    >>> kind_of("alphabet.json"), kind_of("unigram.json"), kind_of("dict.src.txt")
    ('tokenizer', 'tokenizer', 'tokenizer')
    """
    folder, _, file = name.rpartition("/")
    if _PROCESSOR.search(file):
        return "processor"
    return "tokenizer" if _TOKENIZER.search(file) or folder.startswith("tokenizer") else "config"


def input_named(inputs: Sequence[Input], wanted: str | None) -> Input:
    """Return the input of a name; the first, which is the base, if it is not that of another."""
    return next((entry for entry in inputs if entry.reference == wanted), inputs[0])


def is_loaded(name: str) -> bool:
    """Tell whether loaders read one of a config's files."""
    return _LOADED.search(name) is not None


@dataclass(frozen=True)
class Beside:
    """The files beside a model's weights.

    Attributes:
        reference: the model's name in the spec.
        files: for each kind, the files by their names in an output.
        code: for each kind, the Python files that loaders need, present or not.
    """

    reference: str
    files: Mapping[Kind, Mapping[str, Path]]
    code: Mapping[Kind, set[str]]

    @classmethod
    def of(cls, entry: Input) -> Beside:
        """Find the files of a model; for an adapter its base's files, and its own tokenizer if any.

        Raises:
            OutlierMergeError: a config, or a file with an `auto_map`, is broken.
        """
        names = entry.checkpoint.sidecars
        found = {name: entry.home / name for name in names}
        own: dict[str, Path] = {}
        if (root := entry.tokenizer_home) != entry.home:
            paths = [*root.iterdir(), *(root / "additional_chat_templates").glob("*.jinja")]
            own = {path.relative_to(root).as_posix(): path for path in paths if not path.is_dir()}
        files: dict[Kind, dict[str, Path]] = {kind: {} for kind in KINDS}
        needed: dict[Kind, set[str]] = {}
        for kind in KINDS:
            available = own if own and kind == "tokenizer" else found
            code = _code(available)
            needed[kind] = code[kind]
            for name, path in sorted(available.items()):
                named = [other for other in KINDS if name in code[other]]
                if kind in named or (not named and kind_of(name) == kind):
                    files[kind][name] = path
        return cls(entry.reference, files, needed)

    @property
    def has_tokenizer(self) -> bool:
        names = (name.rpartition("/")[2] for name in self.files["tokenizer"])
        return any(not _NO_TOKENIZER.search(name) for name in names)


def _code(files: Mapping[str, Path]) -> dict[Kind, set[str]]:
    """Return by kind the code files that `auto_map` names, and the files that these import."""
    needed: dict[Kind, set[str]] = {kind: set() for kind in KINDS}
    for name, path in files.items():
        if not _MAPS.search(name):
            continue
        default = kind_of(name)
        for auto_class, module in _auto_map(read_json(path).get("auto_map")):
            kind: Kind = default
            if "Tokenizer" in auto_class:
                kind = "tokenizer"
            elif re.search("Processor|FeatureExtractor", auto_class):
                kind = "processor"
            _add_imports(f"{module}.py", files, needed[kind])
    return needed


def _auto_map(auto_map: Any) -> Iterator[tuple[str, str]]:
    """Yield class and module of each entry, except code in other repositories (`repo--`)."""
    if isinstance(auto_map, (str, list)):  # the form in old tokenizers
        auto_map = {"AutoTokenizer": auto_map}
    for auto_class, value in auto_map.items() if isinstance(auto_map, dict) else ():
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, str) and (match := _MODULE.match(entry)):
                yield auto_class, match[1]


def _add_imports(name: str, files: Mapping[str, Path], found: set[str]) -> None:
    left = [name]
    while left:
        name = left.pop()
        if name not in found and name in files:
            text = small_bytes(files[name]).decode("utf-8", errors="replace")
            left += [f"{match[1] or match[2]}.py" for match in _RELATIVE.finditer(text)]
        found.add(name)


def check_content(path: Path) -> None:
    """Raise OutlierMergeError if a small file's content cannot fit its name.

    A Git LFS pointer or a web page is refused under any name. JSON and text that no loader could
    read are refused in files with such names.
    """
    if path.suffix == ".json":
        if _OBJECT.search(path.name):
            read_json(path)
        else:
            load_json(path)
        return
    data = small_bytes(path)
    try:
        if path.suffix == ".py":  # Python ignores a byte order mark
            data = data.removeprefix(b"\xef\xbb\xbf")
        if _TEXT.search(path.name):
            utf8_text(data)
        refuse_other_content(data)
        if not data and kind_of(path.name) == "tokenizer" and path.suffix != ".py":
            raise ValueError("is empty. Fetch it again.")
    except ValueError as error:
        raise OutlierMergeError(f"{path}: {error}") from error


def choose_files(sources: Mapping[Kind, Beside]) -> dict[str, Path]:
    """Return the files of an output; all files of one kind come from one model.

    Raises:
        OutlierMergeError: a file is broken or links out of its folder, or the code of two sources
            needs different files of one name.
    """
    chosen: dict[str, Path] = {}
    needed: dict[str, tuple[Kind, Path]] = {}
    for kind, beside in sources.items():
        for name, path in beside.files[kind].items():
            if name not in beside.code[kind]:
                chosen.setdefault(name, path)
                continue
            other_kind, other = needed.setdefault(name, (kind, path))
            if not same_bytes(path, other):
                raise OutlierMergeError(
                    f"{shown(name)}: the {other_kind} of {shown(sources[other_kind].reference)} "
                    f"and the {kind} "
                    f"of {shown(beside.reference)} both need their own, and an output can have "
                    "one. Take "
                    "both from one model (`config_source`, `tokenizer_source`, `processor_source`)."
                )
    chosen |= {name: path for name, (_, path) in needed.items()}
    for name, path in chosen.items():
        check_file(path, path.parents[name.count("/")])
        check_content(path)
    return chosen


def missing_code(chosen: Mapping[str, Path]) -> Iterator[str]:
    """Yield a note for code that an output's files need and that is not in the output."""
    lacking = sorted(set().union(*_code(chosen).values()) - chosen.keys())
    if lacking:
        yield (
            "the output's `auto_map` needs code that is not beside its config, tokenizer or "
            f"processor, so that they cannot be loaded: {', '.join(lacking)}"
        )
