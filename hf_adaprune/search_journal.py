"""A journal bound to one search, to its config, model, statistics and text; and what a search takes from a journal."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .config import PruningConfig
from .errors import CalibrationError, JournalError
from .run_folder import locked
from .search.dimensions import Choice
from .search.journal import Journal
from .search.loop import WARM_POINTS, finalists
from .search.space import Point, Space
from .search_checks import named_space
from .search_config import SPEEDS
from .sites import ModelSites
from .speeds import SpeedTable
from .trials import Trials
from .whole_files import check_no_folder, check_writable
from .workers import Alone

__all__ = ["check_journal", "journal_lock", "keep_speeds", "model_digest", "start_journal", "warm_points"]

_REFINED = ("allocation.method", "allocation.ratios")  # what strategies that refine an allocation set beside the space


def journal_lock(path: str | os.PathLike[str]) -> AbstractContextManager[bool]:
    """Be the only search that writes to a journal, for the time of a `with`.

    Args:
        path (`str`): file of the journal; folders above it are made.

    Raises:
        ConfigError: it is a folder.
        JournalError: another search writes to it.
    """
    check_no_folder("journal", path)
    place = Path(path).absolute()
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JournalError(f"{place.parent} cannot be made ({error.strerror}). Name another journal.") from error
    return locked(place.with_name(f".{place.name}.lock"), path, JournalError)


def check_journal(
    config: PruningConfig,
    journal: str | os.PathLike[str] | None,
    resume: bool,
    warm_start: str | os.PathLike[str] | None = None,
) -> None:
    """Refuse a journal that cannot be gone on with, before any text is read; texts and weights are compared later.

    Args:
        config ([`PruningConfig`]): with its search.
        journal (`str`, *optional*): file of the journal.
        resume (`bool`): whether it may be there.
        warm_start (`str`, *optional*): journal to start from.

    Raises:
        CheckpointError: its folder is not writable.
        JournalError: it is there and `resume` is not set, it belongs to another config, a file is no journal, or the
            one to start from is of another space.
    """
    if warm_start is not None:
        warm_points(warm_start, named_space(config))
    if journal is not None:
        check_writable(journal)
    if journal is None or not os.path.exists(journal) or not os.path.getsize(journal):
        return
    if not resume:
        raise JournalError(
            f"there is a journal at {journal}. Go on with it (resume=True, --resume), or name another file."
        )
    with open(journal, "rb") as file:
        if not file.readline().endswith(b"\n"):
            return  # torn by a kill at the very start
    there, here = Journal.load(journal).header.get("config", {}), _asked(config)
    different = sorted(name for name in {*there, *here} if there.get(name) != here.get(name))
    if different:
        raise JournalError(
            f"{journal} belongs to another search: {', '.join(different)} of its config differ. Give the same "
            "arguments, or another journal; to start from what it found, pass it as warm start."
        )


def start_journal(
    trials: Trials, warm: Sequence[Point], path: str | os.PathLike[str] | None, resume: bool, workers: Alone
) -> Journal:
    """The journal on the first process; the others keep theirs in memory, with the same trials.

    Args:
        trials ([`Trials`]): what is searched.
        warm (sequence of points): tried after trial 0.
        path (`str`, *optional*): file of the journal; in memory where not given.
        resume (`bool`): go on with the journal if it is there.
        workers ([`Alone`]): the processes.

    Raises:
        CalibrationError: the processes read different texts.
        JournalError: it is there and `resume` is not set, or it belongs to another search.
    """
    from . import __version__

    header = {
        "version": __version__,
        "config": _asked(trials.config),
        "space": trials.space.to_dict(),
        "model": model_digest(trials.sites),
        "statistics": trials.statistics.digest,
        "selection": trials.own.digest,
        "windows": [trials.first, trials.windows, trials.fresh],
        "logarithmic": trials.logarithmic,
        # What a reader of the journal needs to tell shares from the widths of trials.
        "sites": {slot.name: slot.units for slot in trials.slots},
        "unit_parameters": {slot.name: slot.cost for slot in trials.slots},
        "warm": hashlib.sha256(json.dumps(list(warm), sort_keys=True).encode()).hexdigest() if warm else "",
    }
    if len(set(workers.gather([(header["statistics"], header["selection"])]))) > 1:
        raise CalibrationError(
            "the processes read different calibration or selection text. Give all of them the same files and versions."
        )
    book = workers.lead(lambda: Journal.start(path, header, resume=resume))
    if workers.rank:
        book.path = None
    return book


def _asked(config: PruningConfig) -> dict[str, Any]:
    """What of a config a journal is bound to: more trials or minutes continue a search, report text is left out."""
    asked = config.to_dict()
    for name in ("trials", "minutes", "redraw"):
        asked["search"].pop(name)
    asked.pop("version")
    asked["calibration"].pop("report")
    return asked


def keep_speeds(trials: Trials, book: Journal) -> None:
    """Measured speeds go into the journal: a resumed search decides by the same table.

    Args:
        trials ([`Trials`]): whose costs are replaced by those of the journal, if it has some.
        book ([`Journal`]): of the search.
    """
    if not set(trials.cost_names) & set(SPEEDS):
        return
    event = book.event("speeds")
    if event is None:
        book.add_event("speeds", {"table": trials.costs.speed_table.to_dict()})
    else:
        trials.costs = replace(trials.costs, table=SpeedTable.from_dict(event["table"]))


def model_digest(sites: ModelSites) -> str:
    """A fingerprint of a model: names, shapes, sums and first values of all parameters."""
    digest = hashlib.sha256(sites.architecture.model_type.encode())
    for name, parameter in sites.model.named_parameters():
        flat = parameter.detach().flatten()
        values = [float(flat.double().sum()), *flat[:8].double().tolist()]
        digest.update(json.dumps([name, list(parameter.shape), values]).encode())
    return digest.hexdigest()


def warm_points(path: str | os.PathLike[str], space: Space, refined: Collection[str] = ()) -> list[Point]:
    """The best points of another journal, best first: of each what this search varies, and nothing else.

    Args:
        path (`str`): file of the other journal.
        space ([`Space`]): what this search varies. Numbers out of its ranges are brought into them.
        refined (collection of `str`, *optional*): names of the sites, where a strategy of this search refines how they
            share the budget: points then bring their own shares, if they know of no other sites.

    Raises:
        JournalError: none of them fits, with the reason.
    """
    other = Journal.load(path)
    if not other.measured():
        raise JournalError(f"{path} has no measured trial to start from.")
    ranked = [trial for trial in finalists(other, 4 * WARM_POINTS) if trial.number > 0]
    fitting: list[Point] = []
    for trial in ranked:
        if space.holds(trial.point) and _offered(space, trial.point):
            # What else it sets is the other search's: here the config decides it.
            point = space.decode(space.encode(trial.point))
            shares = trial.point.get(_REFINED[1])
            if refined and shares and set(shares) <= set(refined):
                point |= {path: trial.point[path] for path in _REFINED}
            if point not in fitting:
                fitting.append(point)
    if not fitting:
        there = sorted(other.header.get("space", {}).get("dimensions", {}))
        here = sorted(dimension.path for dimension in space.dimensions)
        raise JournalError(
            f"{path} cannot start this search: its trials vary {', '.join(there) or 'nothing'}, this one varies "
            f"{', '.join(here)}, and weights or control points may differ in number. Search the same space."
        )
    return fitting[:WARM_POINTS]


def _offered(space: Space, point: Point) -> bool:
    """Whether what a point chooses is among the choices here."""
    chosen = [dimension for dimension in space.dimensions if isinstance(dimension, Choice)]
    return all(point[dimension.path] in dimension.values for dimension in chosen)
