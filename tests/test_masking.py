"""Laws of masking: masked equals cut, keep-all is identity, the model is untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import MIXTURES, logits_of, tiny_model, tokens
from plans import KINDS, mixed_cut, plan_of_kind, random_repairs, whole_plan
from torch import nn
from transformers import PreTrainedModel

from hf_adaprune.masking import masked
from hf_adaprune.plan import PruningPlan
from hf_adaprune.sites import ModelSites, find_sites
from hf_adaprune.surgery import apply_plan


def traces(model: PreTrainedModel) -> dict[str, object]:
    """Everything that a mask may leave behind."""
    found: dict[str, object] = {"implementation": model.config._experts_implementation}
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks) or "forward" in module.__dict__:
            found[name] = module
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_masked_equals_cut(sites: ModelSites, kind: str) -> None:
    plan = plan_of_kind(sites, kind)
    if plan is None:
        pytest.skip(f"no {kind} to remove")
    ids = tokens()
    dense = logits_of(sites.model, ids)
    with masked(sites, plan):
        mask = logits_of(sites.model, ids)
    apply_plan(sites, plan)
    cut = logits_of(sites.model, ids)
    assert (mask - cut).abs().max() < 1e-5
    assert (dense - cut).abs().max() > 1e-2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["channel", "kv_group", "query_head", "expert", "expert_channel"])
def test_masked_equals_cut_with_repairs(sites: ModelSites, kind: str, bias: bool) -> None:
    plan = plan_of_kind(sites, kind)
    if plan is None or (bias and kind.startswith("expert")):
        pytest.skip(f"no {kind} to repair")
    repairs = random_repairs(sites, plan, bias)
    ids = tokens()
    with masked(sites, plan):
        unrepaired = logits_of(sites.model, ids)
    with masked(sites, plan, repairs):
        mask = logits_of(sites.model, ids)
    cut_sites = apply_plan(sites, plan, repairs)
    cut = logits_of(sites.model, ids)
    assert (mask - cut).abs().max() < 1e-5
    assert (unrepaired - cut).abs().max() > 1e-2
    for name, repair in repairs.items():
        reader = cut_sites.by_name[name].reader
        assert torch.equal(reader.weight, repair.weight)
        assert repair.bias is None or torch.equal(reader.bias, repair.bias)


def test_all_kinds_at_once(sites: ModelSites) -> None:
    cuts = {}
    for kind in ("query_head", "channel", "expert_channel"):
        plan = plan_of_kind(sites, kind)
        cuts |= {} if plan is None else plan.sites
    name = next(site.name for site in sites if site.layer == 0 and site.kind == "attention")
    cuts[name] = type(cuts[next(iter(cuts))])(sites.by_name[name].groups, sites.by_name[name].group_size, ())
    plan = PruningPlan(sites.architecture.model_type, len(sites.layers), cuts, (1,))
    repairs = random_repairs(sites, PruningPlan(plan.model_type, plan.num_layers, cuts))
    ids = tokens()
    with masked(sites, plan, repairs):
        mask = logits_of(sites.model, ids)
    apply_plan(sites, plan, repairs)
    assert (mask - logits_of(sites.model, ids)).abs().max() < 1e-5


def test_keep_all_is_identity(sites: ModelSites) -> None:
    ids = tokens()
    dense = logits_of(sites.model, ids)
    parameters = sites.total_parameters
    for plan in (whole_plan(sites), PruningPlan(sites.architecture.model_type, len(sites.layers))):
        with masked(sites, plan):
            assert torch.equal(logits_of(sites.model, ids), dense)
    for plan in (whole_plan(sites), PruningPlan(sites.architecture.model_type, len(sites.layers))):
        sites = apply_plan(sites, plan)
        assert torch.equal(logits_of(sites.model, ids), dense)
        assert sites.total_parameters == parameters
        assert not sites.model.config.is_heterogeneous


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_untouched_and_hooks_are_gone(sites: ModelSites, fails: bool) -> None:
    model, ids = sites.model, tokens()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = logits_of(model, ids)
    before = traces(model)
    assert len(before) == 1
    for kind in KINDS:
        plan = plan_of_kind(sites, kind)
        if plan is None:
            continue
        try:
            with masked(sites, plan, random_repairs(sites, plan)):
                assert len(traces(model)) > 1 or model.config._experts_implementation != before["implementation"]
                logits_of(model, ids)
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
        assert traces(model) == before
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in state.items())
    assert torch.equal(logits_of(model, ids), dense)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_an_exception_inside_the_router_closes_nothing_for_good(mixture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = find_sites(tiny_model(mixture))
    plan = plan_of_kind(sites, "expert")
    assert plan is not None
    router = next(site.router.module for site in sites if site.router is not None)
    dense = logits_of(sites.model, tokens())

    def failing(*args: object) -> None:
        raise RuntimeError("router")

    with monkeypatch.context() as patch:
        patch.setattr(type(router), "forward", failing)
        with pytest.raises(RuntimeError, match="router"), masked(sites, plan):
            logits_of(sites.model, tokens())
    assert torch.equal(logits_of(sites.model, tokens()), dense)


def test_a_refused_plan_leaves_no_hooks(sites: ModelSites) -> None:
    other = PruningPlan("another", len(sites.layers))
    before = traces(sites.model)
    with pytest.raises(ValueError, match="another"), masked(sites, other):
        pass
    assert traces(sites.model) == before


def test_masks_nest() -> None:
    sites = find_sites(tiny_model("llama"))
    channels, heads = plan_of_kind(sites, "channel"), plan_of_kind(sites, "kv_group")
    assert channels is not None and heads is not None
    both = PruningPlan("llama", len(sites.layers), {**channels.sites, **heads.sites})
    ids = tokens()
    with masked(sites, both):
        expected = logits_of(sites.model, ids)
    with masked(sites, channels), masked(sites, heads):
        assert torch.equal(logits_of(sites.model, ids), expected)


def test_a_forward_that_others_put_there_survives() -> None:
    sites = find_sites(tiny_model("llama"))
    plan = plan_of_kind(sites, "channel")
    assert plan is not None
    reader: nn.Module = sites.by_name["layers.0.mlp"].reader.module
    theirs = reader.forward
    reader.forward = theirs
    with masked(sites, plan, random_repairs(sites, plan)):
        assert reader.forward is not theirs
    assert reader.__dict__["forward"] is theirs


@pytest.mark.parametrize("with_repairs", [False, True])
def test_narrow_equals_wide_equals_cut(sites: ModelSites, with_repairs: bool) -> None:
    ids = tokens()
    before, dense = traces(sites.model), logits_of(sites.model, ids)
    narrowed = 0
    for plan, repairs in narrow_cases(sites):
        repairs = repairs if with_repairs else {}
        with masked(sites, plan, repairs):
            wide = logits_of(sites.model, ids)
        with masked(sites, plan, repairs, narrow=True):
            widths = inner_widths(sites, plan, ids)
            narrow = logits_of(sites.model, ids)
        assert traces(sites.model) == before
        for name, width in widths.items():
            plain = all(type(m.module) is nn.Linear for m in (sites.by_name[name].reader, *sites.by_name[name].writers))
            assert width == (len(plan.sites[name].kept) if plain else sites.by_name[name].columns)
            narrowed += plain
        other = find_sites(copy.deepcopy(sites.model))
        apply_plan(other, plan, repairs)
        assert (narrow - wide).abs().max() < 1e-5
        assert (narrow - logits_of(other.model, ids)).abs().max() < 1e-5
        assert (narrow - dense).abs().max() > 1e-2
    assert torch.equal(logits_of(sites.model, ids), dense)
    assert narrowed or not any(type(site.reader.module) is nn.Linear and site.kind == "mlp" for site in sites)


def narrow_cases(sites: ModelSites) -> list[tuple[PruningPlan, dict]]:
    """Channels alone (repairs with a bias), and channels beside removed sublayers."""
    channels = plan_of_kind(sites, "channel")
    cases = [mixed_cut(sites)]
    return cases if channels is None else [(channels, random_repairs(sites, channels)), *cases]


def inner_widths(sites: ModelSites, plan: PruningPlan, ids: torch.Tensor) -> dict[str, int]:
    """How wide the inputs of the readers of narrowed MLPs are."""
    found: dict[str, int] = {}
    hooks = []
    for name, kept in plan.changed():
        site = sites.by_name[name]
        if site.kind == "mlp" and not kept.is_empty:
            hooks.append(
                site.reader.module.register_forward_pre_hook(
                    lambda _, args, name=name: found.update({name: args[0].shape[-1]})
                )
            )
    logits_of(sites.model, ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_neox"], indirect=True)
def test_nothing_narrow_is_left_behind_after_an_exception(sites: ModelSites) -> None:
    model, ids = sites.model, tokens()
    before, dense = traces(model), logits_of(model, ids)
    plan, repairs = mixed_cut(sites)
    for given in ({}, repairs):
        with pytest.raises(KeyboardInterrupt), masked(sites, plan, given, narrow=True):
            assert len(traces(model)) > len(before)
            logits_of(model, ids)
            raise KeyboardInterrupt
        assert traces(model) == before
    site = next(site for site in sites if site.kind == "mlp" and site.name in repairs)
    broken = {**repairs, site.name: "no repair"}  # an exception on the way in
    with pytest.raises(AttributeError), masked(sites, plan, broken, narrow=True):
        pass
    assert traces(model) == before
    assert torch.equal(logits_of(model, ids), dense)


@pytest.mark.parametrize("with_repairs", [False, True])
def test_modules_with_a_forward_of_their_own_are_not_narrowed(with_repairs: bool) -> None:
    """As accelerate makes them, to move weights around the forward."""
    sites = find_sites(tiny_model("llama"))
    plan = plan_of_kind(sites, "channel")
    assert plan is not None
    repairs = random_repairs(sites, plan) if with_repairs else {}
    ids = tokens()
    with masked(sites, plan, repairs):
        expected = logits_of(sites.model, ids)
    writer = sites.by_name["layers.1.mlp"].writers[0].module
    plain, calls = writer.forward, []

    def theirs(hidden: torch.Tensor) -> torch.Tensor:
        calls.append(hidden.shape)
        return plain(hidden)

    writer.forward = theirs
    with masked(sites, plan, repairs, narrow=True):
        assert writer.forward is theirs
        assert inner_widths(sites, plan, ids)["layers.1.mlp"] == 48
        torch.testing.assert_close(logits_of(sites.model, ids), expected, rtol=1e-5, atol=1e-5)
    assert len(calls) == 2 and writer.__dict__["forward"] is theirs


def test_gradients_flow_through_a_mask(sites: ModelSites) -> None:
    plan = plan_of_kind(sites, "channel") or plan_of_kind(sites, "expert_channel")
    assert plan is not None
    ids = tokens()
    with masked(sites, plan):
        sites.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    name, kept = next(plan.changed())
    site = sites.by_name[name]
    gradient = site.reader.parameter.grad
    assert gradient is not None
    columns = (gradient.T if site.reader.transposed else gradient).abs().sum(-2).flatten()
    removed = torch.ones(site.columns, dtype=torch.bool)
    removed[site.column_index(kept)] = False
    assert float(columns[removed].sum()) == 0
    assert float(columns[~removed].sum()) > 0
