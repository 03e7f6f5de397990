"""Laws of surgery: a cut model generates, trains, copies and is cut again like any other."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from conftest import FAMILIES, MIXTURES, logits_of, tiny_model, tokens
from plans import KINDS, generated, keep_groups, keep_nothing, mixed_cut, plan_of_kind, random_repairs

from hf_adaprune.layers import SkippedAttention, SkippedMlp
from hf_adaprune.masking import masked
from hf_adaprune.plan import PruningPlan, SitePlan
from hf_adaprune.sites import ModelSites, find_sites
from hf_adaprune.surgery import apply_plan


def plan_or_skip(sites: ModelSites, kind: str, **options: object) -> PruningPlan:
    plan = plan_of_kind(sites, kind, **options)  # type: ignore[arg-type]
    if plan is None:
        pytest.skip(f"no {kind} to remove")
    return plan


@pytest.mark.parametrize("kind", KINDS)
def test_generation_agrees_with_and_without_cache(sites: ModelSites, kind: str) -> None:
    apply_plan(sites, plan_or_skip(sites, kind))
    model = sites.model
    reference = generated(model, use_cache=False)
    assert reference.shape == (2, 9)
    assert torch.equal(generated(model, use_cache=True), reference)
    assert torch.equal(generated(model, cache_implementation="static"), reference)


@pytest.mark.parametrize("kind", ["attention", "kv_group"])
def test_generation_agrees_with_an_early_static_cache(sites: ModelSites, kind: str) -> None:
    apply_plan(sites, plan_or_skip(sites, kind))
    reference = generated(sites.model, use_cache=False)
    chunked = generated(sites.model, cache_implementation="static", prefill_chunk_size=3)
    assert torch.equal(chunked, reference)


@pytest.mark.parametrize("kind", ["attention", "layer"])
def test_beams_agree_with_and_without_cache(sites: ModelSites, kind: str) -> None:
    apply_plan(sites, plan_or_skip(sites, kind))
    assert torch.equal(generated(sites.model, num_beams=2), generated(sites.model, num_beams=2, use_cache=False))


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_gradient_checkpointing(sites: ModelSites, kind: str) -> None:
    apply_plan(sites, plan_or_skip(sites, kind))
    model, ids = sites.model.train(), tokens()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attention_dropout", "dropout"):
        for module in model.modules():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.activation_checkpointing_enable()
    checkpointed = gradients()
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
        assert gradient.shape == model.get_parameter(name).shape
    layers = find_sites(model).layers
    assert all(any(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters()) for layer in layers)


@pytest.mark.parametrize("kind", ["channel", "kv_group", "expert", "expert_channel"])
def test_a_cut_between_two_training_steps(sites: ModelSites, kind: str) -> None:
    plan = plan_or_skip(sites, kind)
    model, ids = sites.model, tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    apply_plan(sites, plan)  # gradients of the old shapes are still there
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_keep_their_identity(sites: ModelSites, kind: str) -> None:
    model = sites.model
    before = {id(parameter) for parameter in model.parameters()}
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    apply_plan(sites, plan_or_skip(sites, kind))
    assert {id(parameter) for parameter in model.parameters()} <= before
    assert all(parameter.is_contiguous() and parameter.requires_grad for parameter in model.parameters())
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied


def test_tied_embeddings_stay_tied() -> None:
    sites = find_sites(tiny_model("llama"))
    model = sites.model
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    apply_plan(sites, mixed_cut(sites)[0])
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_device_gives_the_shapes_of_the_real_cut(family: str, sites: ModelSites, kind: str) -> None:
    plan = plan_or_skip(sites, kind)
    with torch.device("meta"):
        meta = type(sites.model)(copy.deepcopy(sites.model.config))
    apply_plan(sites, plan)
    apply_plan(find_sites(meta), plan)
    shapes = {name: parameter.shape for name, parameter in sites.model.named_parameters()}
    assert {name: parameter.shape for name, parameter in meta.named_parameters()} == shapes
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert meta.config.to_dict() == sites.model.config.to_dict()


@pytest.mark.parametrize(("first", "second"), [(kind, KINDS[number - 2]) for number, kind in enumerate(KINDS)])
def test_a_pruned_model_is_pruned_further(sites: ModelSites, first: str, second: str) -> None:
    cut = apply_plan(sites, plan_or_skip(sites, first))
    plan = plan_of_kind(cut, second, seed=2)
    if plan is None:
        pytest.skip(f"no {second} left")
    ids = tokens()
    with masked(cut, plan):
        expected = logits_of(cut.model, ids)
    removed, before = cut.removed_parameters(plan), cut.total_parameters
    again = apply_plan(cut, plan)
    assert (logits_of(again.model, ids) - expected).abs().max() < 1e-5
    assert before - again.total_parameters == removed


def test_a_model_with_skipped_sublayers_and_added_biases_is_pruned_further(sites: ModelSites, family: str) -> None:
    plan, repairs = mixed_cut(sites)
    cut = apply_plan(sites, plan, repairs)
    kinds = [type(module) for module in cut.model.modules()]
    assert kinds.count(SkippedAttention) == kinds.count(SkippedMlp) == 1
    site = next(site for site in cut if site.kind in ("mlp", "experts"))
    if site.kind == "mlp":
        assert site.reader.bias is not None
        kept = SitePlan(1, site.columns, tuple(range(5, site.columns)))
    else:
        kept = keep_groups(site, (0, 2, 3))
    ids = tokens()
    # widths first, then the layer in between: what was skipped or biased has to move along
    for cuts, dropped in (({site.name: kept}, ()), ({}, (1,))):
        plan = PruningPlan(family, len(cut.layers), cuts, dropped)
        repairs = random_repairs(cut, plan)
        with masked(cut, plan, repairs):
            expected = logits_of(cut.model, ids)
        cut = apply_plan(cut, plan, repairs)
        assert (logits_of(cut.model, ids) - expected).abs().max() < 1e-5
        assert torch.equal(generated(cut.model, use_cache=True), generated(cut.model, use_cache=False))
    assert len(cut.layers) == 2
    skipped = [module.layer_idx for module in cut.model.modules() if isinstance(module, SkippedAttention)]
    assert skipped == [0]


def test_a_bias_goes_with_the_sublayer_it_was_added_to() -> None:
    sites = find_sites(tiny_model("llama"))
    plan = plan_of_kind(sites, "channel")
    assert plan is not None
    cut = apply_plan(sites, plan, random_repairs(sites, plan))
    assert set(cut.model.config.adaprune["added_biases"]) == {"0", "1", "2"}
    gone = PruningPlan("llama", 3, {"layers.1.mlp": keep_nothing(cut.by_name["layers.1.mlp"])})
    cut = apply_plan(cut, gone)
    assert cut.model.config.adaprune["added_biases"] == {"0": ["mlp.down_proj"], "2": ["mlp.down_proj"]}
    cut = apply_plan(cut, PruningPlan("llama", 3, {}, (0,)))
    assert cut.model.config.adaprune["added_biases"] == {"1": ["mlp.down_proj"]}


@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_and_pickle_compute_the_same(sites: ModelSites, kind: str) -> None:
    apply_plan(sites, plan_or_skip(sites, kind))
    ids = tokens()
    expected = logits_of(sites.model, ids)
    before = sites.model.config._attn_implementation
    for clone in (copy.deepcopy(sites.model), pickle.load(io.BytesIO(pickle.dumps(sites.model)))):
        assert torch.equal(logits_of(clone, ids), expected)
        assert clone.config.to_dict() == sites.model.config.to_dict()
        assert torch.equal(generated(clone), generated(sites.model))
        clone.set_attn_implementation("eager")  # of the copy alone
        assert sites.model.config._attn_implementation == before
        layer = find_sites(clone).layers[1]
        configs = [module.config for module in layer.modules() if hasattr(module, "config")]
        assert all(config._attn_implementation == "eager" for config in configs)


@pytest.mark.parametrize("kind", ["channel", "kv_group", "attention", "layer", "expert"])
def test_the_attention_implementation_reaches_the_layers(sites: ModelSites, kind: str) -> None:
    apply_plan(sites, plan_or_skip(sites, kind))
    model, ids = sites.model, tokens()
    expected = logits_of(model, ids)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=False, output_attentions=True)
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-4)
    heads = [site.groups * site.group_size for site in find_sites(model) if site.kind == "attention"]
    seen = [weights.shape[1] for weights in output.attentions if weights is not None]
    assert seen == heads


def test_heads_that_do_not_divide_the_hidden_size_in_all_layers() -> None:
    sites = find_sites(tiny_model("llama", num_attention_heads=4, num_key_value_heads=4))
    cuts = {site.name: keep_groups(site, (0, 2, 3)) for site in sites if site.kind == "attention"}
    plan = PruningPlan("llama", 3, cuts)
    ids = tokens()
    with masked(sites, plan):
        expected = logits_of(sites.model, ids)
    apply_plan(sites, plan)
    assert (logits_of(sites.model, ids) - expected).abs().max() < 1e-5
    assert sites.model.config.is_heterogeneous


@pytest.mark.parametrize("mixture", MIXTURES)
def test_the_router_loss_follows_a_uniform_cut_of_experts(mixture: str) -> None:
    sites = find_sites(tiny_model(mixture))
    plan = plan_of_kind(sites, "expert", uniform=True)
    assert plan is not None
    cuts = {name: keep_groups(sites.by_name[name], (0, 1, 2)) for name in plan.sites}
    apply_plan(sites, PruningPlan(mixture, 3, cuts))
    ids = tokens()
    live = sites.model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
    fresh = type(sites.model)(sites.model.config).eval()
    fresh.load_state_dict(sites.model.state_dict())
    loaded = fresh(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
    assert torch.equal(live.aux_loss, loaded.aux_loss)


@pytest.mark.parametrize("family_name", sorted(FAMILIES))
def test_no_warning_comes_from_a_cut(family_name: str) -> None:
    sites = find_sites(tiny_model(family_name))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan, repairs = mixed_cut(sites)
        apply_plan(sites, plan, repairs)
        logits_of(sites.model, tokens())


def test_a_cut_model_is_not_called_by_the_name_of_the_dense_one() -> None:
    model = tiny_model("llama")
    model.name_or_path = model.config.name_or_path = "big/dense"
    sites = find_sites(model)
    apply_plan(sites, PruningPlan("llama", len(sites.layers), {sites.sites[0].name: sites.sites[0].whole}))
    assert model.name_or_path == "big/dense"  # which loads it still
    whole, dropped = find_sites(tiny_model("llama")), tiny_model("llama")
    dropped.name_or_path = "big/dense"
    apply_plan(find_sites(dropped), PruningPlan("llama", len(whole.layers), {}, (0,)))
    assert dropped.name_or_path == ""
    found = plan_of_kind(whole, "channel")
    assert found is not None
    apply_plan(find_sites(model), found)
    assert model.name_or_path == "" and model.config.name_or_path == "big/dense"


@pytest.mark.parametrize("kind", ["channel", "kv_group"])
def test_backward_goes_on_while_the_graph_of_an_earlier_step_is_alive(sites: ModelSites, kind: str) -> None:
    model, ids = sites.model.train(), tokens()
    earlier = model(input_ids=ids, labels=ids).loss  # holds on to its graph, as a compiled frame or a log may
    apply_plan(sites, plan_or_skip(sites, kind))
    model(input_ids=ids, labels=ids).loss.backward()
    assert earlier.grad_fn is not None
    assert all(own.grad is None or own.grad.shape == own.shape for own in model.parameters())
    assert any(own.grad is not None for own in model.parameters())
