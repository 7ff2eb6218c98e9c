"""Upload a model to the hub in one commit: token, repository, what it replaces, errors in one sentence."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from llava.constants import CARD_FILE
from llava.files.terminal_text import shorten, show_list
from llava.hub.card_file import read_card
from llava.hub.model_card import is_example_file, is_untouched
from llava.hub.upload_files import is_model_file

_MESSAGE = "Upload the model with its card"


class HubError(ValueError):
    """The hub can't be reached, or refuses something; the message says what to do."""


class Remote(NamedTuple):
    """A repository on the hub: its commit, whether it is private, and its files."""

    commit: str
    is_private: bool
    files: frozenset[str]


class Changes(NamedTuple):
    """What a push does to the files of a repository, each sorted."""

    added: list[str]
    replaced: list[str]
    removed: list[str]
    kept: list[str]


def refuse_name(repo: str) -> None:
    """Make sure that a repository's name can exist.

    Raises:
        ValueError: if it can't.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"--repo {repo}: {error}") from error
    if "/" not in repo:
        raise ValueError(f"--repo {repo}: name the owner too, as in me/{repo}")


def compare(files: Mapping[str, object], remote: frozenset[str]) -> Changes:
    """Compare what is uploaded with what a repository holds.

    Files of another model there are removed: beside new weights they could be loaded in their place. So are the images
    of a former gallery. All other files stay.
    """
    stale = {name for name in remote - files.keys() if is_model_file(name) or is_example_file(name)}
    return Changes(
        sorted(files.keys() - remote),
        sorted(files.keys() & remote),
        sorted(stale),
        sorted(remote - files.keys() - stale),
    )


def push(
    files: Mapping[str, Path | bytes],
    repo: str,
    *,
    private: bool,
    replaces_card: bool,
    report: Callable[[str], object],
) -> str:
    """Upload files to a repository, which is made if it is not there, in one commit; return its address.

    Args:
        files: by name in the repository: a file, or its content.
        repo: "owner/name".
        private: make a repository that only its owner can see.
        replaces_card: replace a card that was changed on the hub.
        report: called with each line about what is going to happen.

    Raises:
        ValueError: if there is no token, the hub refuses something or can't be reached, or the repository holds what
            must not be replaced.
    """
    refuse_name(repo)
    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE forbids to upload; unset it")
    if not get_token():
        raise HubError("no token for the hub; run: hf auth login, or set HF_TOKEN")
    api = HfApi()
    with explained_errors(repo):
        user = api.whoami()["name"]
    remote = find_remote(api, repo)
    address = f"{api.endpoint}/{repo}"
    is_private = private if remote is None else remote.is_private
    if private and not is_private:
        raise HubError(f"--private: {address} is there already and public; make it private in its settings first")
    if remote is not None and CARD_FILE in remote.files and not replaces_card:
        _refuse_changed_card(api, repo, remote, files)
    changes = compare(files, remote.files if remote else frozenset())
    report(f"to {address} ({'private' if is_private else 'public'}{'' if remote else ', new'}), as {user}")
    for words, names in (("replaces", changes.replaced), ("removes", changes.removed), ("keeps", changes.kept)):
        if names:
            report(f"{words} there: {', '.join(names)}")
    if remote is None:
        with explained_errors(repo):
            api.create_repo(repo, private=private)
    made = "" if remote else f" {address} was made for it;"
    with explained_errors(repo, f";{made} the same command goes on from here, what arrived is not sent twice"):
        commit = _commit(api, repo, remote, files, changes.removed)
    if remote is not None and commit == remote.commit:
        report("nothing to do: all files are there already")
    return address


def _commit(
    api: HfApi, repo: str, remote: Remote | None, files: Mapping[str, Path | bytes], removed: Sequence[str]
) -> str:
    """Upload in one commit, on top of the one that was looked at, and return it once all files are there."""
    operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    info = api.create_commit(
        repo,
        [*operations, *(CommitOperationDelete(name) for name in removed)],
        commit_message=_MESSAGE,
        parent_commit=remote and remote.commit,
    )
    there = frozenset(file.rfilename for file in api.model_info(repo, revision=info.oid).siblings or ())
    if missing := sorted(files.keys() - there):
        raise HubError(
            f"the commit {info.oid} lacks {show_list(missing)}: the repository's .gitignore keeps them out; remove it "
            "there, and run the same command again"
        )
    return info.oid


def _refuse_changed_card(api: HfApi, repo: str, remote: Remote, files: Mapping[str, Path | bytes]) -> None:
    """Refuse to replace a model card that was changed on the hub, unless with the same text."""
    with tempfile.TemporaryDirectory() as folder, explained_errors(repo):
        there = read_card(Path(api.hf_hub_download(repo, CARD_FILE, revision=remote.commit, local_dir=folder)))
    ours = files[CARD_FILE]
    same = there.encode() == (ours if isinstance(ours, bytes) else ours.read_bytes())
    if not same and not is_untouched(there):
        raise HubError(
            f"{CARD_FILE} of {repo} was changed on the hub; copy it into --path to keep it, or pass --replace-card"
        )


def find_remote(api: HfApi, repo: str) -> Remote | None:
    """Return what is in a repository; None if it does not exist.

    Raises:
        HubError: if the hub can't be asked.
    """
    with explained_errors(repo):
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            return None
    return Remote(info.sha, bool(info.private), frozenset(file.rfilename for file in info.siblings or ()))


@contextlib.contextmanager
def explained_errors(repo: str, note: str = "") -> Iterator[None]:
    """Turn whatever the hub's client raises within `with` into a `HubError`.

    Args:
        repo: "owner/name".
        note: added to the message.
    """
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # the client and its transport raise many kinds, of two libraries
        raise HubError(_explain(error, repo) + note) from error


def _explain(error: Exception, repo: str) -> str:
    causes = list(_causes(error))
    endpoint, status = constants.ENDPOINT, next(filter(None, map(_status, causes)), None)
    said = shorten(" ".join(str(error if status else causes[-1]).split()))
    if status == 401:
        return f"{endpoint} refuses the token; run: hf auth login, or set HF_TOKEN to one that is valid"
    if status == 403:
        return (
            f"the token may not write to {repo}; make one with write access at {endpoint}/settings/tokens, or name "
            f"another --repo ({said})"
        )
    if status is not None and status >= 500:
        return f"{endpoint} has trouble (HTTP {status})"
    if status is not None:
        return f"{endpoint} refuses it (HTTP {status}): {said}"
    if isinstance(error, ValueError):
        return f"{endpoint} does not answer as the hub ({said}); check HF_ENDPOINT if you set it"
    return f"{endpoint} can't be reached ({said}); check the network, and HF_ENDPOINT if you set it"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error of the client holds; None without one."""
    return getattr(getattr(error, "response", None), "status_code", None)
