"""Publishing: a checkpoint with everything that tells what it is, in one commit.

One commit is all or nothing, so a broken upload leaves no half of a model behind, and running again finishes it (large
files that had arrived are not sent twice). Content that is there already makes no commit.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .card import EVALUATION_NAME, PICTURE_NAME, model_card, read_run
from .config import CONFIG_NAME
from .errors import AdaPruneError, CheckpointError, HubError, JournalError, MissingDependencyError
from .plan import PruningPlan, SitePlan, split_site_name
from .public import find_token, public, without_tokens
from .remote_code import add_remote_code, module_name
from .reporting import Description, LayerWidths, describe_checkpoint
from .saving import PLAN_NAME, check_round_trip, save_pruned
from .width_plot import plot_widths

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

    from .pipeline import PruningResult

__all__ = ["check_checkpoint", "push_to_hub"]

logger = logging.getLogger(__name__)

JOURNAL_NAME = "pruning_journal.jsonl"
# What a model repository is made of. Everything else stays at home: pickles (training_args.bin, optimizer.pt), logs.
_ENDINGS = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ".png")
_FOLDERS = ("additional_chat_templates",)
_NOT = ("trainer_state.json", "README.md", CONFIG_NAME, PICTURE_NAME, JOURNAL_NAME)
_INDEX = "model.safetensors.index.json"
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
    source: PruningResult | str | os.PathLike[str],
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
        source ([`PruningResult`] or `str`): what [`prune`] returned, or the folder it was saved to.
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
        if journal is None:
            journal = _journal_of(source, folder)
        _stays_inside(folder / CONFIG_NAME, folder)
        record = read_run(folder)
        description = check_checkpoint(folder, record)
        files: dict[str, Path | bytes] = {**_files(folder)}
        files[CONFIG_NAME] = _json(record)
        for name, copy in _public_copies(files):
            files[name] = copy
        if journal is not None:
            files[JOURNAL_NAME] = _public_journal(Path(journal))
        shown = folder
        if _code_in(folder) or remote_code:
            shown = _with_remote_code(folder, Path(staging), files)
        _forbid_tokens(files, secret)  # before anything is sent
        with _told(secret, repo_id):
            api = _api(token)
            if (folder / "README.md").is_file():
                _stays_inside(folder / "README.md", folder)
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
            _forbid_tokens({"README.md": files["README.md"]}, secret)
            repo_id = _repository(api, repo_id, private, create_pr)
            return _commit(api, repo_id, files, revision, create_pr, commit_message or "Upload pruned model")


# -- the folder -------------------------------------------------------------------------------------------------------


@contextmanager
def _folder(source: PruningResult | str | os.PathLike[str], remote_code: bool) -> Iterator[Path]:
    if isinstance(source, (str, os.PathLike)):
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="hf_adaprune_") as place:
        yield save_pruned(source, Path(place) / "model", remote_code=remote_code)


def _journal_of(source: Any, folder: Path) -> Path | None:
    if isinstance(source, (str, os.PathLike)):
        beside: Path | None = folder.absolute().with_name(folder.absolute().name + ".journal.jsonl")
    else:
        beside = source.search.journal.path if source.search is not None else None
    return beside if beside is not None and beside.is_file() else None


def check_checkpoint(folder: str | os.PathLike[str], run: Mapping[str, Any] | None = None) -> Description:
    """Check that a folder is a whole checkpoint of this package, and that its plan is the one it was cut by.

    Reads JSON and the headers of weight files; runs no code of the folder and loads no weights.

    Args:
        folder (`str`): the checkpoint.
        run (`dict[str, Any]`, *optional*): its record, where it was read already.

    Returns:
        [`Description`]: what it is.

    Raises:
        CheckpointError: with what is missing or contradicts what.
        PlanError: the plan is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder at {folder}. Name the folder of a pruned checkpoint.")
    description = describe_checkpoint(folder)
    if description.parameters is None:
        raise CheckpointError(
            f"{folder} has no weights in safetensors, and other formats are not published. Save the model again."
        )
    _check_shards(folder)
    run = read_run(folder) if run is None else run
    plan = PruningPlan.load(folder / PLAN_NAME)
    if plan.digest != run.get("plan_digest"):
        raise CheckpointError(
            f"{folder}: {PLAN_NAME} is not the plan of {CONFIG_NAME}. One of them is from another run; save again."
        )
    if plan.model_type != description.model_type:
        raise CheckpointError(
            f"{folder}: the plan is for {plan.model_type!r} and the checkpoint a {description.model_type!r}."
        )
    found = {row.layer: row for row in description.layers if not row.dropped}
    if found and (tuple(found) != plan.kept_layers() or not all(_fits(*cut, found) for cut in plan.changed())):
        raise CheckpointError(
            f"{folder}: the layers are not as wide as the plan says. Config, weights and plan are of different runs."
        )
    return description


def _fits(name: str, kept: SitePlan, found: Mapping[int, LayerWidths]) -> bool:
    layer, kind = split_site_name(name)
    row, groups, each = found[layer], len(kept.kept_groups), kept.kept_per_group
    planned = {
        "attention": ((row.heads, groups * each), (row.groups, groups)),
        "mlp": ((row.channels, each),),
        "experts": ((row.experts, groups), (row.channels, each)),
    }
    return all(pair is None or pair[0] == count for pair, count in planned[kind])


def _check_shards(folder: Path) -> None:
    index = folder / _INDEX
    if not index.is_file():
        return
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(name for name in named if Path(name).name != name or not (folder / name).is_file())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read: {error!r}. Save the model again.") from error
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}, which {_INDEX} names. Is the copy complete?")


def _files(folder: Path) -> dict[str, Path]:
    """Files that go to the Hub, by their names there."""
    found: dict[str, Path] = {}
    left = []
    places = [folder, *(folder / name for name in _FOLDERS if (folder / name).is_dir())]
    for path in sorted(path for place in places for path in place.iterdir()):
        name = path.relative_to(folder).as_posix()
        if path.name in _NOT or (path.is_dir() and name in _FOLDERS):
            continue
        if path.is_file() and path.suffix in _ENDINGS and not path.name.startswith("."):
            _stays_inside(path, folder)
            found[name] = path
        elif not path.name.startswith(module_name("")):
            left.append(name)
    if left:
        logger.info("left out of the upload: %s", ", ".join(left))
    return found


def _public_copies(files: Mapping[str, Path | bytes]) -> Iterator[tuple[str, bytes]]:
    """Other files that may say where something lay on this machine."""
    for name in (EVALUATION_NAME, "tokenizer_config.json"):
        file = files.get(name)
        if isinstance(file, Path):
            try:
                data = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise CheckpointError(f"{file} cannot be read: {error}. Write it again, or remove it.") from error
            if name == EVALUATION_NAME:
                yield name, _json(public(data))
            elif isinstance(data, dict) and "name_or_path" in data:
                # The rest are tokens and templates, in which a slash is a slash.
                yield name, _json({**data, "name_or_path": public(data["name_or_path"])})


def _stays_inside(path: Path, folder: Path) -> None:
    """A link must not publish a file from elsewhere; the Hub's own cache is made of links, next door."""
    target, own = path.resolve(), folder.resolve()
    blobs = own.parent.parent / "blobs"
    if not target.is_relative_to(own) and not (own.parent.name == "snapshots" and target.is_relative_to(blobs)):
        raise CheckpointError(f"{path.name} is a link to a file outside of {folder}. Put the file itself there.")


def _code_in(folder: Path) -> bool:
    """Whether a folder carries this package's remote code; other code is refused, and none of it is run."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    references = config.get("auto_map") or {}
    if not isinstance(references, dict) or any(
        not str(reference).startswith(module_name("")) for reference in references.values()
    ):
        raise CheckpointError(
            f"config.json of {folder} names code of its own (`auto_map`), which is not published from here. Upload the "
            "folder with `hf upload`, or take the entry out."
        )
    return bool(references)


def _with_remote_code(folder: Path, staging: Path, files: dict[str, Path | bytes]) -> Path:
    """A copy of the folder (of links) with remote code written anew and checked against the plugin's model."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from .loading import install

    install()
    copy = staging / "model"
    copy.mkdir()
    for name, file in {**_files(folder), CONFIG_NAME: folder / CONFIG_NAME}.items():
        if "/" not in name:
            (copy / name).symlink_to(file.resolve())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    (copy / "config.json").unlink()
    (copy / "config.json").write_bytes(_json(config))
    try:
        loaded = AutoConfig.from_pretrained(copy, trust_remote_code=False)
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(loaded)]
        written = add_remote_code(copy, kind, loaded)
        if written is not None:
            model = AutoModelForCausalLM.from_pretrained(copy, dtype="auto", trust_remote_code=False)
            check_round_trip(model, copy)
    except AdaPruneError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder} does not load, so it is not published: {error}") from error
    files["config.json"] = (copy / "config.json").read_bytes()
    if written is not None:
        files[written.name] = written.read_bytes()
    return copy


def _public_journal(path: Path) -> bytes:
    from .search.journal import Journal

    Journal.load(path)
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break  # torn by a kill
        try:
            lines.append(json.dumps(public(json.loads(line)), separators=(",", ":")))
        except (ValueError, RecursionError) as error:
            raise JournalError(f"{path}, line {number} is no event of a search: {error}.") from error
    return ("\n".join(lines) + "\n").encode()


def _picture(description: Description, file: Path, repo_id: str) -> bytes | None:
    if not description.layers:
        return None
    try:
        plot_widths(description.layers, file, repo_id.rsplit("/", 1)[-1])
    except MissingDependencyError as error:
        logger.warning("the card has no picture of the widths: %s", error)
        return None
    return file.read_bytes()


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def _forbid_tokens(files: Mapping[str, Path | bytes], secret: str | None) -> None:
    for name, content in files.items():
        if not name.endswith((".safetensors", ".png", ".model")):
            data = content if isinstance(content, bytes) else content.read_bytes()
            if find_token(data.decode("utf-8", errors="replace"), secret):
                raise CheckpointError(
                    f"{name} holds what looks like an access token of the Hub. Take it out (and revoke it, if the "
                    "file has been elsewhere), then push again."
                )


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
    stale = [name for name in there if _is_ours(name) and name not in files]
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


def _is_ours(name: str) -> bool:
    if "/" in name:
        return False
    weights = name.endswith(".safetensors") or name == _INDEX
    return weights or name.startswith(module_name("")) or name in (JOURNAL_NAME, PICTURE_NAME)
