"""Resolves a model's name in a spec to a path: a local one, or a hub id through the hub's cache."""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from outliermerge.checkpoint.folders.absent import (
    hub_id_of,
    is_model,
    is_slip,
    names_of,
    path_meant,
)
from outliermerge.checkpoint.folders.beside import CARD_NAME, sidecars_of
from outliermerge.checkpoint.folders.chosen import (
    NO_WEIGHTS,
    parts_of,
    wanted_files,
    weights_of,
)
from outliermerge.checkpoint.folders.remote import (
    Place,
    fetch_model,
    place_of,
    streamed,
)
from outliermerge.checkpoint.formats.table import SUFFIXES
from outliermerge.errors import (
    OutlierMergeError,
    argument,
    as_path,
    direct,
    listing,
    quoted,
    shown,
)
from outliermerge.storage.addresses import is_address, without_secrets
from outliermerge.storage.hub_token import hub_token

_LOGGER = logging.getLogger(__name__)
_HUB = "hf://"
_HUB_ID = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?$")


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
        if streamed() == "only" and only is None:
            raise OutlierMergeError(
                f"model {quoted(reference)}: is yours and on this machine, and nothing of yours is "
                f"deleted. Leave out {argument('delete_inputs_as_read', True)}, or name its "
                "address."
            )
        return direct(local.absolute())
    refuse_absent(reference)
    on_hub = reference.removeprefix(_HUB)
    if is_address(on_hub):
        return fetch_model(place_of(on_hub), only)
    from huggingface_hub import constants

    match = _HUB_ID.match(on_hub)
    assert match is not None
    repo_id, revision = match["id"], match["revision"]
    try:
        if not constants.HF_HUB_OFFLINE:
            hub_token()  # refuses what no client could send
        if on_hub != reference or streamed() in ("all", "only"):
            return _stream(repo_id, revision, only)
        if streamed() == "headers" and only is None:
            with suppress(OutlierMergeError):  # then it is fetched, which tells what is wrong
                return _stream(repo_id, revision, None)
        return _fetch(repo_id, revision, only)
    except OutlierMergeError as error:
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
    if reference.startswith(_HUB):
        if _HUB_ID.match(reference.removeprefix(_HUB)):
            return
        raise OutlierMergeError(
            f"model {quoted(reference)}: expected hf://org/name or hf://org/name@revision"
        )
    if is_address(reference) and (hub_id_of(reference) is None or reference.endswith(SUFFIXES)):
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
        raise OutlierMergeError(f"{reason_of(error, repo_id, revision)}.") from error
    except Exception as error:
        return _from_cache(repo_id, revision, error, only)
    names = [file.rfilename for file in info.siblings or ()]
    try:
        if only is not None:
            return snapshot([*filter(only, names)], revision)
        folder = Path()

        def fetch(wanted: list[str]) -> Path:
            nonlocal folder
            folder = snapshot(wanted, folder.name or revision)  # of one commit
            return folder

        # The card tells the model's licence.
        return fetch([*wanted_files(names, fetch), *({CARD_NAME} & {*names})])
    except OutlierMergeError:
        raise
    except Exception as error:
        kept = "\nFiles that have arrived are kept: the same command goes on with the others."
        reason = reason_of(error, repo_id, revision)
        refused = isinstance(error, GatedRepoError)
        raise OutlierMergeError(f"{reason}.{'' if refused else kept}") from error


def _stream(repo_id: str, revision: str | None, only: Callable[[str], bool] | None) -> Path:
    """Return a private folder with a repository's small files; its weights are read by ranges.

    A snapshot in the hub's cache is used, if it is complete.

    Raises:
        OutlierMergeError: they cannot be read so, or the hub does not answer.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        info = hub.HfApi().model_info(
            repo_id, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except RevisionNotFoundError as error:
        raise OutlierMergeError(f"{reason_of(error, repo_id, revision)}.") from error
    except Exception as error:
        return _from_cache(repo_id, revision, error, only)
    commit = info.sha or revision or "main"
    with suppress(OSError, ValueError, OutlierMergeError):
        cached = Path(
            hub.snapshot_download(
                repo_id, revision=commit, local_files_only=True, allow_patterns=[]
            )
        )
        if not _lacking(repo_id, cached, only):
            return cached
    place = Place(
        address=f"{_HUB}{repo_id}" + (f"@{revision}" if revision else ""),
        address_of=lambda name: hub.hf_hub_url(repo_id, name, revision=commit),
        names=tuple(file.rfilename for file in info.siblings or ()),
        version=commit,
    )
    return fetch_model(place, only)


def _from_cache(
    repo_id: str, revision: str | None, error: Exception, only: Callable[[str], bool] | None
) -> Path:
    """Return the snapshot in the cache after the hub has not answered, if it is complete."""
    import huggingface_hub as hub
    from huggingface_hub import errors

    reason = reason_of(error, repo_id, revision)
    try:
        folder = Path(
            hub.snapshot_download(
                repo_id, revision=revision, local_files_only=True, allow_patterns=[]
            )
        )
    except (OSError, ValueError):
        raise OutlierMergeError(f"{reason}.") from error
    missing = _lacking(repo_id, folder, only)
    if missing:
        raise OutlierMergeError(
            f"{reason}, and the snapshot {folder} lacks:\n{listing(missing)}"
        ) from error
    if not isinstance(error, errors.OfflineModeIsEnabled):
        _LOGGER.warning("%s: %s; the snapshot in the cache is used", repo_id, reason)
    return folder


def _lacking(repo_id: str, folder: Path, only: Callable[[str], bool] | None) -> list[str]:
    """Return what a snapshot in the cache lacks of the files that are read."""
    import huggingface_hub as hub
    from huggingface_hub import errors

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
        return sorted({*filter(only, names)} - present)
    parts = parts_of(names, folder)
    weights = weights_of(names, folder, parts)
    needed = {*sidecars_of(names, parts), *weights}
    return sorted(needed - present) + ([] if weights else [NO_WEIGHTS])


def reason_of(error: Exception, repo_id: str, revision: str | None) -> str:
    """Return in words what an error of the hub's client means."""
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
    text = without_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])
    if isinstance(error, (OSError, errors.HFValidationError)):
        return text
    if text.lower().startswith("illegal"):  # an answer that is no HTTP
        asked = f"HF_ENDPOINT is {constants.ENDPOINT}: is a hub there, without a proxy before it"
        return f"the answer of the hub is not to be understood ({text}). {asked}?"
    return f"the connection to the hub failed: {text}"
