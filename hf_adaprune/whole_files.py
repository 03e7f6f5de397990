"""Files and folders that appear when they are whole: written beside their place, and moved there at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import CheckpointError

__all__ = ["whole_folder", "write_whole"]


@contextmanager
def whole_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to write into, which becomes the target when the `with` ends without an exception.

    Args:
        target (`str`): does not exist, or is an empty folder; folders above it are made.

    Yields:
        `Path`: beside the target; gone afterwards, whatever happened.

    Raises:
        CheckpointError: for an `OSError` or a `SafetensorError` inside the `with`, and where the target cannot be made.
    """
    place = Path(target)
    partial: Path | None = None
    try:
        place.absolute().parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.absolute().parent))
        partial.chmod(0o755)  # others may read it, as they may a folder that was just made
        yield partial
        if place.exists():
            place.rmdir()
        partial.replace(place)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{place} could not be written: {error}. Nothing was left behind.") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def write_whole(file: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8; what was there stays until the new one is whole.

    Args:
        file (`str`): in a folder that exists.
        text (`str`): what it is to hold.
    """
    place = Path(file)
    partial = place.with_name(f"{place.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(place)
