"""Sends an output to a repository of the hub, in one commit: all of it is there, or nothing."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outliermerge.checkpoint.checksum import file_checksum
from outliermerge.checkpoint.folders.beside import CARD_NAME
from outliermerge.checkpoint.folders.hub import is_hub_id, reason_of
from outliermerge.errors import ArgumentError, OutlierMergeError, argument, listing, quoted, shown
from outliermerge.output.licences import front_matter
from outliermerge.output.manifest_file import read_manifest
from outliermerge.output.names import manifest_path, real_output, shard_path
from outliermerge.storage.addresses import is_address
from outliermerge.storage.files import read_bytes
from outliermerge.storage.hub_token import hub_token
from outliermerge.storage.stamps import FileStamp

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

_OF_THE_HUB = ".gitattributes"  # it makes that file, and says in it which files are large
_DEFAULT = "main"


class Push:
    """What is sent, and where to.

    Args:
        output: a folder, or a file, that a merge has written.
        repo_id: `org/name`; it is made if it is not there.
        revision: the branch, which is made if it is not there.
        private: a new repository is private.
        overwrite: files that are there are replaced, and others removed, in the same commit.

    Raises:
        ArgumentError: there can be no such repository.
        OutlierMergeError: it is no output.
    """

    def __init__(
        self,
        output: str | Path,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool = False,
        overwrite: bool = False,
    ) -> None:
        import huggingface_hub as hub

        self.repo_id, self.revision = _valid(repo_id), revision or _DEFAULT
        self._private, self._overwrite = private, overwrite
        self.output = _output(output, repo_id)
        self.files = _files_of(self.output)
        self._stamps = {name: FileStamp.of(path) for name, path in self.files.items()}
        token = hub_token()
        if token is None:
            raise OutlierMergeError(
                f"{self.repo_id}: no token of the hub is here: run `hf auth login` or set "
                "HF_TOKEN. It must have the right to write."
            )
        self._api = hub.HfApi(token=token, library_name="outliermerge")
        self.is_new = self.is_there = False
        self._has_branch = True
        self._head: str | None = None
        self.removed: list[str] = []

    @property
    def num_bytes(self) -> int:
        """How many bytes the files have."""
        return sum(stamp.num_bytes for stamp in self._stamps.values())

    def sizes(self) -> dict[str, int]:
        """Return the number of bytes of each file."""
        return {name: stamp.num_bytes for name, stamp in self._stamps.items()}

    def look(self) -> None:
        """Look at what is there, and change nothing.

        Raises:
            OutlierMergeError: the hub does not answer, or the files would replace others.
        """
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        with self._asking():
            try:
                main = self._api.model_info(self.repo_id)
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401:
                    raise
                self.is_new, self._has_branch = True, self.revision == _DEFAULT
                return
            if self._private and not main.private:
                raise OutlierMergeError(
                    f"{self.repo_id}: is there and public, and {argument('private')} makes only a "
                    "new repository private. Make it private in its settings, or choose another "
                    "name."
                )
            self._head = main.sha
            if self.revision != _DEFAULT:
                try:
                    self._head = self._api.model_info(self.repo_id, revision=self.revision).sha
                except RevisionNotFoundError:
                    self._has_branch = False
            self._compare(is_own=self.revision == _DEFAULT or self._head != main.sha)

    def _compare(self, *, is_own: bool) -> None:
        """Compare with what is there.

        Args:
            is_own: it is not only what a new branch has of the one that it starts from.
        """
        there = self._listed(self._head)
        self.removed = sorted(there.keys() - self.files.keys())
        others = [name for name in there if name in self.removed or not self._is_same(there[name])]
        self.is_there = not others and there.keys() == self.files.keys()
        if others and is_own and not self._overwrite:
            raise OutlierMergeError(
                f"{self.where}: has other files, which would be replaced or left beside:\n"
                f"{listing(sorted(others), limit=10)}\n"
                f"Choose another name or another {argument('revision')}, or replace them with "
                f"{argument('overwrite', True)}: all in one commit, and the old ones stay in the "
                "history."
            )

    def _listed(self, revision: str | None) -> dict[str, RepoFile]:
        """Return the files of a commit, without the one that the hub makes."""
        from huggingface_hub.hf_api import RepoFile

        found = self._api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        files = {each.path: each for each in found if isinstance(each, RepoFile)}
        return {name: file for name, file in files.items() if name != _OF_THE_HUB}

    def _is_same(self, there: RepoFile) -> bool:
        path = self.files[there.path]
        if there.size != self._stamps[there.path].num_bytes:
            return False
        if there.lfs is not None:
            return bool(file_checksum(path) == there.lfs.sha256)
        content = path.read_bytes()
        return bool(
            hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == there.blob_id
        )

    def send(self, on_file: Callable[[str, int], object] = lambda name, num_bytes: None) -> str:
        """Send the files, and return the address of the commit.

        What has arrived is kept if this is stopped, so that it goes on there.

        Args:
            on_file: is told of each file of weights that has arrived, and its size.

        Raises:
            OutlierMergeError: it cannot be sent, or a file was changed meanwhile.
        """
        import huggingface_hub as hub

        api = self._api
        to: dict[str, Any] = {"repo_id": self.repo_id, "revision": self.revision}
        operations: list[Any] = [
            hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path))
            for name, path in self.files.items()
        ]
        with self._asking(sending=True):
            if self.is_new:
                api.create_repo(self.repo_id, private=self._private or None, exist_ok=True)
            if not self._has_branch:
                api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            for operation in operations:  # one at a time, so that each that has arrived counts
                name = operation.path_in_repo
                if name.endswith(".safetensors"):
                    api.preupload_lfs_files(additions=[operation], free_memory=False, **to)
                    on_file(name, self._stamps[name].num_bytes)
            self._refuse_changed()
            operations += [hub.CommitOperationDelete(path_in_repo=name) for name in self.removed]
            commit = api.create_commit(
                operations=operations,
                commit_message=f"Merge by outliermerge: {len(self.files)} files",
                parent_commit=self._head,
                **to,
            )
            self._check(str(commit.oid))
        return str(commit.commit_url)

    def _refuse_changed(self) -> None:
        """Refuse to publish a file that was changed since it was proved."""
        for name, path in self.files.items():
            if FileStamp.of(path) != self._stamps[name]:
                raise OutlierMergeError(
                    f"{path}: was changed while it was sent. Nothing is published; give the "
                    "command again."
                )

    def _check(self, commit: str) -> None:
        """Raise an error if the commit lacks a file, as what a .gitignore there names."""
        there = {name: file.size for name, file in self._listed(commit).items()}
        lacking = [name for name, size in self.sizes().items() if there.get(name) != size]
        if lacking:
            raise OutlierMergeError(
                f"{self.where}: the hub has left out {len(lacking)} file(s), or has them in "
                f"another size:\n{listing(lacking)}\nDoes a .gitignore there name them?"
            )

    def notes(self) -> list[str]:
        """Return what should be known of the model card before others see it."""
        card = self.files.get(CARD_NAME)
        if card is None:
            return ["there is no model card: a merge that writes a folder has one"]
        front = front_matter((read_bytes(card) or b"").decode("utf-8", "replace"))
        said = []
        if "license" not in front:
            said.append(f"{CARD_NAME} names no licence: see below its models")
        elif front["license"] == "other" and "license_name" not in front:
            said.append(
                f"the merged models have different licences: see {CARD_NAME}, below its models"
            )
        if "base_model" not in front:
            said.append(f"{CARD_NAME} names no `base_model`: none of the models has a hub id here")
        return said

    @property
    def where(self) -> str:
        """The repository and the branch, as they are named."""
        return self.repo_id + (f"@{self.revision}" if self.revision != _DEFAULT else "")

    @contextmanager
    def _asking(self, *, sending: bool = False) -> Iterator[None]:
        """Tell errors of the hub's client, which are of many kinds, in one way."""
        kept = " What has arrived is kept: the same command goes on." if sending else ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the client, on what it finds in the card
                yield
        except OutlierMergeError:
            raise
        except Exception as error:
            raise OutlierMergeError(f"{self.where}: {self._reason(error)}.{kept}") from error

    def _reason(self, error: Exception) -> str:
        if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            return f"{str(error).rstrip('.')}: {self._reason(error.__cause__)}"  # it names the file
        if type(error) is ValueError:  # such as: wrong metadata in README.md, in several lines
            return " ".join(str(error).split()).rstrip(".")
        reason = reason_of(error, self.repo_id, self.revision).rstrip(".")
        may_write = " (has your token the right to write there?)" if "answers 403" in reason else ""
        if "xet" in reason:
            may_write = ". If the server has no xet, set HF_HUB_DISABLE_XET=1"
        return reason + may_write


def _valid(repo_id: str) -> str:
    if not is_hub_id(repo_id) or "@" in repo_id:
        raise ArgumentError(f"{quoted(repo_id)}: is no repository: expected org/name")
    return repo_id


def _output(named: str | Path, repo_id: str) -> Path:
    if is_address(str(named)):
        raise OutlierMergeError(
            f"{named}: only an output on this machine can be pushed. Fetch it to a folder first."
        )
    path = real_output(Path(named))
    if path.is_dir() and not manifest_path(path).is_file():
        try:
            read_manifest(path)  # it says what is wrong with a folder that is not finished
        except OutlierMergeError as error:
            raise OutlierMergeError(
                f"{error}\nOnly outputs are pushed, as only they can be proved. The hub's own "
                f"program sends any folder: hf upload {repo_id} {shown(named)}"
            ) from error
    return path


def _files_of(output: Path) -> dict[str, Path]:
    """Return the files of an output by their names in a repository, the manifest last."""
    manifest, manifest_file = read_manifest(output), manifest_path(output)
    folder = manifest_file.parent
    if output.is_dir():
        files = {name: shard_path(output, name) for name in manifest["shards"]}
    else:
        files = {output.name: output}
    files |= {name: folder / name for name in manifest["files"]}
    if wrong := [name for name in files if name.startswith("/") or ".." in Path(name).parts]:
        raise OutlierMergeError(f"{manifest_file}: names files outside: {listing(wrong)}")
    missing = [name for name, path in files.items() if not path.is_file() and name != CARD_NAME]
    if missing:
        raise OutlierMergeError(
            f"{output}: {len(missing)} file(s) of its manifest are missing:\n{listing(missing)}"
        )
    files = {name: path for name, path in files.items() if path.is_file()}
    return files | {manifest_file.name: manifest_file}
