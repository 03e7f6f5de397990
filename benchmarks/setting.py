"""What the rows of a run share: a model, its texts and windows, and one pass of statistics per calibration set."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hf_adaprune import PruningConfig, find_sites
from hf_adaprune.choices import ChoiceRow
from hf_adaprune.measures import Measure
from hf_adaprune.recording import collect_statistics
from hf_adaprune.search_checks import search_needs
from hf_adaprune.searching import SearchResult, find_best
from hf_adaprune.selection import measure_of
from hf_adaprune.sites import ModelSites
from hf_adaprune.stages import gather_texts, what_to_collect
from hf_adaprune.statistics import Needs, Statistics
from hf_adaprune.token_blocks import TokenBlocks
from hf_adaprune.trials import CachedScores

from .experiments import FULL, Scale
from .machine import weights_digest
from .peers import loss_gradients
from .results import digest_of
from .texts import Texts, rows_digest

__all__ = ["Pool", "Setting", "pool_key"]


@dataclass(eq=False)
class Setting:
    """A model and what it is measured on.

    Args:
        name (`str`): of the model, without folders.
        model, tokenizer: loaded.
        texts ([`Texts`]): by role.
        scale ([`Scale`], *optional*): how much of them is read.
    """

    name: str
    model: Any
    tokenizer: Any
    texts: Texts
    scale: Scale = FULL
    sites: ModelSites = field(init=False)
    last_gradients: tuple[str, TokenBlocks, dict[str, torch.Tensor]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Find the sites."""
        self.sites = find_sites(self.model)

    @functools.cached_property
    def model_facts(self) -> dict[str, Any]:
        """Name, size, dtype and digest of the model."""
        return {
            "name": self.name,
            "weights": weights_digest(self.model)[:16],
            "parameters": self.sites.total_parameters,
            "decoder_parameters": self.sites.decoder_parameters,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def peer_gradients(self, key: str, config: PruningConfig) -> tuple[TokenBlocks, dict[str, torch.Tensor]]:
        """Calibration windows and gradients for a peer; those of the last key are kept for the next row.

        The windows are those of the recipes without a repair: none is held out.
        """
        if self.last_gradients is not None and self.last_gradients[0] == key:
            return self.last_gradients[1:]
        bare = config.with_changes(repair={"method": "none", "holdout": 0.0})
        blocks = gather_texts(self.sites, self.tokenizer, bare, True)[0]
        assert blocks is not None
        used = blocks.select(slice(0, config.calibration.gradient_samples))
        self.last_gradients = key, used, loss_gradients(self.model, used)
        return self.last_gradients[1:]

    @functools.cached_property
    def matrix(self) -> Texts:
        """The texts of the matrix of domains."""
        return self.texts.domains()

    @functools.cached_property
    def run_facts(self) -> dict[str, Any]:
        """What a run reads besides what a protocol says: a scale, and digests of texts."""
        said = self.texts.facts()
        digests = {role: digest_of(said[role])[:8] for role in ("calibration", "selection")}
        return {**vars(self.scale), **digests, "questions": digest_of([said["rows"], said["tasks"]])[:8]}

    @functools.lru_cache(maxsize=2)  # noqa: B019  settings live as long as the process
    def report(self, matrix: bool) -> dict[str, TokenBlocks]:
        """Report windows by source."""
        texts = self.matrix if matrix else self.texts
        return texts.windows(self.tokenizer, self.scale.report_tokens, self.scale.report_window)

    def questions(self, measures: Sequence[str]) -> tuple[dict[str, tuple[ChoiceRow, ...]], int | None]:
        """Multiple-choice rows by name, and how many of each of lm-eval's tasks; `None` is all."""
        if "all tasks" in measures:
            return self.texts.all_rows, None
        return self.texts.rows, self.scale.task_rows

    def protocol(self, measures: Sequence[str], matrix: bool) -> dict[str, Any]:
        """What rows have to share to stand in one table."""
        if {"cost", "computed"} & set(measures):  # of models of their own
            return {"model": {"name": "random weights", "dtype": self.model_facts["dtype"]}, "measures": list(measures)}
        said: dict[str, Any] = {"model": self.model_facts, "measures": list(measures)}
        if "speed" in measures:
            said["speed"] = {"prompt": self.scale.prompt, "new_tokens": self.scale.new_tokens, "runs": self.scale.runs}
        if "perplexity" in measures:
            report = self.report(matrix)
            said["report"] = {name: [blocks.tokens, blocks.digest[:16]] for name, blocks in report.items()}
            said["report_window"] = self.scale.report_window
        if {"tasks", "all tasks"} & set(measures):
            rows_of, limit = self.questions(measures)
            said["rows"] = {name: [len(rows), rows_digest(rows)] for name, rows in rows_of.items()}
            said["tasks"] = list(self.texts.tasks)
            said["task_rows"] = limit
        return said


def pool_key(config: PruningConfig) -> str:
    """Rows of one key read the same calibration windows."""
    own = config.to_dict()["calibration"]
    kept = {name: value for name, value in own.items() if name not in ("selection", "report", "domain_weights")}
    holdout = config.repair.holdout if config.repair.method != "none" else 0.0
    return digest_of([kept, config.seed, holdout])


class Pool:
    """One calibration set: its windows, and one pass that keeps what all its rows need.

    Args:
        setting ([`Setting`]): the model.
        configs (sequence of [`PruningConfig`]): of the rows, with their searches.
    """

    def __init__(self, setting: Setting, configs: Sequence[PruningConfig]) -> None:
        self.setting = setting
        self.needs = None
        for config in configs:
            own = what_to_collect(config, None)
            if config.search is not None:
                own = search_needs(config, len(config.calibration.sources))
            self.needs = own if self.needs is None else self.needs | (own or Needs())
        self.config = next((config for config in configs if what_to_collect(config, None) is not None), configs[0])
        bare = self.config.with_changes(calibration={"selection": ()}, search=None)
        self.blocks, self.held_out, _ = gather_texts(setting.sites, setting.tokenizer, bare, self.needs is not None)
        self.seconds = 0.0
        self._measures: dict[str, Measure] = {}
        self._searches: dict[str, tuple[SearchResult, float]] = {}

    @functools.cached_property
    def statistics(self) -> Statistics | None:
        """Of the dense model, collected when the first row asks for them."""
        if self.needs is None or self.blocks is None:
            return None
        started = time.perf_counter()
        found = collect_statistics(
            self.setting.sites, self.blocks, self.needs, gradient_samples=self.config.calibration.gradient_samples
        )
        self.seconds = time.perf_counter() - started
        return found

    @functools.cached_property
    def scores(self) -> CachedScores:
        """What scores of trials are made of; the weights that all searches of a pool begin with are equal ones."""
        assert self.statistics is not None
        return CachedScores(self.setting.sites, self.config.units, self.statistics, (), self.config.seed)

    def measure(self, config: PruningConfig) -> Measure:
        """What a search minimises; the dense model's tokens are read once."""
        assert config.search is not None
        asked = config.search
        key = digest_of([asked.selection_tokens, asked.final_tokens, asked.first_tokens, asked.sequence_length])
        if key not in self._measures:
            self._measures[key] = measure_of(self.setting.sites, self.setting.tokenizer, config)
        return self._measures[key]

    def search(self, config: PruningConfig) -> tuple[SearchResult, float]:
        """The result of a search and the seconds it took; searches that differ by the repair's schedule are one.

        Trials are compared by their cached repairs under every schedule, so they have the same winner.
        """
        assert self.statistics is not None
        cached = config.with_changes(repair={"schedule": "cached", "target_mix": 0.0})
        key = digest_of(cached.to_dict())
        if key not in self._searches:
            # Cached scores are exact at the weights that a search begins with.
            scores = None if config.calibration.domain_weights else self.scores
            measure, started = self.measure(cached), time.perf_counter()
            result = find_best(
                self.setting.sites, self.setting.tokenizer, cached, self.statistics, measure=measure, scores=scores
            )
            self._searches[key] = result, time.perf_counter() - started
        found, seconds = self._searches[key]
        repair = {"schedule": config.repair.schedule, "target_mix": config.repair.target_mix}
        return replace(found, asked=config, config=found.config.with_changes(repair=repair)), seconds
