"""Publishing: a checkpoint with everything that tells what it is, in one commit.

One commit is all or nothing, so a broken upload leaves no half of a model behind, and running again finishes it (large
files that had arrived are not sent twice). Content that is there already makes no commit.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import PICTURE_NAME, model_card, read_run
from .config import CONFIG_NAME
from .description import Description
from .errors import AdaPruneError, HubError, MissingDependencyError
from .names import rename
from .public import without_tokens
from .publication import check_checkpoint, forbid_tokens, is_ours, public_files, stays_inside
from .saving import save_pruned
from .width_plot import plot_widths

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

    from .pipeline import PruningResult
    from .recovery_result import RecoveryResult

__all__ = ["push_to_hub"]

logger = logging.getLogger(__name__)

_ADVICE = {
    401: "Log in with `hf auth login`, or set HF_TOKEN to a token that may write.",
    403: "The token may not write there. Use one with write access, or another repository.",
    404: "Check the name of the repository and the revision; a private one needs a token that sees it.",
    409: "The repository changed meanwhile. Run the same command again.",
    412: "The repository changed meanwhile. Run the same command again.",
    413: "A file is too large for one upload. Save with a smaller `max_shard_size`, such as 5GB, and push that.",
    429: "Too many requests. Wait a little and run the same command again.",
}


def push_to_hub(
    source: PruningResult | RecoveryResult | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    journal: str | os.PathLike[str] | None = None,
    remote_code: bool = False,
) -> CommitInfo:
    """Publish a pruned model: weights, tokenizer, plan, record of the run, journal, card and picture in one commit.

    Files are named without their folders in everything that is published. A README.md in the folder is published as it
    stands; otherwise a card is written.

    Args:
        source ([`PruningResult`], [`RecoveryResult`] or `str`): what [`prune`] or [`recover`] returned, or the folder
            it was saved to.
        repo_id (`str`): `owner/name`, or a name of your own; made where it is missing.
        private (`bool`, *optional*): of a repository that is made. With `True`, one that is public is refused.
        token (`str` or `bool`, *optional*): the one of `hf auth login` or `HF_TOKEN` where not given.
        revision (`str`, *optional*): branch, made where it is missing; `main` where not given.
        create_pr (`bool`, *optional*, defaults to `False`): open a pull request instead.
        commit_message (`str`, *optional*): of the commit.
        license (`str`, *optional*): for the card; the base model's own where not given and known.
        base_model (`str`, *optional*): id of the dense model on the Hub, where the run loaded it from a folder.
        journal (`str`, *optional*): journal of the search; that of the result, or `FOLDER.journal.jsonl` beside the
            folder where not given and there.
        remote_code (`bool`, *optional*, defaults to `False`): add the Python file with which
            `trust_remote_code=True` loads the model without this package. A folder that was saved with one has it
            written anew.

    Returns:
        `huggingface_hub.CommitInfo`: with `commit_url` and, for a pull request, `pr_url`.

    Raises:
        CheckpointError: the folder is no checkpoint of this package, or must not be published as it is.
        HubError: the Hub refused or broke off; nothing is published then.
    """
    from huggingface_hub import get_token

    secret = token if isinstance(token, str) else get_token() if token is not False else None
    with _folder(source, remote_code) as folder, tempfile.TemporaryDirectory(prefix="hf_adaprune_") as staging:
        searched = _journal_of(source, folder) if journal is None else Path(journal)
        stays_inside(folder / CONFIG_NAME, folder)
        record = read_run(folder)
        description = check_checkpoint(folder, record)
        # Everything is checked before anything is sent.
        files, shown = public_files(folder, record, searched, Path(staging), remote_code, secret)
        with _told(secret, repo_id):
            api = _api(token)
            if (folder / "README.md").is_file():
                stays_inside(folder / "README.md", folder)
                files["README.md"] = folder / "README.md"
            else:
                picture = _picture(description, Path(staging) / PICTURE_NAME, repo_id)
                if picture is not None:
                    files[PICTURE_NAME] = picture
                options: dict[str, Any] = {"base_model": base_model, "picture": picture is not None}
                card = model_card(shown, repo_id, license=license, **options)
                dense = card.data.to_dict().get("base_model")
                if license is None and dense:
                    card = model_card(shown, repo_id, license=_license_of(api, dense), **options)
                files["README.md"] = str(card).encode()
            forbid_tokens({"README.md": files["README.md"]}, secret)
            repo_id = _repository(api, repo_id, private, create_pr)
            commit = _commit(api, repo_id, files, revision, create_pr, commit_message or "Upload pruned model")
    if not isinstance(source, (str, os.PathLike)) and revision in (None, "main") and not create_pr:
        rename(source.model, repo_id)  # what the id alone loads
    return commit


# -- the folder -------------------------------------------------------------------------------------------------------


@contextmanager
def _folder(source: PruningResult | RecoveryResult | str | os.PathLike[str], remote_code: bool) -> Iterator[Path]:
    if isinstance(source, (str, os.PathLike)):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="hf_adaprune_") as place:
        name = source.model.name_or_path
        try:
            yield save_pruned(source, Path(place) / "model", remote_code=remote_code)
        finally:
            rename(source.model, name)  # the folder goes


def _journal_of(source: Any, folder: Path) -> Path | None:
    if isinstance(source, (str, os.PathLike)):
        beside: Path | None = folder.absolute().with_name(folder.absolute().name + ".journal.jsonl")
    else:
        search = getattr(source, "search", None)  # what `recover` returned has none
        beside = search.journal.path if search is not None else None
    return beside if beside is not None and beside.is_file() else None


def _picture(description: Description, file: Path, repo_id: str) -> bytes | None:
    if not description.layers:
        return None
    try:
        plot_widths(description.layers, file, repo_id.rsplit("/", 1)[-1])
    except MissingDependencyError as error:
        logger.warning("the card has no picture of the widths: %s", error)
        return None
    return file.read_bytes()


# -- the Hub ----------------------------------------------------------------------------------------------------------


def _api(token: str | bool | None) -> HfApi:
    from huggingface_hub import HfApi

    from . import __version__

    return HfApi(token=token, library_name="hf_adaprune", library_version=__version__)


@contextmanager
def _told(secret: str | None, repo_id: str) -> Iterator[None]:
    """Errors of the Hub and of the connection as [`HubError`], without tokens, and with what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    message = ""
    try:
        yield
    except AdaPruneError:
        raise
    except HFValidationError as error:
        message = f"{repo_id!r} is no name of a repository ({_line(error)}). Write it as owner/name."
    except Exception as error:
        # Large files fail inside threads, as a RuntimeError around what happened.
        cause = error if isinstance(error, HfHubHTTPError) else error.__cause__ or error
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            advice = _ADVICE.get(status, "Run the same command again; what has arrived is not sent twice.")
            said = f"the Hub answered {status} ({cause.server_message or _line(cause)})"
            message = f"{said}. Nothing was published to {repo_id}. {advice}"
        else:
            message = (
                f"the upload to {repo_id} broke off ({type(cause).__name__}: {_line(cause)}). Nothing was published. "
                "Run the same command again; what has arrived is not sent twice."
            )
    if message:
        # Not `from error`: a traceback would print what the message leaves out.
        raise HubError(without_tokens(message, secret)) from None


def _line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _license_of(api: HfApi, base: str) -> dict[str, str]:
    """License fields of the base model's card; nothing where it cannot be read."""
    from huggingface_hub import RepoCard

    try:
        with tempfile.TemporaryDirectory(prefix="hf_adaprune_") as place:
            data = RepoCard.load(api.hf_hub_download(base, "README.md", cache_dir=place)).data.to_dict()
    except Exception as error:
        logger.info("the license of %s could not be looked up (%s); the card states none.", base, type(error).__name__)
        return {}
    names = ("license", "license_name", "license_link")
    return {name: data[name] for name in names if isinstance(data.get(name), str)} if "license" in data else {}


def _repository(api: HfApi, repo_id: str, private: bool | None, create_pr: bool) -> str:
    """Make the repository where it is missing; its full name."""
    if not create_pr or "/" not in repo_id or not api.repo_exists(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise HubError(
            f"{repo_id} exists and is public, and this push is private. Name another one, or drop `private`."
        )
    return repo_id


def _commit(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    revision: str | None,
    create_pr: bool,
    message: str,
) -> CommitInfo:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    additions = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
    there = api.list_repo_files(repo_id, revision=revision)
    # What an earlier push left and this one has no more: other shards would load instead of these weights.
    stale = [name for name in there if is_ours(name) and name not in files]
    if stale:
        logger.info("taken out of %s, where an earlier push left it: %s", repo_id, ", ".join(stale))
    operations: list[Any] = [*additions, *(CommitOperationDelete(name) for name in stale)]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, create_pr=create_pr)
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit.oid)
    sizes = {entry.path: getattr(entry, "size", None) for entry in tree}
    lost = [add.path_in_repo for add in additions if sizes.get(add.path_in_repo) != add.upload_info.size]
    if lost:
        raise HubError(
            f"{repo_id} has a commit, but {', '.join(lost)} did not arrive whole. Is a .gitignore there in the way? "
            "Push again."
        )
    return commit
