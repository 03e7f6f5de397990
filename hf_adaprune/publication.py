"""What may leave this machine: a checked checkpoint, file by file, without paths, tokens or foreign code."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .card import EVALUATION_NAME, PICTURE_NAME, read_run
from .config import CONFIG_NAME
from .description import Description, describe_checkpoint
from .errors import AdaPruneError, CheckpointError, JournalError
from .plan import PruningPlan, SitePlan, split_site_name
from .public import find_token, linked_name, public
from .remote_code import add_remote_code, module_name
from .saving import PLAN_NAME, check_round_trip
from .widths import LayerWidths

__all__ = ["JOURNAL_NAME", "check_checkpoint", "forbid_tokens", "is_ours", "public_files", "stays_inside"]

logger = logging.getLogger(__name__)

JOURNAL_NAME = "pruning_journal.jsonl"
# What a model repository is made of. Everything else stays at home: pickles (training_args.bin, optimizer.pt), logs.
_ENDINGS = (".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".md", ".png")
_FOLDERS = ("additional_chat_templates",)
# An adapter names a base by its place on this machine, and transformers would load it with the checkpoint.
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_NOT = ("trainer_state.json", "README.md", CONFIG_NAME, PICTURE_NAME, JOURNAL_NAME, *_ADAPTER)
_PLACES = ("_name_or_path", "name_or_path")  # of a config: what it was loaded by
_INDEX = "model.safetensors.index.json"
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors", re.ASCII)


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


def public_files(
    folder: Path, record: Mapping[str, Any], journal: Path | None, staging: Path, remote_code: bool, secret: str | None
) -> tuple[dict[str, Path | bytes], Path]:
    """A checkpoint's files as they are published, by their names there; all but the card.

    Args:
        folder (`Path`): the checkpoint, checked.
        record (`dict[str, Any]`): of its run.
        journal (`Path`, *optional*): of its search.
        staging (`Path`): an empty folder, for what is written anew.
        remote_code (`bool`): add the file that loads the model without this package; a folder with one has it written
            anew.
        secret (`str`, *optional*): the access token, which no file may hold.

    Returns:
        `tuple`: files, and the folder that a card should describe.

    Raises:
        CheckpointError: a file must not be published.
        JournalError: the journal is none.
    """
    files: dict[str, Path | bytes] = {**_files(folder)}
    files[CONFIG_NAME] = _json(record)
    for name, copy in _public_copies(files):
        files[name] = copy
    if journal is not None:
        files[JOURNAL_NAME] = _public_journal(journal)
    shown = folder
    if _code_in(folder) or remote_code:
        shown = _with_remote_code(folder, staging, files)
    forbid_tokens(files, secret)
    return files, shown


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
            stays_inside(path, folder)
            _names_no_code(path)
            found[name] = path
        elif not path.name.startswith(module_name("")):
            left.append(name)
    if left:
        logger.info("left out of the upload: %s", ", ".join(left))
    return found


def _public_copies(files: Mapping[str, Path | bytes]) -> Iterator[tuple[str, bytes]]:
    """Other files that may say where something lay on this machine."""
    for name in (EVALUATION_NAME, "config.json", "tokenizer_config.json"):
        file = files.get(name)
        if isinstance(file, Path):
            try:
                data = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise CheckpointError(f"{file} cannot be read: {error}. Write it again, or remove it.") from error
            if name == EVALUATION_NAME:
                yield name, _json(public(data))
            elif name == "config.json":
                if (config := _without_places(data)) != data:
                    yield name, _json(config)
            elif isinstance(data, dict) and "name_or_path" in data:
                # The rest are tokens and templates, in which a slash is a slash.
                yield name, _json({**data, "name_or_path": public(data["name_or_path"])})


def _without_places(config: Any) -> Any:
    """A copy of a config that says by what it was loaded where a card would, and nowhere by its place.

    transformers of today writes no such entry; older ones did, configs of a part among them, and so may people.
    """
    if isinstance(config, list):
        return [_without_places(entry) for entry in config]
    if not isinstance(config, dict):
        return config
    copy = {key: linked_name(value) if key in _PLACES else _without_places(value) for key, value in config.items()}
    return {key: value for key, value in copy.items() if value != "" or key not in _PLACES}


def stays_inside(path: Path, folder: Path) -> None:
    """A link must not publish a file from elsewhere; the Hub's own cache is made of links, next door."""
    target, own = path.resolve(), folder.resolve()
    blobs = own.parent.parent / "blobs"
    if not target.is_relative_to(own) and not (own.parent.name == "snapshots" and target.is_relative_to(blobs)):
        raise CheckpointError(f"{path.name} is a link to a file outside of {folder}. Put the file itself there.")


def _names_no_code(file: Path) -> None:
    """Refuse code that a file beside config.json names, such as a tokenizer's: it may be anyone's, anywhere."""
    if file.suffix != ".json" or file.name == "config.json":
        return
    with contextlib.suppress(ValueError, RecursionError):
        data = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(data, dict) and (data.get("auto_map") or data.get("custom_pipelines")):
            raise CheckpointError(
                f"{file} names code (`auto_map`), which is not published from here. Upload the folder with `hf "
                "upload`, or take the entry out."
            )


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
    config = _without_places(json.loads((folder / "config.json").read_text(encoding="utf-8")))
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


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def forbid_tokens(files: Mapping[str, Path | bytes], secret: str | None) -> None:
    """Refuse text that holds this access token, or what looks like one.

    Raises:
        CheckpointError: with the file's name.
    """
    for name, content in files.items():
        if not name.endswith((".safetensors", ".png", ".model")):
            data = content if isinstance(content, bytes) else content.read_bytes()
            if find_token(data.decode("utf-8", errors="replace"), secret):
                raise CheckpointError(
                    f"{name} holds what looks like an access token of the Hub. Take it out (and revoke it, if the "
                    "file has been elsewhere), then push again."
                )


def is_ours(name: str) -> bool:
    """Whether a file of a repository is one that a push writes, so that one without it takes it away."""
    if "/" in name:
        return False
    weights = _WEIGHTS.fullmatch(name) is not None or name == _INDEX
    return weights or name.startswith(module_name("")) or name in (JOURNAL_NAME, PICTURE_NAME)
