"""Resolves a model's name in a spec to a path: a local one, or a hub id through the hub's cache."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

from outliermerge.checkpoint.config import read_json
from outliermerge.checkpoint.folders.absent import (
    hub_id_of,
    is_model,
    is_slip,
    names_of,
    path_meant,
)
from outliermerge.checkpoint.folders.beside import sidecars_of
from outliermerge.checkpoint.folders.folder import MODULES_NAME, PIPELINE_NAME, module_folders
from outliermerge.checkpoint.folders.loaded import OpenChoiceError, choose
from outliermerge.checkpoint.formats.table import PATTERNS
from outliermerge.errors import OutlierMergeError, as_path, direct, listing, quoted, shown
from outliermerge.storage.files import load_json

_LOGGER = logging.getLogger(__name__)
_HUB_ID = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?$")
_ADAPTER = r"adapter_model\.(bin|safetensors)"  # safetensors is preferred
_NO_WEIGHTS = f"weights ({PATTERNS})"


def is_hub_id(reference: str) -> bool:
    """Tell whether a reference has the form org/name or org/name@revision.

    >>> is_hub_id("liuhaotian/llava-v1.5-13b@main"), is_hub_id("./models/base")
    (True, False)
    """
    return bool(_HUB_ID.match(reference)) and not reference.startswith(("./", "../", "~"))


def resolve(reference: str, only: Callable[[str], bool] | None = None) -> Path:
    """Return the folder or file of a model, fetched from the hub if it is not local.

    A local path has precedence over a hub id of the same name. From a repository of the hub, only
    the weights that `open_checkpoint` reads are fetched, in one format, and the small files beside
    them. If the hub does not answer, a snapshot in its cache is used if it is complete.

    Args:
        only: tells by their names which files are wanted, instead of weights.

    Raises:
        OutlierMergeError: the model is neither local nor available from the hub.
    """
    local = as_path(reference)
    if local.exists():
        return direct(local.absolute())
    refuse_absent(reference)
    match = _HUB_ID.match(reference)
    assert match is not None
    repo_id, revision = match["id"], match["revision"]
    try:
        return _fetch(repo_id, revision, only)
    except OutlierMergeError as error:
        from huggingface_hub import constants

        command = f"hf download {repo_id}" + (f" --revision {revision}" if revision else "")
        asked = "" if constants.HF_HUB_OFFLINE else f", then at {constants.ENDPOINT}"
        absolute = direct(local.absolute())
        here = names_of(absolute.parent)
        has = f"\nThe folder {local.parent} has: {shown(', '.join(here))}" if here else ""
        raise OutlierMergeError(
            f"model {quoted(reference)}: {error}\nLooked for {absolute}, then in the hub's "
            f"cache {constants.HF_HUB_CACHE}{asked}.\nTo fetch it: {command}{has}"
        ) from error


def refuse_absent(reference: str, *, beside: Path | None = None) -> None:
    """Refuse a model that is neither local nor can be on the hub, without asking the hub.

    A path that a slip of the keys separates from a local model is no hub id.

    Args:
        beside: the folder of the file that names the model, where it may be meant to be.

    Raises:
        OutlierMergeError: there is no such model; the message says where it was looked for, and
            what may have been meant.
    """
    local = as_path(reference)
    if local.exists():
        return
    absent = (
        f"model {quoted(reference)}: no such file or folder ({shown(direct(local.absolute()))})"
    )
    meant = path_meant(local)
    could_be_hub = is_hub_id(reference)
    if beside is not None and not local.is_absolute() and (beside / local).exists():
        raise OutlierMergeError(
            f"{absent}. Paths start from the folder where the command runs, and it is beside the "
            f"file that names it: write {quoted(os.path.relpath(beside / local))}"
        )
    if could_be_hub:
        slip = meant is not None and is_slip(str(local), str(meant)) and is_model(meant)
        if not slip or "@" in reference or _is_in_cache(reference):
            return
        raise OutlierMergeError(
            f"{absent}. Did you mean {quoted(str(meant))}? To fetch a model of that name from the "
            f"hub, write {quoted(reference + '@main')}"
        )
    if page := hub_id_of(reference):
        raise OutlierMergeError(f"model {quoted(reference)}: is an address, write {quoted(page)}")
    if meant is not None:
        raise OutlierMergeError(f"{absent}. Did you mean {quoted(str(meant))}?")
    raise OutlierMergeError(f"{absent}, and not a hub id (org/name or org/name@revision)")


def _is_in_cache(repo_id: str) -> bool:
    from huggingface_hub import constants

    return (Path(constants.HF_HUB_CACHE) / f"models--{repo_id.replace('/', '--')}").is_dir()


def _fetch(repo_id: str, revision: str | None, only: Callable[[str], bool] | None) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    def snapshot(names: list[str], revision: str | None) -> Path:
        patterns = [glob.escape(name) for name in names]
        return Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=patterns))

    # The client does not catch the exceptions of its network libraries, which differ by version.
    try:
        info = hub.HfApi().model_info(
            repo_id, revision=revision, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT
        )
    except RevisionNotFoundError as error:
        raise OutlierMergeError(f"{_reason(error, repo_id, revision)}.") from error
    except Exception as error:
        return _from_cache(repo_id, revision, error, only)
    names = [file.rfilename for file in info.siblings or ()]
    try:
        if only is not None:
            return snapshot([*filter(only, names)], revision)
        lists = [name for name in (PIPELINE_NAME, MODULES_NAME) if name in names]
        folder = snapshot(lists, revision) if lists else Path()
        parts = _parts(names, folder)
        if guides := [n for n in names if _is_guide(n, parts)]:
            folder = snapshot(guides, folder.name or revision)
        weights = _weights(names, folder, parts)
        if weights:
            wanted = [*sidecars_of(names, parts), *weights]
            return snapshot(wanted, folder.name or revision)
    except OutlierMergeError:
        raise
    except Exception as error:
        kept = "\nFiles that have arrived are kept: the same command goes on with the others."
        reason = _reason(error, repo_id, revision)
        refused = isinstance(error, GatedRepoError)
        raise OutlierMergeError(f"{reason}.{'' if refused else kept}") from error
    raise OutlierMergeError(
        f"the repository has no {_NO_WEIGHTS}. It has:\n{listing(sorted(names), limit=10)}"
    )


def _from_cache(
    repo_id: str, revision: str | None, error: Exception, only: Callable[[str], bool] | None
) -> Path:
    """Return the snapshot in the cache after the hub has not answered, if it is complete."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    reason = _reason(error, repo_id, revision)
    try:
        folder = Path(
            hub.snapshot_download(
                repo_id, revision=revision, local_files_only=True, allow_patterns=[]
            )
        )
    except (OSError, ValueError):
        raise OutlierMergeError(f"{reason}.") from error
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    present = {name for name, path in paths.items() if path.is_file()}
    names = present | {name for name, path in paths.items() if path.is_symlink()}
    # Without a listing (with an older huggingface_hub, for example) an index still names its files.
    if hasattr(hub, "get_cached_repo_tree"):
        try:
            listed = hub.get_cached_repo_tree(repo_id, revision=folder.name)
            names |= {file.path for file in listed}
        except errors.CachedRepoTreeNotFoundError:
            pass
    if only is not None:
        missing = sorted({*filter(only, names)} - present)
    else:
        parts = _parts(names, folder)
        weights = _weights(names, folder, parts)
        needed = {*sidecars_of(names, parts), *weights}
        missing = sorted(needed - present) + ([] if weights else [_NO_WEIGHTS])
    if missing:
        raise OutlierMergeError(
            f"{reason}, and the snapshot {folder} lacks:\n{listing(missing)}"
        ) from error
    if not isinstance(error, errors.OfflineModeIsEnabled):
        _LOGGER.warning("%s: %s; the snapshot in the cache is used", repo_id, reason)
    return folder


def _parts(names: Collection[str], folder: Path) -> list[str]:
    """Return the folders of a repository that contain a model's weights, "" for its root."""
    pipeline = load_json(folder / PIPELINE_NAME) if PIPELINE_NAME in names else None
    if isinstance(pipeline, dict):
        return [key for key, value in pipeline.items() if isinstance(value, list)]
    modules = load_json(folder / MODULES_NAME) if MODULES_NAME in names else None
    return list(dict.fromkeys(["", *module_folders(modules)]))


def _is_guide(name: str, parts: Collection[str]) -> bool:
    """Tell whether a file determines which weights are read."""
    part, _, file = name.rpartition("/")
    return part in parts and (file == "config.json" or ".index." in file)


def _weights(names: Collection[str], folder: Path, parts: Collection[str]) -> list[str]:
    """Return the weight files that `open_checkpoint` reads; an index in the folder is followed."""
    chosen: list[str] = []
    for part in parts:
        prefix = f"{part}/" if part else ""
        inside = sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
        inside = [name for name in inside if "/" not in name]
        if "adapter_config.json" in inside:
            files = [name for name in inside if re.fullmatch(_ADAPTER, name)][-1:]
            chosen += [prefix + file for file in files]
        config = read_json(folder / part / "config.json") if "config.json" in inside else {}
        try:
            choice = choose(inside, config, loose=not part)
        except OpenChoiceError as error:
            raise OutlierMergeError(
                f"{error}. Fetch one with `hf download … --include … --local-dir …` and name that "
                "folder."
            ) from error
        if choice is None:
            continue
        files = [*choice.files]
        if choice.index:
            content = load_json(folder / part / choice.index)
            weight_map = content.get("weight_map") if isinstance(content, dict) else None
            if isinstance(weight_map, dict):
                files = [str(file) for file in dict.fromkeys(weight_map.values())]
            files.append(choice.index)
        chosen += [prefix + file for file in files]
    return chosen


def _reason(error: Exception, repo_id: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors, get_token

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    has_token = get_token() is not None
    log_in = "run `hf auth login` or set HF_TOKEN"
    match error:
        case errors.OfflineModeIsEnabled():
            return "the hub is not asked, as HF_HUB_OFFLINE is set"
        case errors.GatedRepoError():
            ask = f"ask for access at {constants.ENDPOINT}/{repo_id}"
            then = "your token has no access" if has_token else f"then {log_in}"
            return f"the repository is gated: {ask}; {then}"
        case errors.RevisionNotFoundError():
            return f"the repository has no revision {revision!r}"
        case errors.RepositoryNotFoundError():
            private = "your token may not read it" if has_token else f"it is private: {log_in}"
            return f"the hub has no such repository, or {private}"
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return f"the hub refuses the token that was sent: {log_in}"
        case errors.HfHubHTTPError() if error.server_message:
            return f"the hub answers {error.response.status_code}: {error.server_message}"
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, (OSError, errors.HFValidationError)):
        return text
    return f"the connection to the hub failed: {text}"
