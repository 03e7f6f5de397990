"""Domain weights after scoring: what judges a repair, what the regional one learns from, and which tokens count."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model, tokens
from test_pipeline import TEXT, config_of, passage, tiny_tokenizer
from test_pipeline import tiny_model as text_model
from texts import random_blocks

from hf_adaprune import PruningPlan, TextSource, prune
from hf_adaprune import repairing as repairing_module
from hf_adaprune.compensation import Repair, check_enough_tokens, counted_windows, repair_plan
from hf_adaprune.config import RepairConfig
from hf_adaprune.errors import CalibrationError
from hf_adaprune.layerwise import _drawn, regional_weights, sequential_repairs
from hf_adaprune.plan import SitePlan
from hf_adaprune.recording import collect_statistics
from hf_adaprune.repairing import check_repairs, choose_repairs
from hf_adaprune.sites import ModelSites, find_sites
from hf_adaprune.statistics import Needs, spread_weights
from hf_adaprune.token_blocks import TokenBlocks
from hf_adaprune.walk import Walk

# Eight windows of one domain, then eight of the other: every eighth, which checks the regional repair, is of both.
BLOCKS = replace(random_blocks(16, 12, domains=2), domain=(torch.arange(16) > 7).long())

LEAST_SQUARES = {"method": "least_squares", "min_tokens_per_column": 1.0, "holdout": 0.25}


@functools.cache
def narrow() -> tuple[ModelSites, PruningPlan, dict[str, Repair]]:
    """A model nobody changes, a plan that takes every third channel, and repairs."""
    sites = find_sites(tiny_model("llama"))
    mlps = [site for site in sites if site.kind == "mlp"]
    kept = {
        s.name: SitePlan(s.groups, s.group_size, tuple(n for n in range(s.groups * s.group_size) if n % 3))
        for s in mlps
    }
    plan = PruningPlan("llama", len(sites.layers), kept)
    statistics = collect_statistics(sites, BLOCKS, Needs(gram=True))
    return sites, plan, repair_plan(sites, plan, statistics, torch.ones(len(BLOCKS)), RepairConfig(damping=0.1))


def with_other_text(blocks: TokenBlocks, domain: int) -> TokenBlocks:
    """The same windows, but for those of a domain."""
    ids = torch.where((blocks.domain == domain)[:, None], tokens(*blocks.input_ids.shape, seed=9), blocks.input_ids)
    return replace(blocks, input_ids=ids)


def test_a_held_out_window_counts_by_the_weight_of_its_domain() -> None:
    sites, plan, repairs = narrow()
    mask = torch.ones(5, 12, dtype=torch.bool)
    mask[1, 7:] = False
    held = TokenBlocks(tokens(5, 12, seed=5), mask, torch.tensor([0, 0, 1, 1, 1]), ("a", "b"))
    # Half of 0.6 is every window's of the first domain, a third of 0.4 that of the second.
    weights, lengths = [0.3, 0.3, 0.4 / 3, 0.4 / 3, 0.4 / 3], mask.sum(1).tolist()
    alone = [check_repairs(sites, plan, repairs, held.select([window])) for window in range(5)]
    total = sum(weight * length for weight, length in zip(weights, lengths, strict=True))
    shares = [weight * length / total for weight, length in zip(weights, lengths, strict=True)]
    for number, report in enumerate(check_repairs(sites, plan, repairs, held, (1.2, 0.8))):
        for side in ("before", "after"):
            expected = sum(share * getattr(own[number], side) for share, own in zip(shares, alone, strict=True))
            assert getattr(report, side) == pytest.approx(expected, rel=1e-5)


def test_windows_without_padding_walk_for_all_of_their_domain() -> None:
    mask = torch.ones(16, 12, dtype=torch.bool)
    mask[2:8, 7:] = False  # two of eight, and eight of eight
    padded = replace(BLOCKS, attention_mask=mask)
    for weights, share in (((), 0.5), ((3.0, 1.0), 0.75)):
        walk = Walk(narrow()[0], padded, weights)
        assert sum(walk.weights[:2]) / sum(walk.weights) == pytest.approx(share)
        walk.close()
    assert Walk(narrow()[0], BLOCKS, (3.0, 1.0)).weights == spread_weights(BLOCKS.domain, 2, (3.0, 1.0)).tolist()


def test_equal_weights_check_and_learn_as_none_do_bitwise() -> None:
    sites, plan, repairs = narrow()
    config = RepairConfig(regional_steps=3)
    assert check_repairs(sites, plan, repairs, BLOCKS, (3.0, 3.0)) == check_repairs(sites, plan, repairs, BLOCKS)
    (weights, report), (equal, same) = (
        regional_weights(sites, plan, repairs, BLOCKS, config, 0, None, own) for own in ((), (3.0, 3.0))
    )
    assert report == same and weights.keys() == equal.keys() and weights
    assert all(torch.equal(value, equal[n][name]) for n, own in weights.items() for name, value in own.items())
    windows, generators = torch.arange(3, 9), [torch.Generator().manual_seed(1) for _ in range(2)]
    for _ in range(3):
        plain = windows[torch.randperm(6, generator=generators[0])[:4]]
        assert torch.equal(_drawn(windows, [1.0] * 16, generators[1]), plain)


def test_the_regional_error_counts_by_weights() -> None:
    sites, plan, repairs = narrow()
    config = RepairConfig(regional_steps=0)

    def errors(blocks: TokenBlocks, weights: tuple[float, ...] = ()) -> torch.Tensor:
        report = regional_weights(sites, plan, repairs, blocks, config, 0, None, weights)[1]
        return torch.tensor([before for _, before, _ in report])

    first, second = errors(BLOCKS.select([0])), errors(BLOCKS.select([8]))
    assert (first - second).abs().min() > 1e-3 * first.abs().min()
    torch.testing.assert_close(errors(BLOCKS, (3.0, 1.0)), 0.75 * first + 0.25 * second, rtol=1e-4, atol=0)


def test_windows_are_drawn_as_often_as_their_weight_says() -> None:
    generator, windows = torch.Generator().manual_seed(0), torch.tensor([1, 2, 4])
    drawn = torch.cat([_drawn(windows, [1.0, 1.0, 0.25, 1.0, 0.75], generator) for _ in range(2000)])
    shares = torch.bincount(drawn, minlength=5) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0, 0.5, 0.125, 0, 0.375]), rtol=0, atol=0.025)


@pytest.mark.parametrize(
    "repair",
    [{"schedule": "cached"}, {"schedule": "sequential"}, {"schedule": "best"}, {"regional_steps": 4}],
    ids=["cached", "sequential", "best", "regional"],
)
def test_a_domain_of_weight_0_decides_nothing(repair: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def noted(losses: dict[str, float]) -> str:
        found[-1].append(dict(losses))
        return min(losses, key=losses.__getitem__)

    monkeypatch.setattr(repairing_module, "lowest", noted)
    for seeds in (range(100, 160), range(200, 260)):
        other = TextSource("other", [passage(seed)[::-1] for seed in seeds])
        own = {"sources": [TEXT, other], "domain_weights": (1.0, 0.0)}
        config = config_of("magnitude", calibration=own, repair={**LEAST_SQUARES, **repair})
        model = text_model("llama")
        found.append([])
        result = prune(model, tiny_tokenizer(), config)
        found[-1] += [result.repairs, result.repair_schedule, [value.tolist() for value in model.parameters()]]
    assert found[0] == found[1]


def test_repairs_are_not_checked_where_no_held_out_window_has_a_weight(caplog: pytest.LogCaptureFixture) -> None:
    sites, plan, repairs = narrow()
    config = config_of(calibration={"sources": [TEXT, TextSource("b", ["b"])], "domain_weights": (1.0, 0.0)})
    held = BLOCKS.select(slice(8, 16))
    kept, schedule, reports, _ = choose_repairs(sites, plan, repairs, BLOCKS, held, config)
    assert kept == repairs and schedule == "cached" and reports == ()
    assert "repairs are not checked" in caplog.text


def test_tokens_of_weight_0_are_not_enough() -> None:
    sites, plan, _ = narrow()
    blocks = with_other_text(BLOCKS, 1)
    assert counted_windows(blocks) is blocks and counted_windows(blocks, (0.2, 0.1)) is blocks
    counted = counted_windows(blocks, (0.0, 2.0))
    assert torch.equal(counted.input_ids, blocks.input_ids[8:]) and counted.domains == blocks.domains
    widest = max(len(kept.kept) for kept in plan.sites.values())
    config = RepairConfig(min_tokens_per_column=97 / widest)  # of 192 tokens, 96 in each domain
    check_enough_tokens(sites, blocks.tokens, config, plan.sites)
    sequential_repairs(sites, plan, blocks, config, (1.0, 1.0))
    with pytest.raises(CalibrationError, match=r"^96 calibration tokens.*at least 97"):
        sequential_repairs(sites, plan, blocks, config, (0.0, 2.0))
