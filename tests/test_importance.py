"""Laws of scores: each metric equals its formula by brute force, and weights count samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from conftest import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import random_blocks

from hf_adaprune.config import ImportanceConfig
from hf_adaprune.errors import ConfigError, StatisticsError
from hf_adaprune.importance import mix_scores, needs_of, score_units, scored_kinds, unit_of
from hf_adaprune.metrics import METRICS, block_costs, greedy_costs
from hf_adaprune.moments import cholesky, covariance, damped_inverse, ridge_diagonal
from hf_adaprune.recording import collect_statistics
from hf_adaprune.sites import ModelSites, find_sites
from hf_adaprune.statistics import Needs, SiteStatistics, Statistics, spread_weights, standing_weights

NAMES = {
    "random", "magnitude", "wanda_sp", "ifv", "wifv", "wifn", "taylor_vector", "taylor_element_first",
    "taylor_element_second", "taylor_element_mixed", "first_order", "fisher", "obs", "obs_gradient", "obs_greedy",
    "obs_gradient_greedy", "block_influence",
}  # fmt: skip
UNITS = ("channel", "kv_group", "expert")
EVERYTHING = Needs(gram=True, gradients=True, elements=True, cosine=True, squares=True)


def everything(sites: ModelSites, **options: object) -> Statistics:
    """All statistics of a few windows, every one with gradients."""
    blocks = random_blocks(**{"samples": 6, "length": 24, **options})
    return collect_statistics(sites, blocks, EVERYTHING, gradient_samples=len(blocks))


@pytest.fixture(scope="module")
def llama() -> tuple[ModelSites, Statistics]:
    """Two query heads per KV head."""
    sites = find_sites(tiny_model("llama"))
    return sites, everything(sites)


def scores_of(
    sites: ModelSites, statistics: Statistics, metric: str, units: tuple[str, ...] = UNITS, **options: object
) -> Mapping[str, torch.Tensor]:
    """Scores by one metric."""
    weights, seed = options.pop("weights", None), options.pop("seed", 0)
    config = ImportanceConfig({metric: 1.0}, **options)
    return score_units(sites, units, config, statistics, weights=weights, seed=seed).units


def test_the_table_is_complete() -> None:
    assert set(METRICS) == NAMES


@pytest.mark.parametrize("metric", sorted(NAMES))
def test_every_metric_scores_every_family(metric: str) -> None:
    for family in ("llama", "phi3", "qwen3_moe", "gpt2", "opt"):
        sites = find_sites(tiny_model(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 2}))
        needs = needs_of(ImportanceConfig({metric: 1.0}))
        statistics = collect_statistics(sites, random_blocks(2), needs, gradient_samples=2)
        for units in (UNITS, ("channel", "query_head", "expert_channel")):
            found = scores_of(sites, statistics, metric, units)
            for site in sites:
                kind = unit_of(site, units)
                assert torch.isfinite(found[site.name]).all() and found[site.name].dtype == torch.float64
                if kind is not None:
                    assert len(found[site.name]) == site.units(kind)


LINEAR = sorted(NAMES - {"random", "magnitude"})


@pytest.mark.parametrize("metric", LINEAR)
def test_a_weight_of_2_equals_the_sample_twice(metric: str) -> None:
    """Gram matrices and element terms are kept per domain: there the weights are a domain's."""
    for family in ("llama", "mixtral"):
        sites = find_sites(tiny_model(family, num_hidden_layers=2))
        blocks = random_blocks(5, domains=2, padding=(3,))
        twice = blocks.select([0, 1, 2, 3, 4, 1, 3])  # domain b once more
        needs = replace(needs_of(ImportanceConfig({metric: 1.0})), per_domain=True)
        weights = torch.tensor([1.0, 2, 1, 2, 1])
        once = collect_statistics(sites, blocks, needs, gradient_samples=5)
        doubled = collect_statistics(sites, twice, needs, gradient_samples=7)
        weighted = scores_of(sites, once, metric, weights=weights)
        for name, expected in scores_of(sites, doubled, metric).items():
            torch.testing.assert_close(weighted[name], expected, rtol=2e-3, atol=1e-9, msg=f"{family} {name}")


@pytest.mark.parametrize("metric", ["wanda_sp", "ifv", "wifv", "wifn", "fisher", "first_order"])
def test_weights_count_single_samples(metric: str) -> None:
    sites = find_sites(tiny_model("mixtral", num_hidden_layers=2))
    blocks = random_blocks(4)
    needs = needs_of(ImportanceConfig({metric: 1.0}))
    once = collect_statistics(sites, blocks, needs, gradient_samples=4)
    doubled = collect_statistics(sites, blocks.select([0, 1, 1, 2]), needs, gradient_samples=4)
    weighted = scores_of(sites, once, metric, weights=torch.tensor([1.0, 2, 1, 0]))
    for name, expected in scores_of(sites, doubled, metric).items():
        torch.testing.assert_close(weighted[name], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("metric", ["obs", "obs_greedy", "obs_gradient"])
def test_all_weights_doubled_is_all_text_twice(metric: str, llama: tuple[ModelSites, Statistics]) -> None:
    sites, statistics = llama
    blocks = random_blocks(6, 24)
    twice = collect_statistics(sites, blocks.select([*range(6)] * 2), EVERYTHING, gradient_samples=12)
    weighted = scores_of(sites, statistics, metric, weights=torch.full((6,), 2.0))
    for name, expected in scores_of(sites, twice, metric).items():
        torch.testing.assert_close(weighted[name], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("weights", [(), (0.5, 0.5), (0.9, 0.1)])
def test_windows_with_gradients_stand_for_all_of_their_domain(weights: tuple[float, ...]) -> None:
    """Windows of a domain are copies, so that scores with all gradients are those with a few of them."""
    sites = find_sites(tiny_model("llama", num_hidden_layers=2))
    domain = torch.tensor([0] * 9 + [1] + [0] * 8 + [1, 0])  # 18 and 2, of which 2 and 2 go backward
    blocks = replace(random_blocks(20, domains=2).select(domain), domain=domain)
    for metric in sorted(name for name in NAMES if METRICS[name].needs.gradients or METRICS[name].needs.elements):
        needs = replace(needs_of(ImportanceConfig({metric: 1.0})), per_domain=True)
        found = []
        for count in (20, 4):
            statistics = collect_statistics(sites, blocks, needs, gradient_samples=count)
            own = scores_of(sites, statistics, metric, weights=statistics.sample_weights(weights))
            found.append({name: scores / scores.sum() for name, scores in own.items()})
        for name, expected in found[0].items():
            torch.testing.assert_close(found[1][name], expected, rtol=1e-4, atol=1e-9, msg=f"{metric} {name}")


def test_standing_weights_share_what_a_domain_weighs() -> None:
    domain = torch.tensor([0, 1, 0, 0, 1, 2, 0, 2])
    weights = torch.tensor([1.0, 3, 2, 0.5, 1, 4, 0.5, 0])
    index = torch.tensor([0, 2, 4, 5])
    mean = 8 / 4
    expected = torch.tensor([4 / 3, 8 / 3, 4, 4]) / mean
    torch.testing.assert_close(standing_weights(weights, domain, index), expected)
    # A domain that weighs nothing has no say in the others' scale, so metrics stay linear in the domains' weights.
    apart = [standing_weights(torch.where(domain == own, weights, 0), domain, index) for own in range(3)]
    torch.testing.assert_close(torch.stack(apart).sum(0), expected)


@given(st.integers(1, 5), st.integers(1, 30), st.data())
@settings(max_examples=50, deadline=None)
def test_equal_shares_of_every_domain_leave_weights_as_they_are_bitwise(
    domains: int, size: int, data: st.DataObject
) -> None:
    standing = data.draw(st.integers(1, size))
    given = data.draw(st.lists(st.floats(0.001, 7), min_size=domains, max_size=domains))
    domain = torch.arange(domains * size) % domains
    weights = spread_weights(domain, domains, tuple(given))
    index = torch.arange(domains * standing)
    assert torch.equal(standing_weights(weights, domain, index), weights[index])
    one = torch.zeros_like(domain)
    assert torch.equal(standing_weights(weights, one, index), weights[index])


# -- formulas ---------------------------------------------------------------------------------------------------------


def test_the_forward_metrics_equal_their_formulas(llama: tuple[ModelSites, Statistics]) -> None:
    sites, statistics = llama
    tokens = float(statistics.tokens.sum())
    for site in sites:
        kept, weight = statistics.sites[site.name], site.reader.weight.double()
        moments = kept.gram[0].double().diagonal() / tokens
        variance = moments - (kept.sums.sum(0).double() / tokens).square()
        norm = weight.abs().mean(0) * (kept.squares.double().sum(0) / 6).sqrt()
        expected = {"ifv": variance, "wifv": variance * weight.square().sum(0), "wifn": norm, "wanda_sp": norm}
        for metric, columns in expected.items():
            if site.kind == "attention" and metric != "wanda_sp":
                columns = columns.square()
            folded = columns.reshape(-1, 24).sum(1) if site.kind == "attention" else columns
            torch.testing.assert_close(scores_of(sites, statistics, metric)[site.name], folded, rtol=1e-3, atol=1e-12)


def test_the_gradient_metrics_equal_their_formulas(llama: tuple[ModelSites, Statistics]) -> None:
    sites, statistics = llama
    for site in sites:
        terms = statistics.sites[site.name].first_order.double()
        terms = terms.reshape(*terms.shape[:2], -1, 24).sum(-1) if site.kind == "attention" else terms
        fisher = scores_of(sites, statistics, "fisher")[site.name]
        torch.testing.assert_close(fisher, terms.square().sum((0, 1)), rtol=1e-4, atol=1e-12)
        first = scores_of(sites, statistics, "first_order")[site.name]
        torch.testing.assert_close(first, terms.sum(1).abs().sum(0), rtol=1e-4, atol=1e-12)


def test_reductions_join_the_matrices(llama: tuple[ModelSites, Statistics]) -> None:
    sites, statistics = llama
    site = sites.by_name["layers.1.mlp"]
    elements = statistics.sites[site.name].elements
    taylor = [elements[matrix.path][0, 0].double() * 6 for matrix in (*site.writers, site.reader)]
    gate, up = (writer.weight.norm(dim=1).double() for writer in site.writers)
    magnitude = [gate, up, site.reader.weight.norm(dim=0).double()]
    for parts, metric in ((taylor, "taylor_element_first"), (magnitude, "magnitude")):
        stacked = torch.stack(parts)
        expected = {
            "sum": stacked.sum(0), "mean": stacked.mean(0), "max": stacked.amax(0), "prod": stacked.prod(0),
            "first": parts[0], "last": parts[2],
        }  # fmt: skip
        for reduction, value in expected.items():
            found = scores_of(sites, statistics, metric, reduction=reduction)[site.name]
            torch.testing.assert_close(found, value, rtol=1e-3, atol=1e-12)


def test_magnitude_of_a_kv_group_is_of_its_own_rows() -> None:
    sites = find_sites(tiny_model("llama"))
    fused = find_sites(tiny_model("phi3"))
    site, other = sites.sites[0], fused.sites[0]
    with torch.no_grad():
        other.reader.parameter.copy_(site.reader.parameter)
        other.writers[0].parameter.copy_(torch.cat([writer.parameter for writer in site.writers]))
    nothing = Statistics({}, torch.zeros(1), torch.zeros(1).long(), ("a",), ("all",), torch.zeros(0).long(), None, "")
    found = scores_of(sites, nothing, "magnitude", reduction="prod")[site.name]
    pieces = [(site.writers[0], 24), (site.writers[1], 12), (site.writers[2], 12)]
    rows = torch.stack([writer.weight.reshape(2, size, -1).flatten(1).norm(dim=1) for writer, size in pieces])
    columns = site.reader.weight.T.reshape(2, -1).norm(dim=1)
    torch.testing.assert_close(found, (rows.prod(0) * columns).double(), rtol=1e-4, atol=0)
    both = scores_of(fused, nothing, "magnitude")[other.name]
    torch.testing.assert_close(both, (rows.norm(dim=0) + columns).double(), rtol=1e-4, atol=0)


FOLDED = sorted(NAMES - {"random", "block_influence", "obs", "obs_gradient", "obs_greedy", "obs_gradient_greedy"})


@pytest.mark.parametrize("metric", FOLDED)
def test_a_groups_score_is_of_its_own_query_heads(metric: str, llama: tuple[ModelSites, Statistics]) -> None:
    """Query heads g*r to g*r+r-1 read KV head g (`repeat_kv`); silence those of group 0 in weights and statistics."""
    statistics = llama[1]
    sites = find_sites(tiny_model("llama"))
    before = scores_of(sites, statistics, metric)
    site = sites.sites[0]
    kept = statistics.sites[site.name]
    own = torch.zeros(48, dtype=torch.bool)
    own[:24] = True
    elements = {path: terms.clone() for path, terms in kept.elements.items()}
    for path, rows in zip(("q_proj", "k_proj", "v_proj"), (24, 12, 12), strict=True):
        elements[f"self_attn.{path}"][..., :rows] = 0
    elements["self_attn.o_proj"][..., own] = 0
    silent = SiteStatistics(
        kept.sums * ~own, kept.counts, kept.squares * ~own, kept.gram, kept.first_order * ~own, None, elements
    )
    with torch.no_grad():
        site.reader.parameter[:, own] = 0
        for writer, rows in zip(site.writers, (24, 12, 12), strict=True):
            writer.parameter[:rows] = 0
    after = scores_of(sites, replace(statistics, sites={**statistics.sites, site.name: silent}), metric)
    assert float(after[site.name][0]) == 0 < float(before[site.name][0])
    assert float(after[site.name][1]) == float(before[site.name][1])


# -- optimal brain surgeon --------------------------------------------------------------------------------------------


def refit_error(weight: torch.Tensor, inputs: torch.Tensor, removed: list[int], ridge: torch.Tensor) -> float:
    """Error of the best weights on the kept columns, by least squares with the ridge as extra rows of data."""
    tokens = len(inputs)
    data = torch.cat([inputs, torch.diag((ridge * tokens).sqrt())])
    kept = [column for column in range(inputs.shape[1]) if column not in removed]
    goal = data @ weight.T
    solution = torch.linalg.lstsq(data[:, kept], goal).solution
    return float((data[:, kept] @ solution - goal).square().sum() / tokens)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([(12, 1), (4, 3), (2, 6)]), st.sampled_from(["mean", "column", "median"]))
def test_the_cost_of_a_block_equals_brute_force(seed: int, shape: tuple[int, int], scale: str) -> None:
    units, size = shape
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, units * size, generator=generator, dtype=torch.float64) @ torch.randn(
        units * size, units * size, generator=generator, dtype=torch.float64
    )
    weight = torch.randn(5, units * size, generator=generator, dtype=torch.float64)
    moments = inputs.T @ inputs / 40
    costs = block_costs(weight, damped_inverse(moments, 0.05, scale), units)
    ridge = ridge_diagonal(moments, 0.05, scale)
    for unit in range(units):
        expected = refit_error(weight, inputs, list(range(unit * size, (unit + 1) * size)), ridge)
        assert float(costs[unit]) == pytest.approx(expected, rel=1e-6)


def test_the_cost_of_an_expert_is_of_its_own_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 30, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    moments = inputs.transpose(1, 2) @ inputs / 30
    ridge = ridge_diagonal(moments, 0.01, "column")
    inverse = damped_inverse(moments, 0.01, "column")
    channels, experts = block_costs(weight, inverse, 18), block_costs(weight, inverse, 3)
    for expert in range(3):
        whole = refit_error(weight[expert], inputs[expert], list(range(6)), ridge[expert])
        assert float(experts[expert]) == pytest.approx(whole, rel=1e-6)
        one = refit_error(weight[expert], inputs[expert], [2], ridge[expert])
        assert float(channels[expert * 6 + 2]) == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize("metric", ["obs", "obs_gradient"])
def test_obs_of_a_model_is_the_block_cost_of_its_covariance(metric: str, llama: tuple[ModelSites, Statistics]) -> None:
    sites, statistics = llama
    found = scores_of(sites, statistics, metric)
    tokens = float(statistics.tokens.sum())
    for site in sites:
        moments, mean, counted = covariance(site, statistics, torch.ones(6))
        kept = statistics.sites[site.name]
        explicit = kept.gram[0].double() / tokens
        assert counted == tokens
        torch.testing.assert_close(moments, explicit - torch.outer(mean, mean))
        weight = site.reader.weight.double()
        if metric == "obs_gradient":
            weight = weight * (kept.output_gradients.double().sum(0) / tokens).sqrt()[:, None]
        units = site.units(unit_of(site, UNITS))
        expected = block_costs(weight, damped_inverse(moments, 0.01, "column"), units) * tokens
        torch.testing.assert_close(found[site.name], expected, rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([(10, 1), (96, 1), (5, 3)]))
def test_greedy_costs_add_up_to_the_joint_refit(seed: int, shape: tuple[int, int]) -> None:
    units, size = shape
    generator = torch.Generator().manual_seed(seed)
    width = units * size
    inputs = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    inputs[:, 1] = 0.99 * inputs[:, 0] + 0.01 * inputs[:, 1]
    weight = torch.randn(4, width, generator=generator, dtype=torch.float64)
    moments = inputs.T @ inputs / len(inputs)
    added = greedy_costs(weight, damped_inverse(moments, 0.01), units)
    ridge = ridge_diagonal(moments, 0.01, "mean")
    order = added.argsort(stable=True)
    total, exact = 0.0, True
    for count, unit in enumerate(order[: min(units - 1, 8)].tolist(), start=1):
        removed = [u * size + c for u in order[:count].tolist() for c in range(size)]
        joint = refit_error(weight, inputs, removed, ridge)
        total += float(added[unit])
        # Ranked costs never fall, so after a dip they are an upper bound.
        exact = exact and (count == 1 or float(added[unit]) > float(added[order[count - 2]]) * (1 + 2e-9))
        assert total >= joint * (1 - 1e-6)
        if exact:
            assert total == pytest.approx(joint, rel=1e-6)


def plainly_greedy(weight: torch.Tensor, inverse: torch.Tensor, units: int) -> torch.Tensor:
    """ZipLM's algorithm to the letter: everything is down-dated after every removal, and what is gone is cut out."""
    size = weight.shape[1] // units
    batch = max(1, units // 48) if size == 1 else 1
    added, left, highest = torch.zeros(units, dtype=torch.float64), torch.arange(units), 0.0

    def columns_of(chosen: torch.Tensor) -> torch.Tensor:
        return (chosen[:, None] * size + torch.arange(size)).flatten()

    while len(left):
        chosen = block_costs(weight, inverse, len(left)).topk(min(batch, len(left)), largest=False).indices
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[chosen] = False
        gone, rest = columns_of(chosen), columns_of(torch.where(stays)[0])
        factor = torch.linalg.cholesky(inverse[gone][:, gone])
        weights = torch.linalg.solve_triangular(factor, weight[:, gone].T, upper=False)
        errors = weights.square().sum(1).reshape(len(chosen), size).sum(1)
        for unit, error in zip(left[chosen].tolist(), errors.tolist(), strict=True):
            highest = added[unit] = max(highest * (1 + 1e-9), error)
        rows = torch.linalg.solve_triangular(factor, inverse[gone][:, rest], upper=False)
        weight, inverse, left = weight[:, rest] - weights.T @ rows, inverse[rest][:, rest] - rows.T @ rows, left[stays]
    return added


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from([(1, 1), (3, 1), (100, 1), (150, 1), (1, 4), (9, 5)]), st.booleans())
def test_greedy_costs_are_those_of_the_plain_algorithm(seed: int, shape: tuple[int, int], correlated: bool) -> None:
    units, size = shape
    width = units * size
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(2 * width, width, generator=generator, dtype=torch.float64)
    if correlated:
        mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
        inputs = inputs @ mixing * torch.logspace(-2, 1, width, dtype=torch.float64)
    weight = torch.randn(6, width, generator=generator, dtype=torch.float64)
    inverse = damped_inverse(inputs.T @ inputs / len(inputs), 0.01, "column")
    before = weight.clone(), inverse.clone()
    found, plain = greedy_costs(weight, inverse, units), plainly_greedy(weight, inverse, units)
    assert torch.equal(found.argsort(), plain.argsort())
    torch.testing.assert_close(found, plain, rtol=1e-9, atol=0)
    assert torch.equal(weight, before[0]) and torch.equal(inverse, before[1])


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.booleans())
def test_permuting_units_permutes_the_costs(seed: int, greedy: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(60, 14, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 14, generator=generator, dtype=torch.float64)
    order = torch.randperm(14, generator=generator)
    inverse = damped_inverse(inputs.T @ inputs / 60, 0.01, "column")
    costs = greedy_costs if greedy else block_costs
    permuted = costs(weight[:, order], inverse[order][:, order], 14)
    torch.testing.assert_close(permuted, costs(weight, inverse, 14)[order], rtol=1e-8, atol=1e-12)


def test_column_damping_leaves_other_columns_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 12, generator=generator, dtype=torch.float64)
    massive = inputs.clone()
    massive[:, 5] *= 300
    others = [column for column in range(12) if column != 5]
    ratios = {}
    for scale in ("column", "mean"):
        plain, with_massive = (
            block_costs(weight, damped_inverse(x.T @ x / 400, 0.01, scale), 12)[others] for x in (inputs, massive)
        )
        ratios[scale] = float((with_massive / plain).log().abs().max())
    assert ratios["column"] < 0.02 < 1 < ratios["mean"]


def test_moments_of_fewer_tokens_than_columns_have_a_factor() -> None:
    inputs = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) + 100
    inputs[:, 3] *= 3e3
    moments = (inputs.T @ inputs).double() / 20
    mean = inputs.mean(0).double()
    centred = moments - torch.outer(mean, mean)
    factor = cholesky(centred)
    assert torch.isfinite(factor).all() and torch.isfinite(damped_inverse(centred, 0.0, "column")).all()
    well = torch.eye(4, dtype=torch.float64) * 2
    assert torch.equal(cholesky(well), torch.linalg.cholesky(well))
    with pytest.raises(StatisticsError, match="not finite"):
        cholesky(torch.full((3, 3), float("nan"), dtype=torch.float64))


# -- mixtures ---------------------------------------------------------------------------------------------------------


def test_normalisations_do_what_they_say(llama: tuple[ModelSites, Statistics]) -> None:
    sites, statistics = llama
    raw = scores_of(sites, statistics, "obs")
    for scores in scores_of(sites, statistics, "obs", normalization="zscore").values():
        assert float(scores.mean()) == pytest.approx(0, abs=1e-9) and float(scores.std()) == pytest.approx(1)
    mean = torch.cat(list(scores_of(sites, statistics, "obs", normalization="mean").values()))
    assert float(mean.mean()) == pytest.approx(1)
    ranks = torch.cat(list(scores_of(sites, statistics, "obs", normalization="rank").values()))
    everything = torch.cat(list(raw.values()))
    assert float(ranks.min()) > 0 and float(ranks.max()) == 1 and torch.equal(ranks.argsort(), everything.argsort())
    mixed = ImportanceConfig({"obs": 3.0, "fisher": 1.0}, normalization="log")
    other = scores_of(sites, statistics, "fisher")
    for name, scores in score_units(sites, UNITS, mixed, statistics).units.items():
        torch.testing.assert_close(scores, raw[name] ** 0.75 * other[name] ** 0.25, rtol=1e-6, atol=0)
    half = ImportanceConfig({"obs": 1.0, "fisher": 1.0}, normalization="mean")
    scaled = {metric: scores_of(sites, statistics, metric, normalization="mean") for metric in ("obs", "fisher")}
    for name, scores in score_units(sites, UNITS, half, statistics).units.items():
        torch.testing.assert_close(scores, (scaled["obs"][name] + scaled["fisher"][name]) / 2)


def test_columns_are_standardised_before_they_are_pooled(llama: tuple[ModelSites, Statistics]) -> None:
    """FLAP's order: z-scores over all columns of a site, then the mean over a head's."""
    sites, statistics = llama
    site = sites.sites[0]
    columns = METRICS["wifv"].function(site, "kv_group", _context(statistics)).double()
    standard = (columns - columns.mean()) / columns.std()
    found = scores_of(sites, statistics, "wifv", normalization="zscore")[site.name]
    torch.testing.assert_close(found, standard.reshape(2, 24).mean(1))


def _context(statistics: Statistics) -> object:
    from hf_adaprune.metrics import Context

    return Context(statistics, torch.ones(len(statistics.tokens)))


@pytest.mark.parametrize("normalization", ["zscore", "mean", "rank", "log"])
def test_sites_whose_scores_do_not_differ_stay_finite(normalization: str) -> None:
    """One KV group has no spread, and block influence is shared evenly by a site's units."""
    sites = find_sites(tiny_model("llama", num_key_value_heads=1))
    statistics = everything(sites, samples=2, length=9)
    for metric in ("magnitude", "obs", "block_influence"):
        for scores in scores_of(sites, statistics, metric, normalization=normalization).values():
            assert torch.isfinite(scores).all() and float(scores.abs().max()) < 1e6


def test_layers_score_by_influence_or_by_their_sites(llama: tuple[ModelSites, Statistics]) -> None:
    sites, statistics = llama
    influence = score_units(sites, UNITS, ImportanceConfig({"block_influence": 2.0}), statistics).layers
    expected = 1 - statistics.cosine.double().sum(0) / statistics.tokens.sum()
    torch.testing.assert_close(influence, expected, rtol=1e-6, atol=0)
    found = score_units(sites, UNITS, ImportanceConfig({"fisher": 1.0, "block_influence": 0.0}), statistics)
    for layer in range(3):
        own = found.sublayers[f"layers.{layer}.attention"] + found.sublayers[f"layers.{layer}.mlp"]
        assert float(found.layers[layer]) == pytest.approx(own)


@pytest.mark.parametrize("normalization", ["mean", "rank", "log"])
def test_layers_score_by_all_metrics_of_a_mixture(normalization: str, llama: tuple[ModelSites, Statistics]) -> None:
    """Block influence beside another metric: a little of either changes little, half of each is neither alone."""
    sites, statistics = llama

    def layers(influence: float, fisher: float) -> torch.Tensor:
        config = ImportanceConfig({"block_influence": influence, "fisher": fisher}, normalization)
        return score_units(sites, ("layer",), config, statistics).layers

    def shares(scores: torch.Tensor) -> torch.Tensor:
        return scores / scores.sum()

    torch.testing.assert_close(layers(1e-9, 1.0), layers(0.0, 1.0), rtol=1e-6, atol=0)
    if normalization != "rank":  # whose steps are even, however far apart two layers are
        torch.testing.assert_close(shares(layers(1.0, 1e-9)), shares(layers(1.0, 0.0)), rtol=1e-6, atol=0)
    half = shares(layers(1.0, 1.0))
    assert all(float((half - shares(layers(*own))).abs().max()) > 1e-3 for own in ((1.0, 0.0), (0.0, 1.0)))


def test_a_mixture_that_is_not_finite_is_refused(llama: tuple[ModelSites, Statistics]) -> None:
    """Each number is, and their sum over a layer is not."""
    sites, _ = llama
    kinds = scored_kinds(sites, UNITS)
    huge = {site.name: torch.full((site.units(kinds[site.name]),), 1e308, dtype=torch.float64) for site in sites}
    config = ImportanceConfig({"random": 1.0})
    with pytest.raises(StatisticsError, match="mixture of random is not finite"):
        mix_scores(sites, kinds, {"random": huge}, config)


def test_unknown_metrics_and_missing_statistics_are_named(llama: tuple[ModelSites, Statistics]) -> None:
    sites, _ = llama
    with pytest.raises(ConfigError, match=r"no metric 'wandasp'\. Known: .*wanda_sp"):
        needs_of(ImportanceConfig({"wandasp": 1.0}))
    bare = collect_statistics(sites, random_blocks(1), Needs())
    for metric, what in (
        ("obs", "no Gram matrices"),
        ("fisher", "no first-order terms"),
        ("taylor_vector", "no element-wise terms"),
        ("block_influence", "no layer cosines"),
    ):
        with pytest.raises(StatisticsError, match=what):
            scores_of(sites, bare, metric)
    grams = collect_statistics(sites, random_blocks(1), Needs(gram=True))
    with pytest.raises(StatisticsError, match="no output gradients"):
        scores_of(sites, grams, "obs_gradient")


def test_random_scores_are_a_sites_own(llama: tuple[ModelSites, Statistics]) -> None:
    sites, statistics = llama
    first, again, other = (scores_of(sites, statistics, "random", seed=seed) for seed in (1, 1, 2))
    fewer = find_sites(tiny_model("llama", num_hidden_layers=1))
    alone = scores_of(fewer, statistics, "random", seed=1)
    for name, scores in first.items():
        assert torch.equal(scores, again[name]) and not torch.equal(scores, other[name])
        assert name not in alone or torch.equal(scores, alone[name])
    assert not torch.equal(first["layers.0.mlp"], first["layers.1.mlp"])
