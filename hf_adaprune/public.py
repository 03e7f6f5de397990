"""What may leave the machine: names without paths, texts without tokens.

Configs and journals name their texts as the user did, so that a run can be repeated. In a published copy a file has a
name and no folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .names import name_of

__all__ = ["base_model_name", "find_token", "is_repo_id", "linked_name", "public", "without_tokens"]

_PATH = re.compile(r"(~|[A-Za-z]:)?[/\\]|\.{1,2}[/\\]|~")
# A path inside a sentence, such as an error in a journal.
_INSIDE = re.compile(r"(?<![\w:/.])(?:~|\.{1,2}|[A-Za-z]:)?(?:[/\\][^\s/\\'\"`,;:()\[\]{}]+)+")
_REPO_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)(?:--([\w.-]+))?[/\\]snapshots[/\\]")
_FILE = re.compile(r"\.(txt|md|jsonl?|parquet|csv|gguf|safetensors|bin|zip|gz|zst)$", re.IGNORECASE)
# User tokens of the Hub, organisation tokens, and signed ones.
_TOKEN = re.compile(r"(?<![A-Za-z0-9])(?:hf_|api_org_)[A-Za-z0-9]{20,}")
_HIDDEN = "<token>"


def is_repo_id(name: str) -> bool:
    """Whether a name can be a repository on the Hub, and is no folder here."""
    return bool(_REPO_ID.fullmatch(name)) and ".." not in name and "--" not in name and not os.path.isdir(name)


def base_model_name(model: Any) -> str:
    """What a model was loaded or made from: its id on the Hub, the last part of a folder's path, or nothing.

    Args:
        model (`PreTrainedModel`, *optional*): the model.
    """
    name = _by_its_id(name_of(model))
    return name if is_repo_id(name) else _last_part(name)


def linked_name(name: Any) -> str:
    """The `owner/name` that a published file may link a model by; empty for everything else that stands there.

    A bare name may be an old id or the last part of a folder's path: only somebody who says so makes it a link.

    Args:
        name: what a record or a config calls it.
    """
    name = _by_its_id(name) if isinstance(name, str) else ""
    return name if "/" in name and is_repo_id(name) else ""


def _by_its_id(name: str) -> str:
    """A place in the Hub's cache as the id that lies there; other names as they are."""
    found = _SNAPSHOT.search(name)
    return "/".join(part for part in found.groups() if part) if found else name


def public(value: Any) -> Any:
    """A copy of JSON data in which every path is down to the name of its file, in keys too.

    Args:
        value: JSON types.
    """
    if isinstance(value, Mapping):
        copy: dict[str, Any] = {}
        for key, entry in value.items():
            name = unique = _public_text(str(key))
            number = 1
            while unique in copy:
                number += 1
                unique = f"{name} ({number})"  # two files of one name in two folders
            copy[unique] = public(entry)
        return copy
    if isinstance(value, (list, tuple)):
        return [public(entry) for entry in value]
    return _public_text(value) if isinstance(value, str) else value


def _public_text(text: str) -> str:
    # A text source is named `file` or `file:more`; a data set `owner/name:config:split`, which stays.
    if _PATH.match(text) and "\n" not in text and len(text) < 4096:
        return _last_part(text)
    if ("/" in text or "\\" in text) and (_FILE.search(text) or os.path.exists(text)) and " " not in text:
        return _last_part(text)
    home = str(Path.home())
    if len(home) > 1:
        text = text.replace(home, "~")
    return _INSIDE.sub(lambda found: _last_part(found[0]), text)


def _last_part(path: str) -> str:
    kind = PureWindowsPath if "\\" in path or re.match(r"[A-Za-z]:", path) else PurePosixPath
    name = kind(path).name
    return "" if name in ("~", "..") else name


def find_token(text: str, known: str | None = None) -> bool:
    """Whether a text holds an access token: the known one, or anything that looks like one.

    Args:
        text (`str`): what would be published.
        known (`str`, *optional*): the token in use.
    """
    return bool(_TOKEN.search(text)) or bool(known and known in text)


def without_tokens(text: str, known: str | None = None) -> str:
    """The text with tokens taken out, for messages.

    Args:
        text (`str`): such as an error of the Hub.
        known (`str`, *optional*): the token in use.
    """
    if known:
        text = text.replace(known, _HIDDEN)
    return _TOKEN.sub(_HIDDEN, text)
