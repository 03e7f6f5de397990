"""Laws of windows that are drawn anew after a search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_trials import SELECTION, WINDOW, passages, tiny_model, tokenizer

from hf_adaprune import PruningConfig, prune, search_plan, search_stage
from hf_adaprune.errors import ConfigError
from hf_adaprune.parts import TextSource
from hf_adaprune.search.journal import Journal
from hf_adaprune.search_stage import mixture_drawn

TEXTS = (passages("a", 1, 60), passages("b", 400, 60), passages("c", 800, 60))


def config_of(search: dict[str, Any] | None = None, **calibration: Any) -> PruningConfig:
    """A search over nothing but one fixed mixture, which trusts two of three sources."""
    own = {
        "trials": 2, "strategy": ("random",), "sequence_length": WINDOW, "selection_tokens": 12 * WINDOW,
        "first_tokens": 4 * WINDOW, "final_tokens": 6 * WINDOW, "finalists": 1, "redraw": True,
        "space": {
            "importance.metrics": {"fisher": 1.0, "obs_gradient_greedy": 1.0}, "importance.normalization": "log",
            "calibration.domain_weights": [0.75, 0.25, 0.0],
            "repair.damping": {"low": 0.01, "high": 0.02},
        },
        **(search or {}),
    }  # fmt: skip
    return PruningConfig.recipe(
        "default",
        pruning_ratio=0.25,
        calibration={
            "sources": TEXTS, "selection": (SELECTION,), "samples": 48, "sequence_length": WINDOW,
            "gradient_samples": 8, **calibration,
        },
        search=own,
        repair={"min_tokens_per_column": 1.0, "holdout": 0.125},
    )  # fmt: skip


def better(monkeypatch: pytest.MonkeyPatch, value: float) -> list[PruningConfig]:
    """Pretend what the windows drawn anew are worth, and tell what was drawn."""
    seen: list[PruningConfig] = []
    real = search_stage.redraw

    def pretend(sites: Any, tokenizer: Any, config: PruningConfig, *args: Any, **options: Any) -> Any:
        seen.append(config)
        made = real(sites, tokenizer, config, *args, **options)
        object.__setattr__(made, "value", value)
        return made

    monkeypatch.setattr(search_stage, "redraw", pretend)
    return seen


def test_the_config_that_comes_back_draws_and_decides_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = better(monkeypatch, -1.0)
    found = prune(tiny_model(), tokenizer(), config_of())
    assert len(seen) == 1 and found.search is not None
    own = found.config.calibration
    assert [source.name for source in own.sources if isinstance(source, TextSource)] == ["a", "b"]
    assert own.shares == own.domain_weights == (0.75, 0.25)
    assert found.calibration["windows"] == 42  # of 48, less those that are held out
    drawn = found.search.to_dict()["redrawn"]
    assert drawn["better"] and drawn["shares"] == {"a": 0.75, "b": 0.25} and drawn["value"] == -1.0
    again = prune(tiny_model(), tokenizer(), found.config)
    assert again.plan == found.plan and again.calibration == found.calibration
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, found.model.state_dict()[name]), name


def test_windows_that_are_no_better_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = prune(tiny_model(), tokenizer(), config_of({"redraw": False}))
    seen = better(monkeypatch, float("inf"))
    found = prune(tiny_model(), tokenizer(), config_of())
    assert len(seen) == 1 and found.search is not None
    assert found.search.to_dict()["redrawn"]["better"] is False
    assert found.plan == plain.plan and found.calibration == plain.calibration
    assert found.config.with_changes(search=None) == plain.config.with_changes(search=None)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, found.model.state_dict()[name]), name


def test_the_value_is_what_the_plan_measures(tmp_path: Path) -> None:
    """Not pretended: the journal's number is the pruned model's own objective on the fresh windows."""
    from hf_adaprune import evaluation
    from hf_adaprune.selection import selection_blocks
    from hf_adaprune.sites import find_sites

    path = tmp_path / "journal.jsonl"
    config = config_of({"objective": "loss"}).with_changes(repair={"holdout": 0.0})
    result = search_plan(tiny_model(), tokenizer(), config, journal=path)
    event = Journal.load(path).event("redrawn")
    assert event is not None
    assert event["better"] == (event["value"] < event["before"])
    drawn = mixture_drawn(result.asked.with_changes(calibration={"domain_weights": (0.75, 0.25, 0.0)}), [1 / 3] * 3)
    assert drawn is not None
    point = result.winner.point
    model = tiny_model()
    blocks, windows = selection_blocks(find_sites(model), tokenizer(), config)
    pruned = prune(
        model,
        tokenizer(),
        drawn.with_changes(search=None, repair={"damping": point["repair.damping"]}),
    )
    sums = evaluation.per_window_loss(pruned.model, blocks.select(slice(windows, None))).sum(0)
    assert float(sums[0] / sums[1]) == pytest.approx(event["value"], rel=1e-4)


def test_windows_drawn_anew_are_compared_by_a_cached_repair_whatever_the_schedule() -> None:
    values = []
    for schedule in ("cached", "sequential"):
        space = {
            "importance.metrics": {"fisher": 1.0}, "importance.normalization": "none",
            "calibration.domain_weights": [0.75, 0.25, 0.0], "repair.damping": {"low": 0.01, "high": 0.02},
        }  # fmt: skip
        config = config_of({"space": space}).with_changes(repair={"schedule": schedule})
        found = prune(tiny_model(), tokenizer(), config)
        assert found.search is not None
        values.append(found.search.to_dict()["redrawn"]["value"])
    assert values[0] == values[1]


def test_a_resumed_search_draws_only_what_was_better(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = better(monkeypatch, float("inf"))
    path = tmp_path / "journal.jsonl"
    first = search_plan(tiny_model(), tokenizer(), config_of(), journal=path)
    second = search_plan(tiny_model(), tokenizer(), config_of(), journal=path, resume=True)
    assert len(seen) == 1 and second.plan == first.plan
    seen = better(monkeypatch, -1.0)
    other = tmp_path / "other.jsonl"
    first = search_plan(tiny_model(), tokenizer(), config_of(), journal=other)
    size = len(other.read_text())
    second = search_plan(tiny_model(), tokenizer(), config_of(), journal=other, resume=True)
    assert len(seen) == 2 and second.plan == first.plan and second.config == first.config
    assert len(other.read_text()) == size


@pytest.mark.parametrize("search", [{"ratios": (0.15, 0.25)}, {"redraw": False}])
def test_what_is_not_drawn_anew(search: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = better(monkeypatch, -1.0)
    search_plan(tiny_model(), tokenizer(), config_of(search))
    assert not seen


def weighted(weights: tuple[float, ...], **changes: Any) -> PruningConfig:
    sources = tuple(f"{index}.txt" for index in range(len(weights)))
    calibration = {"sources": sources, "domain_weights": weights, "samples": 40, **changes}
    return PruningConfig().with_changes(calibration=calibration)


def test_a_mixture_near_the_pools_is_left_as_it_is() -> None:
    assert mixture_drawn(PruningConfig(), [1.0]) is None
    assert mixture_drawn(weighted((1.0, 1.1)), [0.5, 0.5]) is None
    assert mixture_drawn(weighted((3.0, 1.0)), [0.75, 0.25]) is None
    assert mixture_drawn(weighted((1.0, 0.0), clusters=2), [0.5, 0.5]) is None
    with pytest.raises(ConfigError, match="true or false"):
        PruningConfig().with_changes(search={"redraw": 1})


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6).filter(lambda weights: sum(weights) > 0.01))
def test_drawn_shares_are_the_weights(weights: list[float]) -> None:
    drawn = mixture_drawn(weighted(tuple(weights)), [1 / len(weights)] * len(weights))
    if drawn is None:
        return
    own, total = drawn.calibration, sum(weights)
    assert own.shares == own.domain_weights and len(own.shares) == len(own.sources) >= 1
    for source, share in zip(own.sources, own.shares, strict=True):
        assert share == pytest.approx(weights[int(str(source)[0])] / total) and share * 40 >= 0.5
    assert sum(own.shares) > 1 - 0.5 * len(weights) / 40
