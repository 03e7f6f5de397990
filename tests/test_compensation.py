"""Laws of repairs: each equals an explicit regression, and none raises the output error on its own data."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from conftest import logits_of, tiny_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plan_of_kind, site_plans
from texts import random_blocks

from hf_adaprune.compensation import (
    Moments,
    _regress,
    bias_repair,
    check_enough_tokens,
    output_error,
    repair_from_moments,
    repair_plan,
)
from hf_adaprune.config import RepairConfig
from hf_adaprune.errors import CalibrationError, ConfigError, StatisticsError
from hf_adaprune.layerwise import regional_weights, sequential_repairs
from hf_adaprune.masking import masked
from hf_adaprune.moments import covariance
from hf_adaprune.parts import DAMPING_SCALES, REPAIRS, SCHEDULES
from hf_adaprune.plan import PruningPlan, SitePlan
from hf_adaprune.recording import collect_statistics
from hf_adaprune.repairing import check_repairs
from hf_adaprune.site import Site
from hf_adaprune.sites import ModelSites, find_sites
from hf_adaprune.statistics import Needs, Statistics
from hf_adaprune.surgery import apply_plan, assign_layer
from hf_adaprune.token_blocks import TokenBlocks
from hf_adaprune.tracing import watched_inputs
from hf_adaprune.walk import Walk

BLOCKS = random_blocks(8, 40)


@functools.cache
def dense(family: str) -> tuple[ModelSites, Statistics]:
    """A model nobody changes, and its moments."""
    sites = find_sites(tiny_model(family, attention_bias=True) if family == "llama" else tiny_model(family))
    return sites, collect_statistics(sites, BLOCKS, Needs(gram=True))


@functools.cache
def inputs_of(family: str, name: str) -> dict[int, torch.Tensor]:
    """What a reader reads on the blocks, by expert (0 elsewhere), float64; experts' rows are weighted by the gate."""
    sites, _ = dense(family)
    rows: dict[int, list[torch.Tensor]] = {}
    with watched_inputs(sites, sites.by_name[name], lambda expert, own: rows.setdefault(expert, []).append(own)):
        logits_of(sites.model, BLOCKS.input_ids)
    return {expert: torch.cat(own).double() for expert, own in rows.items()}


def moments_of(family: str, site: Site) -> Moments:
    """Covariance and mean of a reader's inputs, as the pipeline takes them."""
    matrix, mean, _ = covariance(site, dense(family)[1], torch.ones(len(BLOCKS)))
    return Moments(matrix, mean)


def some_units(site: Site, keep: float = 0.6, seed: int = 0) -> SitePlan:
    """A random narrow site; whole KV groups where the site has them."""
    generator = torch.Generator().manual_seed(seed)
    if site.kind == "attention":
        return SitePlan(site.groups, site.group_size, tuple(range(site.group_size, 2 * site.group_size)))
    per_group = max(1, int(keep * site.group_size))
    kept = [
        group * site.group_size + int(unit)
        for group in range(site.groups)
        for unit in torch.randperm(site.group_size, generator=generator)[:per_group].sort().values
    ]
    return SitePlan(site.groups, site.group_size, tuple(kept))


CASES = [("llama", "layers.1.mlp"), ("llama", "layers.0.attention"), ("gpt2", "layers.2.mlp"), ("opt", "layers.1.mlp")]


def test_the_bias_is_the_mean_of_what_went() -> None:
    """`b = W[:, removed] mu[removed]`, added to a bias that is there (FLAP's card)."""
    for family, name in CASES:
        sites, statistics = dense(family)
        site = sites.by_name[name]
        kept = some_units(site)
        plan = PruningPlan(sites.architecture.model_type, 3, {name: kept})
        repair = repair_plan(sites, plan, statistics, torch.ones(len(BLOCKS)), RepairConfig("bias"))[name]
        rows, weight = inputs_of(family, name)[0], site.reader.weight.double()
        gone = [column for column in range(site.columns) if column not in site.column_index(kept).tolist()]
        expected = (rows[:, gone] @ weight[:, gone].T).mean(0)
        if site.reader.bias is not None:
            expected = expected + site.reader.bias.detach().double()
        torch.testing.assert_close(repair.bias.double(), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(repair.weight, site.reader.weight[:, site.column_index(kept)])
        again = bias_repair(site, kept, rows.mean(0))
        torch.testing.assert_close(again.bias, repair.bias, rtol=1e-4, atol=1e-5)


def explicit(
    rows: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor, config: RepairConfig, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ridge regression by `lstsq`: the ridge is extra data, whose target is what the old weights make of it."""
    inner = rows[:, columns]
    goal = rows @ weight.T
    centred = inner - inner.mean(0) if config.intercept else inner
    own = centred.square().mean(0)
    scale = {"mean": own.mean().expand_as(own), "column": own, "median": own.median().expand_as(own)}
    ridge = config.damping * scale[config.damping_scale] + 1e-6 * own.mean()
    pull = torch.diag((ridge * len(rows)).sqrt())
    one = torch.ones(len(rows), int(config.intercept), dtype=torch.float64)
    none = torch.zeros(len(columns), int(config.intercept), dtype=torch.float64)
    data = torch.cat([torch.cat([inner, one], 1), torch.cat([pull, none], 1)])
    solution = torch.linalg.lstsq(data, torch.cat([goal, pull @ weight[:, columns].T])).solution.T
    if not config.intercept:
        return solution, None
    return solution[:, :-1], solution[:, -1] + (0 if bias is None else bias.detach().double())


@pytest.mark.parametrize("scale", DAMPING_SCALES)
@pytest.mark.parametrize("intercept", [True, False])
def test_least_squares_equals_lstsq(intercept: bool, scale: str) -> None:
    for damping in (0.05, 5.0):
        config = RepairConfig(intercept=intercept, damping=damping, damping_scale=scale)
        for family, name in CASES:
            site = dense(family)[0].by_name[name]
            kept = some_units(site)
            repair = repair_from_moments(site, kept, moments_of(family, site), config)
            rows, dense_weight = inputs_of(family, name)[0], site.reader.weight.double()
            weight, bias = explicit(rows, dense_weight, site.column_index(kept), config, site.reader.bias)
            torch.testing.assert_close(repair.weight.double(), weight, rtol=1e-3, atol=1e-4)
            assert (repair.bias is None) == (bias is None)
            if bias is not None:
                torch.testing.assert_close(repair.bias.double(), bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", DAMPING_SCALES)
@pytest.mark.parametrize("kind", ["expert", "expert_channel"])
def test_experts_are_regressed_one_by_one_without_a_bias(kind: str, scale: str) -> None:
    sites, _ = dense("mixtral")
    site = sites.by_name["layers.1.experts"]
    kept = some_units(site) if kind == "expert_channel" else SitePlan(4, 24, tuple(range(24, 72)))
    config = RepairConfig(damping=0.05, damping_scale=scale)
    repair = repair_from_moments(site, kept, moments_of("mixtral", site), config)
    assert repair.bias is None and repair.weight.shape == (len(kept.kept_groups), 32, kept.kept_per_group)
    for number, expert in enumerate(kept.kept_groups):
        own = torch.tensor([unit % 24 for unit in kept.kept if unit // 24 == expert])
        plain = RepairConfig(damping=0.05, damping_scale=scale, intercept=False)
        weight = site.reader.weight[expert].double()
        expected, _ = explicit(inputs_of("mixtral", site.name)[expert], weight, own, plain, None)
        torch.testing.assert_close(repair.weight[number].double(), expected, rtol=1e-3, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(site_plans(groups=1, group_size=48), st.booleans(), st.sampled_from(DAMPING_SCALES), st.floats(0, 100))
def test_a_repair_never_raises_the_error_on_its_own_data(
    kept: SitePlan, intercept: bool, scale: str, damping: float
) -> None:
    if kept.is_empty:
        return
    site = dense("llama")[0].by_name["layers.1.mlp"]
    moments = moments_of("llama", site)
    config = RepairConfig(intercept=intercept, damping=damping, damping_scale=scale)
    rows = inputs_of("llama", site.name)[0]
    before = output_error(site, kept, None, rows)
    after = output_error(site, kept, repair_from_moments(site, kept, moments, config), rows)
    assert after <= before * (1 + 1e-5) + 1e-9
    bias = output_error(site, kept, bias_repair(site, kept, moments.mean), rows)
    assert bias <= before * (1 + 1e-5) + 1e-9
    if intercept:
        assert after <= bias * (1 + 1e-5) + 1e-9


def test_the_output_error_is_the_output_error() -> None:
    for family, name in CASES:
        site = dense(family)[0].by_name[name]
        kept, moments, rows = some_units(site), moments_of(family, site), inputs_of(family, name)[0]
        weight, columns = site.reader.weight.double(), site.column_index(kept)
        old_bias = 0.0 if site.reader.bias is None else site.reader.bias.detach().double()
        goal = rows @ weight.T + old_bias
        fitted = repair_from_moments(site, kept, moments, RepairConfig())
        for repair in (None, fitted, repair_from_moments(site, kept, moments, RepairConfig(intercept=False))):
            own = weight[:, columns] if repair is None else repair.weight.double()
            bias = old_bias if repair is None or repair.bias is None else repair.bias.double()
            expected = (rows[:, columns] @ own.T + bias - goal).square().sum()
            assert float(output_error(site, kept, repair, rows)) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)
    site = dense("mixtral")[0].by_name["layers.1.experts"]
    kept, moments = SitePlan(4, 24, (*range(24, 34), *range(50, 60))), moments_of("mixtral", site)
    for repair in (None, repair_from_moments(site, kept, moments, RepairConfig())):
        for expert, rows in inputs_of("mixtral", site.name).items():
            weight, own = site.reader.weight[expert].double(), torch.arange(10) + (0 if expert == 1 else 2)
            new = weight[:, own] if repair is None else repair.weight[max(0, expert - 1) % 2].double()
            expected = (rows[:, own] @ new.T - rows @ weight.T).square().sum() if expert in (1, 2) else 0.0
            found = float(output_error(site, kept, repair, rows, expert))
            assert found == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_repairs_are_checked_on_each_token_of_held_out_windows(family: str) -> None:
    sites, statistics = dense(family)
    plan = PruningPlan(family, 3, {site.name: some_units(site) for site in sites})
    repairs = repair_plan(sites, plan, statistics, torch.ones(len(BLOCKS)), RepairConfig(damping=0.1))
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[1, 6:] = False
    held = TokenBlocks(tokens(3, 10, seed=5), mask, torch.zeros(3, dtype=torch.long), ("a",))
    reports = check_repairs(sites, plan, repairs, held)
    assert [report.name for report in reports] == list(repairs)
    for report in reports:
        site, expected = sites.by_name[report.name], [0.0, 0.0]
        for window, seen in zip(held.input_ids, mask, strict=True):
            rows: list[tuple[int, torch.Tensor]] = []
            with watched_inputs(sites, site, lambda expert, own, rows=rows: rows.append((expert, own))):
                logits_of(sites.model, window[seen][None])
            for number, repair in enumerate((None, repairs[site.name])):
                for expert, own in rows:
                    expected[number] += float(output_error(site, plan.sites[site.name], repair, own, expert)) / 26
        assert [report.before, report.after] == pytest.approx(expected, rel=1e-5)
        assert report.kept == (report.after < report.before)
    with torch.no_grad():
        spoiled = find_sites(tiny_model(family))
        next(iter(spoiled.model.parameters())).fill_(float("nan"))
    with pytest.raises(StatisticsError, match=r"layers\.0\..*not finite on held-out windows"):
        check_repairs(spoiled, plan, repairs, held)


def test_few_tokens_are_refused_with_the_number_that_would_do() -> None:
    sites, _ = dense("llama")
    kept = {"layers.0.mlp": some_units(sites.by_name["layers.0.mlp"])}  # 28 of 48 channels
    config = RepairConfig(min_tokens_per_column=2.5)
    with pytest.raises(CalibrationError, match=r"69 calibration tokens.*with 28 inputs: at least 70 are"):
        check_enough_tokens(sites, 69, config, kept)
    check_enough_tokens(sites, 70, config, kept)
    check_enough_tokens(sites, 0, RepairConfig("bias"), kept)
    check_enough_tokens(sites, 0, RepairConfig(min_tokens_per_column=0), kept)
    experts = dense("mixtral")[0]
    check_enough_tokens(experts, 0, config, {"layers.0.experts": experts.by_name["layers.0.experts"].whole})


@pytest.mark.parametrize("method", REPAIRS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_a_schedule_that_would_change_nothing_is_refused(method: str, schedule: str, holdout: float) -> None:
    refused = {
        "walks without least squares": method != "least_squares" and schedule != "cached",
        "compares without windows": schedule == "best" and not holdout,
    }
    if not any(refused.values()):
        assert RepairConfig(method, schedule=schedule, holdout=holdout).schedule == schedule
        return
    told = "is of least squares" if refused["walks without least squares"] else "held-out windows"
    with pytest.raises(ConfigError, match=told):
        RepairConfig(method, schedule=schedule, holdout=holdout)


def narrow_plan(sites: ModelSites) -> PruningPlan:
    """Every site that may be cut loses some of its units."""
    cuts = {site.name: some_units(site) for site in sites if not site.refusal}
    if sites.architecture.experts is not None:  # 16 of 24 channels: whole 16 bytes
        cuts.update({s.name: some_units(s, keep=0.67) for s in sites if s.kind == "experts"})
    return PruningPlan(sites.architecture.model_type, len(sites.layers), cuts)


# -- layer after layer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_sequential_equals_cached_where_nothing_was_cut_before(family: str, mix: float) -> None:
    """On an unpruned prefix both streams are one, so the target does not matter either."""
    sites, statistics = dense(family)
    plan = narrow_plan(sites)
    first = next(iter(dict(plan.changed())))
    walked = sequential_repairs(sites, plan, BLOCKS, RepairConfig(target_mix=mix))
    cached = repair_plan(sites, plan, statistics, torch.ones(len(BLOCKS)), RepairConfig())
    assert set(walked) == set(cached) == set(plan.sites)
    torch.testing.assert_close(walked[first].weight, cached[first].weight, rtol=1e-3, atol=1e-4)
    if cached[first].bias is not None:
        torch.testing.assert_close(walked[first].bias, cached[first].bias, rtol=1e-3, atol=1e-4)
    last = "layers.2.attention" if family == "mixtral" else "layers.2.mlp"
    assert not torch.allclose(walked[last].weight, cached[last].weight, atol=1e-4)


def streams_behind(sites: ModelSites, number: int) -> torch.Tensor:
    """What a layer hands on, `[tokens, hidden]`, float64."""
    seen: list[torch.Tensor] = []
    handle = sites.layers[number].register_forward_hook(lambda _, args, output: seen.append(output))
    logits_of(sites.model, BLOCKS.input_ids)
    handle.remove()
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return output.reshape(-1, output.shape[-1]).double()


@pytest.mark.parametrize("mix", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize(("family", "kind"), [("llama", "mlp"), ("llama", "attention"), ("gpt_neox", "mlp")])
def test_sequential_regresses_the_mixed_target(family: str, kind: str, intercept: bool, mix: float) -> None:
    """The second cut site, by lstsq on what the pruned model feeds it and how far its stream is behind."""
    sites, _ = dense(family)
    names = ("layers.0.mlp", f"layers.1.{kind}")
    plan = PruningPlan(family, 3, {name: some_units(sites.by_name[name]) for name in names})
    config = RepairConfig(target_mix=mix, intercept=intercept, damping=0.0)
    repairs = sequential_repairs(sites, plan, BLOCKS, config)
    site, rows = sites.by_name[names[1]], []
    before = PruningPlan(family, 3, {"layers.0.mlp": plan.sites["layers.0.mlp"]})
    full = inputs_of(family, site.name)[0]
    # Behind the MLP the stream is the layer's output; behind attention its input and what attention adds.
    number = 1 if kind == "mlp" else 0
    wanted = streams_behind(sites, number)
    with masked(sites, before, repairs), watched_inputs(sites, site, lambda _, own: rows.append(own.double())):
        behind = streams_behind(sites, number)
    pruned, weight = rows[0], site.reader.weight.double()
    lag = wanted - behind + (0 if kind == "mlp" else (full - pruned) @ weight.T)
    goal = pruned @ weight.T + mix * lag
    inner = pruned[:, site.column_index(plan.sites[site.name])]
    data = torch.cat([inner, torch.ones(len(inner), int(intercept), dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(data, goal).solution.T
    made = repairs[site.name].weight.double()
    torch.testing.assert_close(made, solution[:, : made.shape[1]], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(("family", "dense_passes"), [("llama", 1), ("gemma2", 2)])
def test_the_dense_stream_passes_a_layer_on_the_way(family: str, dense_passes: int) -> None:
    """MLPs run once per window for the dense stream and twice for the pruned one; a norm behind a reader asks again."""
    sites, _ = dense(family)
    plan, ran = narrow_plan(sites), []
    assert {"layers.1.attention", "layers.1.mlp"} <= set(plan.sites)
    handle = sites.by_name["layers.1.mlp"].sublayer.register_forward_pre_hook(lambda *_: ran.append(1))
    try:
        sequential_repairs(sites, plan, BLOCKS, RepairConfig(target_mix=0.5))
    finally:
        handle.remove()
    tried = 2  # whether the layer adds what the reader gives
    assert len(ran) == len(BLOCKS) * (2 + dense_passes) + tried


NORMED = ("gemma2", "gemma3_text", "olmo2")  # their sublayers' outputs are normed before the stream takes them


def test_a_norm_behind_the_reader_is_noticed(family: str) -> None:
    sites = find_sites(tiny_model(family))
    walk = Walk(sites, BLOCKS)
    assert [walk.adds(number) for number in range(3)] == [family not in NORMED] * 3
    for number in range(3):
        walk.pass_dense(number)
        walk.pass_dense(number)
    assert walk.passed == 3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sites.model.modules())


def test_an_opt_that_norms_its_outputs_is_noticed() -> None:
    sites = find_sites(tiny_model("opt", do_layer_norm_before=False))
    assert not Walk(sites, BLOCKS).adds(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1, 10, 100])
def test_a_norm_is_noticed_whatever_the_size_of_the_stream(family: str, dtype: torch.dtype, scale: int) -> None:
    """What a sublayer gives may be less than what a large stream is rounded by, and as large as a norm makes it."""
    model = tiny_model(family)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    sites = find_sites(model.to(dtype))
    walk = Walk(sites, BLOCKS.select(torch.arange(1)))
    assert [walk.adds(number) for number in range(3)] == [family not in NORMED] * 3


def test_a_norm_that_makes_outputs_as_large_as_the_stream_is_noticed() -> None:
    """One token again and again, a stream of signs, and a norm that gives it what has its size already."""
    model = tiny_model("olmo2")
    layer, embedding = model.model.layers[0], model.get_input_embeddings().weight
    with torch.no_grad():
        embedding.copy_(embedding.sign())
        layer.post_attention_layernorm.weight.fill_(1e-4)
        layer.post_feedforward_layernorm.weight.fill_(1.0)
    blocks = replace(BLOCKS, input_ids=torch.full_like(BLOCKS.input_ids, 7))
    assert not Walk(find_sites(model), blocks).adds(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_without_its_mlp_answers_by_its_attention(family: str, dtype: torch.dtype) -> None:
    dense_sites = find_sites(tiny_model(family).to(dtype))
    gone = [site for site in dense_sites if site.layer == 1][-1]
    silent = SitePlan(gone.groups, gone.group_size, ())
    apply_plan(dense_sites, PruningPlan(family, 3, {gone.name: silent}))
    sites = find_sites(dense_sites.model)
    assert [site.kind for site in sites if site.layer == 1] == ["attention"]
    assert Walk(sites, BLOCKS).adds(1) == (family not in NORMED)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_behind_a_norm_the_target_is_the_dense_output(family: str) -> None:
    sites, _ = dense(family)
    names = ("layers.0.mlp", "layers.1.mlp")
    plan = PruningPlan(family, 3, {name: some_units(sites.by_name[name]) for name in names})
    repairs = sequential_repairs(sites, plan, BLOCKS, RepairConfig(target_mix=1.0, damping=0.0))
    site, rows = sites.by_name[names[1]], []
    first = PruningPlan(family, 3, {names[0]: plan.sites[names[0]]})
    with masked(sites, first, repairs), watched_inputs(sites, site, lambda _, own: rows.append(own.double())):
        logits_of(sites.model, BLOCKS.input_ids)
    goal = inputs_of(family, site.name)[0] @ site.reader.weight.double().T
    solution = torch.linalg.lstsq(rows[0][:, site.column_index(plan.sites[site.name])], goal).solution.T
    torch.testing.assert_close(repairs[site.name].weight.double(), solution, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "phi3", "qwen3_moe"])
def test_the_stream_ends_closer_to_the_dense_one(family: str) -> None:
    sites, _ = dense(family)
    plan, wanted, errors = narrow_plan(sites), streams_behind(sites, 2), []
    for mix in (0.0, 1.0):
        repairs = sequential_repairs(sites, plan, BLOCKS, RepairConfig(target_mix=mix))
        with masked(sites, plan, repairs):
            errors.append(float((streams_behind(sites, 2) - wanted).square().mean()))
    assert errors[1] < 0.97 * errors[0]


def test_the_dense_model_is_untouched_and_dropped_layers_are_skipped() -> None:
    sites, _ = dense("llama")
    plan = PruningPlan("llama", 3, {"layers.2.mlp": some_units(sites.by_name["layers.2.mlp"])}, (1,))
    before = {name: value.clone() for name, value in sites.model.state_dict().items()}
    repairs = sequential_repairs(sites, plan, BLOCKS, RepairConfig(target_mix=0.5))
    assert set(repairs) == {"layers.2.mlp"}
    weights, report = regional_weights(sites, plan, repairs, BLOCKS, RepairConfig(regional_steps=2), 0)
    assert [name for name, _, _ in report] == ["layers.2"] and set(weights) <= {2}
    assert all(torch.equal(value, before[name]) for name, value in sites.model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in sites.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in sites.model.modules())


def test_windows_with_padding_are_left_out_of_the_walk() -> None:
    sites, _ = dense("llama")
    plan = PruningPlan("llama", 3, {"layers.0.mlp": some_units(sites.by_name["layers.0.mlp"])})
    whole = sequential_repairs(sites, plan, random_blocks(5, 40).select([2, 3, 4]), RepairConfig())
    padded = sequential_repairs(sites, plan, random_blocks(5, 40, padding=(3, 1)), RepairConfig())
    assert torch.equal(whole["layers.0.mlp"].weight, padded["layers.0.mlp"].weight)
    with pytest.raises(CalibrationError, match="windows without padding"):
        sequential_repairs(sites, plan, random_blocks(1, 40, padding=(3,)), RepairConfig())


@pytest.mark.parametrize("rate", [1e-3, 1.0])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_regional_weights_lower_the_held_out_error_or_are_dropped(family: str, rate: float) -> None:
    sites, statistics = dense(family)
    plan = narrow_plan(sites)
    repairs = repair_plan(sites, plan, statistics, torch.ones(len(BLOCKS)), RepairConfig())
    config = RepairConfig(regional_steps=4, regional_learning_rate=rate)
    blocks = random_blocks(9, 24, seed=5)
    weights, report = regional_weights(sites, plan, repairs, blocks, config, seed=0)
    assert [name for name, _, _ in report] == [f"layers.{layer}" for layer in range(3)]
    assert {int(name.split(".")[1]) for name, before, after in report if after < before} == set(weights)
    if rate == 1.0:
        return
    assert weights
    again, _ = regional_weights(sites, plan, repairs, blocks, config, seed=0)
    assert all(torch.equal(value, again[n][name]) for n, own in weights.items() for name, value in own.items())
    # What comes back is what the cut model's first block needs: its held-out error is the reported one.
    model = copy.deepcopy(sites.model)
    full = layer_outputs(find_sites(model), blocks.input_ids[::8])
    cut = apply_plan(find_sites(model), plan, repairs)
    for number, state in weights.items():
        assign_layer(cut.layers[number], state)
    error = (layer_outputs(cut, blocks.input_ids[::8]) - full).square().mean()
    first = report[0]
    assert float(error) == pytest.approx(first[2] if 0 in weights else first[1], rel=1e-3)


def layer_outputs(sites: ModelSites, ids: torch.Tensor) -> torch.Tensor:
    """What the first decoder layer returns."""
    seen: list = []
    hook = sites.layers[0].register_forward_hook(lambda _, args, output: seen.append(output))
    logits_of(sites.model, ids)
    hook.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("kind", ["channel", "kv_group", "query_head"])
@pytest.mark.parametrize("config", [RepairConfig("bias"), RepairConfig(), RepairConfig(intercept=False)],
                         ids=["bias", "affine", "linear"])  # fmt: skip
def test_masked_and_repaired_equals_cut_and_repaired(config: RepairConfig, kind: str) -> None:
    model = tiny_model("llama")
    sites = find_sites(model)
    plan = plan_of_kind(sites, kind)
    statistics = collect_statistics(sites, BLOCKS, Needs(gram=True))
    repairs = repair_plan(sites, plan, statistics, torch.ones(len(BLOCKS)), config)
    assert set(repairs) == {name for name, _ in plan.changed()}
    ids = tokens()
    with masked(sites, plan, repairs):
        expected = logits_of(model, ids)
    apply_plan(sites, plan, repairs)
    torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-4, rtol=1e-4)


def test_weights_of_domains_choose_the_moments() -> None:
    """Weight 0 on a domain repairs as if it had not been there."""
    sites, _ = dense("llama")
    blocks = random_blocks(8, 40, domains=2)
    plan = PruningPlan("llama", 3, {"layers.0.mlp": some_units(sites.by_name["layers.0.mlp"])})
    both = collect_statistics(sites, blocks, Needs(gram=True, per_domain=True))
    alone = collect_statistics(sites, blocks.select(torch.where(blocks.domain == 1)[0]), Needs(gram=True))
    for config in (RepairConfig(), RepairConfig("bias")):
        weighted = repair_plan(sites, plan, both, both.sample_weights((0.0, 1.0)), config)["layers.0.mlp"]
        expected = repair_plan(sites, plan, alone, torch.ones(4), config)["layers.0.mlp"]
        torch.testing.assert_close(weighted.weight, expected.weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(weighted.bias, expected.bias, rtol=1e-3, atol=1e-5)
    assert repair_plan(sites, plan, both, torch.ones(8), RepairConfig("none")) == {}


# -- the algebra ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", DAMPING_SCALES)
@pytest.mark.parametrize("removed", [3, 40])
@pytest.mark.parametrize("shifted", [False, True])
def test_the_regression_equals_its_formula(scale: str, removed: int, shifted: bool) -> None:
    """`W_K* = (W C[:, K] + S_K + d W_K) (C_KK + d)^-1`, whichever of outputs and removed columns are fewer."""
    generator = torch.Generator().manual_seed(removed)
    rows = torch.randn(200, 48, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(48, 48, generator=generator, dtype=torch.float64)
    matrix, weight = rows.T @ rows / 200, torch.randn(16, 48, generator=generator, dtype=torch.float64)
    shift = torch.randn(16, 48, generator=generator, dtype=torch.float64) @ matrix
    columns = torch.randperm(48, generator=generator)[removed:].sort().values
    config = RepairConfig(damping=0.03, damping_scale=scale)
    own = matrix.diagonal()[columns]
    chosen = {"mean": own.mean(), "column": own, "median": own.median()}[scale]
    ridge = torch.diag(config.damping * chosen * torch.ones_like(own) + 1e-6 * own.mean())
    goal = weight @ matrix[:, columns] + weight[:, columns] @ ridge
    shift = shift[:, columns] if shifted else None
    goal = goal if shift is None else goal + shift
    expected = goal @ torch.linalg.inv(matrix[columns][:, columns] + ridge)
    before = matrix.clone()
    found = _regress(weight, matrix, columns, config, shift)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert torch.equal(matrix, before)
    # Moments of the columns that stay, with all, say as much; and a mean turns covariances into second moments.
    assert torch.equal(_regress(weight, matrix[:, columns], columns, config, shift), found)
    mean = torch.randn(48, generator=generator, dtype=torch.float64)
    centred = matrix - torch.outer(mean, mean)
    for part in (centred, centred[:, columns]):
        torch.testing.assert_close(_regress(weight, part, columns, config, shift, mean), expected, rtol=1e-8, atol=1e-8)


def with_massive_column(statistics: Statistics, kept: SitePlan, stays: bool) -> Statistics:
    """Moments in which one column of every reader is 10,000 times as large: one that stays, or one that goes."""
    column = next(column for column in range(48) if (column in kept.kept) == stays)
    scaled = {}
    for name, own in statistics.sites.items():
        gram, sums = own.gram.clone(), own.sums.clone()
        gram[:, column] *= 1e4
        gram[:, :, column] *= 1e4
        sums[:, column] *= 1e4
        scaled[name] = replace(own, gram=gram, sums=sums)
    return replace(statistics, sites=scaled)


@pytest.mark.parametrize("scale", DAMPING_SCALES)
@pytest.mark.parametrize("massive", [None, True, False], ids=["plain", "massive column stays", "massive column goes"])
def test_float32_is_close_to_float64(massive: bool | None, scale: str) -> None:
    sites, statistics = dense("llama")
    name = "layers.1.mlp"
    plan = PruningPlan("llama", 3, {name: some_units(sites.by_name[name])})
    if massive is not None:
        statistics = with_massive_column(statistics, plan.sites[name], massive)
    for damping in (1e-2, 1e-6):
        config = RepairConfig(damping=damping, damping_scale=scale)
        wide = repair_plan(sites, plan, statistics, torch.ones(len(BLOCKS)), config)[name].weight
        narrow = repair_plan(sites, plan, statistics, torch.ones(len(BLOCKS)), config, torch.float32)[name].weight
        own = sites.by_name[name].reader.weight[:, sites.by_name[name].column_index(plan.sites[name])]
        assert (narrow - wide).norm() < 1e-5 * (wide - own).norm()
        again = repair_plan(sites, plan, statistics, torch.ones(len(BLOCKS)), config)[name].weight
        assert torch.equal(again, wide)


def test_float32_bears_fewer_tokens_than_columns() -> None:
    sites, _ = dense("llama")
    name = "layers.1.mlp"
    statistics = collect_statistics(sites, random_blocks(1, 12), Needs(gram=True))
    plan = PruningPlan("llama", 3, {name: some_units(sites.by_name[name])})
    for damping, tolerance in ((1e-2, 1e-4), (1e-5, 1e-1)):
        config = RepairConfig(damping=damping)
        wide = repair_plan(sites, plan, statistics, torch.ones(1), config)[name].weight
        narrow = repair_plan(sites, plan, statistics, torch.ones(1), config, torch.float32)[name].weight
        assert (narrow - wide).norm() < tolerance * wide.norm()
