"""From a model's name in a spec to a folder: a local path, or a hub id through the hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from outliermerge.checkpoint.folder import (
    PYTORCH_PATTERNS,
    SAFETENSORS_PATTERNS,
    SIDECAR_PATTERNS,
)
from outliermerge.errors import OutlierMergeError, as_path

_HUB_ID = re.compile(r"^(?P<id>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?$")


def is_hub_id(reference: str) -> bool:
    """Tell whether a reference is written like org/name or org/name@revision.

    >>> is_hub_id("liuhaotian/llava-v1.5-13b@main"), is_hub_id("./models/base")
    (True, False)
    """
    return bool(_HUB_ID.match(reference)) and not reference.startswith(("./", "../", "~"))


def resolve(reference: str) -> Path:
    """Return the folder of a model, fetching it from the hub where it is not local.

    A local folder wins over a hub id of the same name. Of a hub repository either the
    safetensors files are fetched or, where it has none, the PyTorch files; never both.

    Raises:
        OutlierMergeError: it is neither here nor to be had from the hub.
    """
    local = as_path(reference)
    if local.exists():
        return local.absolute()
    match = _HUB_ID.match(reference)
    if match is None or not is_hub_id(reference):
        raise OutlierMergeError(
            f"model {reference!r}: no such folder ({local.absolute()}), and not a hub id "
            "(org/name or org/name@revision)"
        )
    return _fetch(reference, match["id"], match["revision"])


def _fetch(reference: str, repo_id: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    def snapshot(patterns: tuple[str, ...]) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision, allow_patterns=[*patterns, *SIDECAR_PATTERNS]
            )
        )

    def has(folder: Path, patterns: tuple[str, ...]) -> bool:
        return any(True for pattern in patterns for _ in folder.glob(pattern))

    try:
        folder = snapshot(SAFETENSORS_PATTERNS)
        if not has(folder, SAFETENSORS_PATTERNS) and not has(folder, PYTORCH_PATTERNS):
            folder = snapshot(PYTORCH_PATTERNS)
        return folder
    except GatedRepoError as error:
        reason = "the repository is gated: accept its terms on the hub and run `hf auth login`"
        cause: Exception = error
    except RevisionNotFoundError as error:
        reason, cause = f"the repository has no revision {revision!r}", error
    except RepositoryNotFoundError as error:
        reason = "the hub has no such repository (or it is private: run `hf auth login`)"
        cause = error
    except LocalEntryNotFoundError as error:
        reason, cause = "it is not in the cache and the hub cannot be reached", error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason, cause = str(error).strip().splitlines()[0], error
    command = f"hf download {repo_id}" + (f" --revision {revision}" if revision else "")
    raise OutlierMergeError(
        f"model {reference!r}: {reason}.\n"
        f"Looked for the folder {Path(reference).absolute()}, then in the hub's cache "
        f"{huggingface_hub.constants.HF_HUB_CACHE}, then at {huggingface_hub.constants.ENDPOINT}.\n"
        f"Fetch it where there is a connection: {command}"
    ) from cause
