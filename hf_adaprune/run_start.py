"""How a run begins: what it locks, what an earlier one left it, and the folder that its largest files lie in."""

from __future__ import annotations

import os
import tempfile
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from .config import PruningConfig
from .plan import PruningPlan
from .run_facts import model_bytes_digest, run_facts
from .run_folder import RunFolder, open_run
from .search_journal import check_journal, journal_lock
from .sites import ModelSites
from .whole_files import scratch_folder
from .workers import Alone

__all__ = ["begin_run", "is_resumed", "room_for_moments"]


def begin_run(
    stack: ExitStack,
    run_dir: str | os.PathLike[str] | None,
    sites: ModelSites,
    tokenizer: Any,
    config: PruningConfig,
    plan: PruningPlan | None,
    workers: Alone,
    journal: str | os.PathLike[str] | None,
    resume: bool,
    warm_start: str | os.PathLike[str] | None,
) -> RunFolder | None:
    """Lock what the run writes to, refuse inputs that an earlier run did not have, and a journal of another search.

    Args:
        stack (`ExitStack`): holds the locks.
        run_dir (`str`, *optional*): the run's folder.
        sites ([`ModelSites`]): the dense model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer.
        config ([`PruningConfig`]): what is asked for.
        plan ([`PruningPlan`], *optional*): a plan that stands already.
        workers ([`Alone`]): the processes; all of them have to call this.
        journal (`str`, *optional*): of the search.
        resume (`bool`): go on with that journal.
        warm_start (`str`, *optional*): journal of another search.

    Returns:
        [`RunFolder`]: `None` where nothing is kept.

    Raises:
        RunError: the folder is of a run with other inputs, or in use.
        JournalError: the journal is of another search, or in use.
    """
    if workers.count == 1 and os.environ.get("RANK", "0") != "0":
        run_dir = None  # one of several processes that each prune their own copy: the first one keeps
    opened: list[RunFolder | None] = []

    def lead() -> None:
        opened.append(stack.enter_context(open_run(run_dir)))
        run = opened[0]
        facts: dict[str, Any] = {}
        if run is not None:
            facts["weights of the model"] = model_bytes_digest(sites)
            facts["journal"] = None if journal is None else str(Path(journal).absolute())
            run.bind(run_facts(sites, tokenizer, config, plan, **facts))
        if config.search is not None and journal is not None:
            stack.enter_context(journal_lock(journal))
        if config.search is not None:
            check_journal(config, journal, resume or is_resumed(run), warm_start)

    workers.lead(lead)
    if workers.rank:
        opened.append(stack.enter_context(open_run(run_dir, writes=False)))
    run = opened[0]
    # The first process has written to the folder when the others open it.
    resumed = workers.share(run is not None and run.resumed)
    if run is not None:
        run.resumed = resumed
    return run


def is_resumed(run: RunFolder | None) -> bool:
    """Whether a journal that is there is the run's own: the folder names it, and was there before."""
    return run is not None and run.resumed


def room_for_moments(config: PruningConfig) -> AbstractContextManager[Any]:
    """The folder of Gram matrices on disk, or nothing."""
    return (
        scratch_folder(tempfile.gettempdir(), "hf_adaprune_moments") if config.gram_place == "disk" else nullcontext()
    )
