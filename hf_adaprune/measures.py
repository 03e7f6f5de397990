"""What a search minimises, as rows of windows that can be measured one after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from .choices import ChoiceRow, per_row_errors
from .errors import CalibrationError, ConfigError
from .evaluation import TopTokens, per_window_loss, per_window_top_kl, top_tokens
from .sites import ModelSites
from .token_blocks import TokenBlocks
from .workers import Alone

__all__ = ["Measure", "custom_measure", "row_measure", "window_measure"]

BATCH_TOKENS = 2048  # of a forward: more gains nothing on a CPU, fewer leave its cores waiting


@dataclass(frozen=True, eq=False)
class Measure:
    """What a search minimises, cut into windows that can be measured one after the other.

    Args:
        rows (`Callable`): `(start, stop)` to rows `(count, sum)` of these windows, with the model as it is then.
        first (`int`): windows that every trial sees.
        windows (`int`): windows that a promising one sees.
        fresh (`int`): windows after these, for the last measurement.
        logarithmic (`bool`): whether values are compared by their logarithms.
        digest (`str`): of the texts, for the journal.
        blocks ([`TokenBlocks`], *optional*): the windows, where they are text.
        batch (`int`, *optional*, defaults to 1): windows that run together.
    """

    rows: Callable[[int, int], list[tuple[float, float]]]
    first: int
    windows: int
    fresh: int
    logarithmic: bool
    digest: str
    blocks: TokenBlocks | None = None
    batch: int = 1


def window_measure(
    sites: ModelSites,
    blocks: TokenBlocks,
    objective: str,
    *,
    first: int,
    windows: int,
    workers: Alone | None = None,
) -> Measure:
    """KL to the dense model, or loss, on selection windows.

    Args:
        sites ([`ModelSites`]): the dense model; its top tokens are read now.
        blocks ([`TokenBlocks`]): windows of the trials, then the fresh ones.
        objective (`str`): `kl` or `loss`.
        first (`int`): see [`Measure`].
        windows (`int`): see [`Measure`].
        workers ([`Alone`], *optional*): processes that share the dense model's windows; all of them call this.
    """
    model = sites.model
    batch = max(1, BATCH_TOKENS // blocks.input_ids.shape[1])
    dense = _dense_tokens(model, blocks, batch, workers or Alone()) if objective == "kl" else None

    def rows(start: int, stop: int) -> list[tuple[float, float]]:
        part = blocks.select(slice(start, stop))
        if dense is not None:
            own = replace(dense, tokens=dense.tokens[start:stop], log_probabilities=dense.log_probabilities[start:stop])
            sums = per_window_top_kl(model, own, part, batch)
        else:
            sums = per_window_loss(model, part, batch)
        return [(count, value) for value, count in sums.tolist()]

    return Measure(rows, first, windows, len(blocks) - windows, True, blocks.digest, blocks, batch)


def _dense_tokens(model: Any, blocks: TokenBlocks, batch: int, workers: Alone) -> TopTokens:
    """The dense model's top tokens; every process reads every n-th batch, as one process would run it.

    Raises:
        CalibrationError: the processes brought different windows.
    """
    if len(set(workers.gather([blocks.digest]))) > 1:
        raise CalibrationError(
            "the processes read different selection text. Give all of them the same files, seed and versions."
        )
    batches = torch.arange(len(blocks)).split(batch)
    mine = torch.cat([torch.empty(0, dtype=torch.long), *batches[workers.rank :: workers.count]])
    read = partial(top_tokens, model, blocks.select(mine), batch_size=batch)
    own = workers.each(lambda: read() if len(mine) else None)
    if workers.count == 1 and own is not None:
        return own
    # One that has nothing to read hears of the shape.
    shape = next(size for size in workers.gather([None if own is None else own.tokens.shape[1:]]) if size is not None)
    tokens = torch.zeros(len(blocks), *shape, dtype=torch.int32)
    values = torch.zeros(len(blocks), *shape)
    if own is not None:
        tokens[mine], values[mine] = own.tokens, own.log_probabilities
    for together in (tokens, values):
        workers.add_up(together)
    return TopTokens(tokens, values)


def row_measure(model: Any, tokenizer: Any, rows: Sequence[ChoiceRow], *, first: int, windows: int) -> Measure:
    """One minus the accuracy (by log-likelihood over the choice's length) on multiple-choice rows.

    Args:
        model (`PreTrainedModel`): the model.
        tokenizer: its tokenizer.
        rows (sequence of `ChoiceRow`): rows of the trials, then the fresh ones.
        first (`int`): see [`Measure`].
        windows (`int`): see [`Measure`].
    """
    digest = hashlib.sha256(repr([(row.context, row.choices, row.label) for row in rows]).encode()).hexdigest()

    def measure(start: int, stop: int) -> list[tuple[float, float]]:
        return [(1.0, error) for error in per_row_errors(model, tokenizer, rows[start:stop])]

    # Rows run with others of their length, so they are not shared: in other company their last bits may differ.
    return Measure(measure, first, windows, len(rows) - windows, False, digest, batch=len(rows))


def custom_measure(model: Any, objective: Callable[[Any], Any]) -> Measure:
    """A function of the model that the caller brings.

    Args:
        model (`PreTrainedModel`): handed to the function, behaving as the candidate.
        objective (`Callable`): returns a number to minimise, or one number per sample (always the same samples), from
            which the noise is estimated.

    Raises:
        ConfigError: it returns something else. A candidate of which it says NaN or infinity is one that never wins.
    """

    def measure(start: int, stop: int) -> list[tuple[float, float]]:
        with torch.inference_mode():
            found = objective(model)
        try:
            values = torch.as_tensor(found, dtype=torch.float64).flatten().tolist()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"the objective should return a number or several. Found {found!r}.") from error
        if not values:
            raise ConfigError(f"the objective should return a number or several. Found {found!r}.")
        return [(1.0, value) for value in values]

    name = getattr(objective, "__qualname__", type(objective).__name__)
    return Measure(measure, 1, 1, 0, False, f"custom:{name}")
