"""What a search minimises: windows of selection text, multiple-choice rows, or a function of the caller's."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .calibration import report_blocks
from .choices import read_rows
from .config import PruningConfig
from .documents import read_source
from .errors import CalibrationError, ConfigError
from .measures import Measure, custom_measure, row_measure, window_measure
from .sites import ModelSites
from .stages import text_part
from .token_blocks import TokenBlocks
from .workers import Alone

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_selection", "measure_of", "selection_blocks"]

logger = logging.getLogger(__name__)


def check_selection(config: PruningConfig, objective: Callable[[Any], Any] | None = None) -> None:
    """Refuse a search that has nothing to choose by, before any text is read.

    Args:
        config ([`PruningConfig`]): with its search.
        objective (`Callable`, *optional*): function of the model, instead of the config's objective.

    Raises:
        CalibrationError: no selection text is named, or a file of multiple-choice rows is missing or bad.
        ConfigError: the objective is `custom`, and no function came.
    """
    search = config.search
    assert search is not None
    if objective is not None:
        return
    if search.objective == "custom":
        raise ConfigError("`search.objective='custom'` needs the function: pass objective=.")
    if search.objective == "accuracy":
        for path in search.tasks:
            read_rows(path)
    elif not config.calibration.selection:
        raise CalibrationError(
            "a search chooses on selection text, and none is named. Give calibration.selection (--selection) texts "
            "like those the model will read, other than the calibration texts."
        )


def selection_blocks(
    sites: ModelSites, tokenizer: PreTrainedTokenizerBase | None, config: PruningConfig
) -> tuple[TokenBlocks, int]:
    """Windows of selection text, in turns from every source: those of trials, then fresh ones.

    They begin with BOS where the tokenizer begins every text with it.

    Args:
        sites ([`ModelSites`]): the model.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        config ([`PruningConfig`]): `calibration.selection`, and the tokens of `search`.

    Returns:
        `tuple`: the windows, and how many of them are for trials.

    Raises:
        CalibrationError: no tokenizer, or too little text.
    """
    search = config.search
    assert search is not None
    if tokenizer is None:
        raise CalibrationError("selection text needs a tokenizer. Pass tokenizer=AutoTokenizer.from_pretrained(...).")
    length = search.sequence_length
    wanted = -(-search.selection_tokens // length), -(-search.final_tokens // length)
    sources = config.calibration.selection
    share = -(-sum(wanted) // len(sources))
    per_source = []
    for source in sources:
        documents = read_source(
            source, tokenizer=tokenizer, model=sites.model, seed=config.seed, self_tokens=share * length * 5 // 4,
            part=text_part(source, "selection"),
        )  # fmt: skip
        blocks = report_blocks(documents, tokenizer, tokens=share * length, sequence_length=length)
        whole = blocks.attention_mask.all(1).nonzero().flatten()
        per_source.append(blocks.select(whole if len(whole) else slice(0, 1)))
    names = tuple(name for blocks in per_source for name in blocks.domains)
    order = sorted((window, source) for source, blocks in enumerate(per_source) for window in range(len(blocks)))
    width = max(blocks.input_ids.shape[1] for blocks in per_source)
    if len({blocks.input_ids.shape[1] for blocks in per_source}) > 1:
        raise CalibrationError(f"every selection source should have at least one window of {width} tokens.")
    merged = TokenBlocks(
        torch.stack([per_source[source].input_ids[window] for window, source in order]),
        torch.stack([per_source[source].attention_mask[window] for window, source in order]),
        torch.tensor([source for _, source in order]),
        names,
    )
    windows = wanted[0]
    if len(merged) < sum(wanted):
        # A third stays fresh: a winner chosen on the text it was found on reports its luck.
        windows = max(1, round(len(merged) * wanted[0] / sum(wanted)))
        windows = min(windows, max(1, len(merged) - max(1, len(merged) // 3)))
        logger.warning(
            "the selection text has %d windows of %d tokens, %d were asked for: %d for trials, %d for the finalists.",
            len(merged), length, sum(wanted), windows, len(merged) - windows,
        )  # fmt: skip
    return merged.select(slice(0, sum(wanted))), windows


def measure_of(
    sites: ModelSites,
    tokenizer: PreTrainedTokenizerBase | None,
    config: PruningConfig,
    objective: Callable[[Any], Any] | None = None,
    workers: Alone | None = None,
) -> Measure:
    """What a config's search minimises; the dense model's top tokens are read now.

    Args:
        sites ([`ModelSites`]): the dense model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): needed by every objective but `custom`.
        config ([`PruningConfig`]): with its search.
        objective (`Callable`, *optional*): function of the model, instead of the config's objective.
        workers ([`Alone`], *optional*): processes that share the windows of the dense model; all of them call this.

    Raises:
        CalibrationError: no selection text, or no tokenizer.
        ConfigError: the objective is missing or returns something else than numbers.
    """
    search, workers = config.search, workers or Alone()
    assert search is not None
    workers.each(lambda: check_selection(config, objective))
    if objective is not None:
        return custom_measure(sites.model, objective)
    share = search.first_tokens / search.selection_tokens
    if search.objective == "accuracy":
        if tokenizer is None:
            raise CalibrationError("multiple-choice rows need a tokenizer. Pass tokenizer=.")
        rows = workers.each(lambda: [row for path in search.tasks for row in read_rows(path)])
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
        windows = max(1, math.ceil(len(rows) * 0.6))
        first = max(1, round(windows * share))
        return row_measure(sites.model, tokenizer, [rows[index] for index in order], first=first, windows=windows)
    blocks, windows = workers.each(lambda: selection_blocks(sites, tokenizer, config))
    first = max(1, round(windows * share))
    return window_measure(sites, blocks, search.objective, first=first, windows=windows, workers=workers)
