"""Laws of costs and budgets: costs are those of the model really cut, and a plan keeps to all budgets together."""

from __future__ import annotations

import functools
import json
from itertools import pairwise

import pytest
import torch
from conftest import FAMILIES, tiny_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import KINDS, mixed_cut, plan_of_kind, random_repairs
from torch.utils.flop_counter import FlopCounterMode

from hf_adaprune import budgets as budgets_room
from hf_adaprune.allocation import allocate
from hf_adaprune.budgets import allocate_within, check_budgets, even_scores, missed_budgets, nested_plans
from hf_adaprune.config import AllocationConfig, PruningConfig, RepairConfig
from hf_adaprune.costs import Costs
from hf_adaprune.errors import BudgetError, ConfigError, UnsupportedModelError
from hf_adaprune.importance import Scores, unit_of
from hf_adaprune.pipeline import prune
from hf_adaprune.plan import PruningPlan, SitePlan
from hf_adaprune.sites import ModelSites, find_sites
from hf_adaprune.speeds import SpeedCurve, SpeedTable, measure_speed_table, shape_of
from hf_adaprune.stages import decide, even_plan
from hf_adaprune.surgery import apply_plan

WIDTHS = ("channel", "kv_group", "expert_channel")
NO_REPAIR = RepairConfig("none")
CONTEXT = 32
COSINE = torch.tensor([0.3, 0.9, 0.6])
METHODS = ("global", "uniform", "similarity", "flap")


@functools.cache
def sites_of(family: str) -> ModelSites:
    return find_sites(tiny_model(family))


def random_scores(sites: ModelSites, units: tuple[str, ...], seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    finest = {"attention": "kv_group", "mlp": "channel", "experts": "expert_channel"}
    kinds = {site.name: unit_of(site, units) or finest[site.kind] for site in sites}
    own = {site.name: torch.rand(site.units(kinds[site.name]), generator=generator).double() for site in sites}
    sublayers = {name: float(scores.sum()) for name, scores in own.items()}
    layers = torch.zeros(len(sites.layers), dtype=torch.float64)
    for site in sites:
        layers[site.layer] += sublayers[site.name]
    return Scores(own, kinds, sublayers, layers)


def dense_plan(sites: ModelSites) -> PruningPlan:
    return PruningPlan(sites.architecture.model_type, len(sites.layers))


def made_up_table(sites: ModelSites, context: int = CONTEXT) -> SpeedTable:
    """Wider takes longer, with an overhead; no clock is read."""
    curves = {}
    for site in sites:
        shape = shape_of(sites, site, context)
        slope = site.columns_per_unit / 100
        for direction, full in (("groups", site.groups), ("units", site.group_size)):
            widths = tuple(sorted({1, max(1, full // 2), full}))
            other = site.groups * site.group_size // full
            times = tuple(0.3 + slope * width * other for width in widths)
            curves[f"{shape}, {direction}"] = SpeedCurve(widths, times, tuple(time / 10 for time in times))
    return SpeedTable("cpu", context, curves, (0.2, 0.02), (1.0, 0.1))


def costs_of(sites: ModelSites, config: PruningConfig | None = None) -> Costs:
    config = config or PruningConfig(repair=NO_REPAIR, budget_context=CONTEXT)
    return Costs.of(sites, config, made_up_table(sites, config.budget_context))


def within(**goals: float) -> PruningConfig:
    return PruningConfig(units=WIDTHS, budgets=goals, budget_context=CONTEXT, repair=NO_REPAIR)


# -- costs ------------------------------------------------------------------------------------------------------------


def sizes(model: torch.nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in model.parameters()), sum(p.numel() * p.element_size() for p in model.parameters())


def macs_per_token(model: torch.nn.Module, context: int) -> float:
    """Counted by torch, in eager attention; of its full squares half is masked."""
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(input_ids=tokens(1, context), use_cache=False)
    square = sum(site.columns for site in find_sites(model) if site.kind == "attention")
    return counter.get_total_flops() / 2 / context - 2 * square * (context - (context + 1) / 2)


@pytest.mark.parametrize("kind", KINDS)
def test_costs_are_those_of_the_model_really_cut(family: str, kind: str) -> None:
    model = tiny_model(family)
    sites = find_sites(model)
    plan = plan_of_kind(sites, kind)
    if plan is None:
        return
    repair = RepairConfig("bias")
    costs = Costs.of(sites, PruningConfig(repair=repair, budget_context=CONTEXT))
    dense = costs.macs(dense_plan(sites))
    expected = costs.parameters(plan), costs.bytes(plan), costs.macs(plan), costs.ratio(plan)
    decoder = sites.decoder_parameters
    assert dense == pytest.approx(macs_per_token(tiny_model(family), CONTEXT), rel=0.01)
    cut = apply_plan(sites, plan, random_repairs(sites, plan))
    assert sizes(model) == expected[:2]
    assert 1 - cut.decoder_parameters / decoder == pytest.approx(expected[3])
    assert macs_per_token(model, CONTEXT) == pytest.approx(expected[2], rel=0.01)
    assert expected[2] < dense


def test_mixed_dtypes_and_several_cuts_at_once(family: str) -> None:
    model = tiny_model(family)
    sites = find_sites(model)
    plan, repairs = mixed_cut(sites)
    for layer in sites.layers:
        for parameter in list(layer.parameters())[::2]:
            parameter.data = parameter.data.bfloat16()
    costs = Costs.of(sites, PruningConfig(repair=RepairConfig("bias")))
    expected = costs.parameters(plan), costs.bytes(plan)
    apply_plan(sites, plan, repairs)
    assert sizes(model) == expected


def test_sliding_windows_shorten_attention() -> None:
    full, sliding = (find_sites(tiny_model("mistral", sliding_window=window)) for window in (None, 8))
    plan = dense_plan(full)
    saved = Costs(full, CONTEXT).macs(plan) - Costs(sliding, CONTEXT).macs(plan)
    mean = sum(min(position, 8) for position in range(1, CONTEXT + 1)) / CONTEXT
    columns = sum(site.columns for site in full if site.kind == "attention")
    assert saved == pytest.approx(2 * columns * ((CONTEXT + 1) / 2 - mean))
    gemma = find_sites(tiny_model("gemma2", sliding_window=8))
    shapes = {shape_of(gemma, site, CONTEXT) for site in gemma if site.kind == "attention"}
    assert len(shapes) == 2  # every second layer slides


def test_a_cost_by_an_unknown_name() -> None:
    sites = sites_of("llama")
    with pytest.raises(ConfigError, match="no cost 'watts'"):
        costs_of(sites).cost("watts", dense_plan(sites))


# -- speeds -----------------------------------------------------------------------------------------------------------


def test_a_speed_is_the_sum_of_its_parts(family: str) -> None:
    sites = sites_of(family)
    table = made_up_table(sites)
    costs = Costs(sites, CONTEXT, table=table)
    for kind in (None, *KINDS):
        plan = dense_plan(sites) if kind is None else plan_of_kind(sites, kind)
        if plan is None:
            continue
        for which, predicted in enumerate((costs.prefill_milliseconds(plan), costs.decode_milliseconds(plan))):
            total = table.rest[which] + table.layer[which] * len(plan.kept_layers())
            for site in sites:
                if site.layer in plan.kept_layers():
                    kept = plan.sites.get(site.name, site.whole)
                    total += table.site(shape_of(sites, site, CONTEXT), kept)[which]
            assert predicted == pytest.approx(total)
        assert costs.prefill_tokens_per_second(plan) == pytest.approx(1000 * CONTEXT / costs.prefill_milliseconds(plan))
        assert costs.decode_tokens_per_second(plan) == pytest.approx(1000 / costs.decode_milliseconds(plan))
        assert costs.decode_tokens_per_second(plan) >= costs.decode_tokens_per_second(dense_plan(sites))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=6), st.data())
def test_a_curve_is_linear_between_its_widths(times: list[float], data: st.DataObject) -> None:
    widths = tuple(4 * number + 3 for number in range(len(times)))
    curve = SpeedCurve(widths, tuple(sorted(times)), tuple(times))
    for width, time in zip(widths, times, strict=True):
        assert curve.at(width)[1] == pytest.approx(time)
    left = data.draw(st.integers(0, len(times) - 2))
    middle = curve.at(widths[left] + 2)[1]
    assert middle == pytest.approx((times[left] + times[left + 1]) / 2)
    found = [curve.at(width)[0] for width in range(widths[-1] + 2)]
    assert all(a <= b for a, b in pairwise(found))
    assert curve.at(0) == (0.0, 0.0)


def test_tables_go_through_json() -> None:
    sites = sites_of("mixtral")
    table = made_up_table(sites)
    assert SpeedTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    with pytest.raises(ConfigError, match="not a speed table"):
        SpeedTable.from_dict({"device": "cpu"})
    with pytest.raises(ConfigError, match="should ascend"):
        SpeedCurve((4, 2), (1.0, 2.0), (1.0, 2.0))
    with pytest.raises(ConfigError, match="is of another model"):
        Costs(sites_of("llama"), CONTEXT, table=table).decode_milliseconds(dense_plan(sites_of("llama")))
    with pytest.raises(ConfigError, match="32 tokens of context"):
        Costs(sites, 64, table=table)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_can_be_timed_and_stays_as_it_is(name: str) -> None:
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    sites = find_sites(model)
    table = measure_speed_table(sites, 8, widths=2, repeats=1)
    assert SpeedTable.from_dict(table.to_dict()) == table
    assert min(*table.rest, *table.layer) >= 0 and table.rest[1] > 0
    for site in sites:
        curve = table.curves[f"{shape_of(sites, site, 8)}, units"]
        assert curve.widths[-1] == site.group_size and min(curve.prefill + curve.decode) >= 0
    assert Costs(sites, 8, table=table).decode_tokens_per_second(dense_plan(sites)) > 0
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)


def test_what_cannot_be_timed_is_said() -> None:
    with pytest.raises(ConfigError, match="lower `budget_context`"):
        measure_speed_table(sites_of("llama"), 128)
    with torch.device("meta"):
        bare = find_sites(tiny_model("llama"))
    with pytest.raises(UnsupportedModelError, match="speeds are measured"):
        check_budgets(bare, within(decode_tokens_per_second=1.0), Costs(bare, CONTEXT))
    broken = tiny_model("llama")
    broken.model.forward = None
    with pytest.raises(UnsupportedModelError, match="cannot be timed alone"):
        measure_speed_table(find_sites(broken), 8, widths=1, repeats=1)


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_without_budgets_it_is_plain_allocation(name: str) -> None:
    sites = sites_of(name)
    scores = random_scores(sites, WIDTHS)
    config = PruningConfig(0.25, units=WIDTHS, repair=NO_REPAIR)
    assert allocate_within(sites, scores, config, costs_of(sites)) == allocate(sites, scores, config)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "qwen3_moe", "gpt2"])
@settings(deadline=None, max_examples=6)
@given(data=st.data())
def test_budgets_hold_together(name: str, method: str, data: st.DataObject) -> None:
    sites = sites_of(name)
    repair = data.draw(st.sampled_from(["none", "bias"]))
    plain = PruningConfig(
        units=WIDTHS, allocation=AllocationConfig(method), repair=RepairConfig(repair), budget_context=CONTEXT
    )
    costs = costs_of(sites, plain)
    scores = random_scores(sites, WIDTHS, data.draw(st.integers(0, 10**6)))
    goals = {}
    kinds = ("ratio", "parameters", "bytes", "macs", "prefill_tokens_per_second", "decode_tokens_per_second")
    for kind in data.draw(st.sets(st.sampled_from(kinds), min_size=1)):
        # What some plan costs is a budget that can be met.
        ratio = data.draw(st.floats(0.02, 0.3))
        plan = allocate(sites, scores, plain.with_changes(pruning_ratio=ratio), COSINE)
        goals[kind] = costs.cost(kind, plan)
    config = plain.with_changes(budgets=goals)
    check_budgets(sites, config, costs)
    found = allocate_within(sites, scores, config, costs, COSINE)
    sites.check(found)
    assert missed_budgets(costs, goals, found) == []
    assert costs.ratio(found) < 0.6


def test_the_smallest_ratio_is_found_in_few_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = find_sites(tiny_model("llama", intermediate_size=512))
    costs = costs_of(sites)
    scores = random_scores(sites, ("channel",))
    tried: list[float] = []

    def recorded(*args: object, **options: object) -> PruningPlan:
        tried.append(args[2].pruning_ratio)
        return allocate(*args, **options)

    monkeypatch.setattr(budgets_room, "allocate", recorded)
    for kind in ("macs", "prefill_tokens_per_second", "decode_tokens_per_second"):
        for ratio in (0.1, 0.35, 0.7):
            reference = allocate(sites, scores, PruningConfig(ratio, units=("channel",), repair=NO_REPAIR))
            tried.clear()
            config = PruningConfig(
                units=("channel",), repair=NO_REPAIR, budget_context=CONTEXT,
                budgets={kind: costs.cost(kind, reference)},
            )  # fmt: skip
            found = allocate_within(sites, scores, config, costs)
            assert len(tried) <= 3 + 8  # one at the dense end, two at the other
            assert costs.ratio(found) <= costs.ratio(reference) + 2e-3
            lower = PruningConfig(costs.ratio(found) - 2e-3, units=("channel",), repair=NO_REPAIR)
            below = allocate(sites, scores, lower)
            assert missed_budgets(costs, config.budgets, below) == [kind]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from(["macs", "bytes", "decode_tokens_per_second"]), st.data())
def test_a_tighter_budget_never_keeps_more(seed: int, kind: str, data: st.DataObject) -> None:
    sites = sites_of("llama")
    costs = costs_of(sites)
    scores = random_scores(sites, ("channel",), seed)
    plans = [
        allocate(sites, scores, PruningConfig(ratio, units=("channel",), repair=NO_REPAIR))
        for ratio in sorted(data.draw(st.lists(st.floats(0.05, 0.45), min_size=2, max_size=2)))
    ]
    loose, tight = (
        allocate_within(
            sites, scores,
            PruningConfig(
                units=("channel",), repair=NO_REPAIR, budget_context=CONTEXT, budgets={kind: costs.cost(kind, plan)}
            ), costs,
        )
        for plan in plans
    )  # fmt: skip
    # A narrow bracket is not narrowed further, so the two may overlap by its width.
    assert costs.removed(loose) <= costs.removed(tight) + max(100, sites.decoder_parameters // 500)


@pytest.mark.parametrize(
    ("goals", "names"),
    [
        ({"macs": 10.0}, ["macs"]),
        ({"bytes": 100.0, "ratio": 0.1}, ["bytes"]),
        ({"parameters": 10.0, "decode_tokens_per_second": 1e9}, ["parameters", "decode_tokens_per_second"]),
        ({"ratio": 0.99}, ["ratio"]),
        ({"ratio": 1.5}, ["ratio"]),
        ({"prefill_tokens_per_second": 1e9}, ["prefill_tokens_per_second"]),
    ],
)
def test_budgets_out_of_reach_state_the_range(goals: dict[str, float], names: list[str]) -> None:
    sites = sites_of("llama")
    config, costs = within(**goals), costs_of(sites)
    with pytest.raises(BudgetError, match="plans reach") as error:
        check_budgets(sites, config, costs)
    assert [name for name in goals if f"`{name}` should be" in str(error.value)] == names
    with pytest.raises(BudgetError, match="plans reach"):
        allocate_within(sites, random_scores(sites, WIDTHS), config, costs)


def test_the_stated_range_can_be_reached() -> None:
    sites = sites_of("llama")
    costs = costs_of(sites)
    config = within(macs=1.0)
    scores = even_scores(sites, config)
    _, smallest = budgets_room._smallest(sites, scores, config, None, None)
    with pytest.raises(BudgetError, match=f"{costs.macs(smallest):,.0f} to {costs.macs(dense_plan(sites)):,.0f}"):
        check_budgets(sites, config, costs)
    edge = within(macs=costs.macs(smallest))
    check_budgets(sites, edge, costs)
    assert missed_budgets(costs, edge.budgets, allocate_within(sites, scores, edge, costs)) == []


def test_budgets_fail_before_any_text_is_read() -> None:
    """No tokenizer is there, so any reading of text would fail in another way."""
    model = tiny_model("llama")
    config = PruningConfig(budgets={"macs": 10.0}, budget_context=CONTEXT)
    with pytest.raises(BudgetError, match="`macs` should be at most 10"):
        prune(model, None, config)


def test_a_run_keeps_to_its_budgets() -> None:
    model = tiny_model("llama")
    costs = Costs(find_sites(model), CONTEXT)
    goals = {
        "macs": 0.8 * costs.macs(dense_plan(costs.sites)),
        "ratio": 0.1,
        "parameters": 0.9 * costs.sites.total_parameters,
    }
    result = prune(model, None, PruningConfig.recipe("magnitude", budgets=goals, budget_context=CONTEXT, uniform=False))
    sites = find_sites(model)
    after = Costs(sites, CONTEXT)
    assert after.macs(dense_plan(sites)) <= goals["macs"] and result.pruning_ratio >= 0.1
    assert after.parameters(dense_plan(sites)) == result.after.total <= goals["parameters"]


def test_rounds_share_what_budgets_come_to() -> None:
    sites = sites_of("llama")
    costs = costs_of(sites)
    goal = 0.75 * costs.macs(dense_plan(sites))
    config = PruningConfig.recipe(
        "random", units=WIDTHS, budgets={"macs": goal}, budget_context=CONTEXT, allocation={"steps": 3}
    )
    plan, _ = decide(sites, None, config, costs=costs)
    assert costs.macs(plan) <= goal
    even = even_plan(sites, config, costs)
    assert abs(costs.ratio(even) - costs.ratio(plan)) < 0.1


# -- nested plans -----------------------------------------------------------------------------------------------------


def assert_nested(first: PruningPlan, then: PruningPlan) -> None:
    assert set(first.dropped_layers) <= set(then.dropped_layers)
    for name, kept in first.changed():
        layer = int(name.split(".")[1])
        assert layer in then.dropped_layers or set(then.sites[name].kept) <= set(kept.kept)


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["llama", "mixtral", "qwen3_moe", "gpt2"]), st.sampled_from(METHODS), st.booleans(),
    st.integers(0, 10**6), st.lists(st.floats(0.0, 0.4), min_size=2, max_size=4, unique=True),
)  # fmt: skip
def test_nested_plans_nest(name: str, method: str, whole: bool, seed: int, ratios: list[float]) -> None:
    sites = sites_of(name)
    units = (*WIDTHS, "layer", "mlp") if whole and method == "global" else WIDTHS
    config = PruningConfig(units=units, allocation=AllocationConfig(method), repair=NO_REPAIR)
    costs = costs_of(sites)
    plans = nested_plans(sites, random_scores(sites, units, seed), config, ratios, costs, COSINE)
    assert list(plans) == sorted(ratios)
    for ratio, plan in plans.items():
        sites.check(plan)
        assert costs.ratio(plan) >= ratio - 1e-6
    for first, then in pairwise(plans.values()):
        assert_nested(first, then)


def test_nested_plans_keep_to_the_budgets_beside() -> None:
    sites = sites_of("llama")
    costs = costs_of(sites)
    goal = 0.85 * costs.macs(dense_plan(sites))
    plans = nested_plans(sites, random_scores(sites, WIDTHS), within(macs=goal), (0.05, 0.3), costs)
    assert costs.macs(plans[0.05]) <= goal and costs.ratio(plans[0.3]) >= 0.3 - 1e-9
    assert_nested(plans[0.05], plans[0.3])


def test_both_directions_of_a_cut_multiply() -> None:
    sites = sites_of("llama")
    site = sites.by_name["layers.0.attention"]
    table = made_up_table(sites)
    shape = shape_of(sites, site, CONTEXT)
    groups, units = (SitePlan(2, 2, kept) for kept in ((0, 1), (0, 2)))
    both = table.site(shape, SitePlan(2, 2, (0,)))[0]
    full = table.site(shape, site.whole)[0]
    assert both == pytest.approx(table.site(shape, groups)[0] * table.site(shape, units)[0] / full)
