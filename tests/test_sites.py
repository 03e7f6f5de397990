"""Laws of a model's sites: what a plan removes, and what is refused."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from conftest import HEADLESS, MIXTURES, TOKEN_IDS, VOCABULARY, parameters_of, tiny_model
from plans import KINDS, keep_groups, plan_of_kind
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_adaprune.architectures import ARCHITECTURES
from hf_adaprune.compensation import Repair
from hf_adaprune.errors import PlanError, UnsupportedModelError
from hf_adaprune.plan import PruningPlan, SitePlan
from hf_adaprune.sites import ModelSites, find_sites
from hf_adaprune.surgery import apply_plan

BIASED = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"attention_bias": True},
    "qwen3_moe": {"attention_bias": True},
    "smollm3": {"attention_bias": True, "mlp_bias": True},
    "gemma2": {"attention_bias": True},
    "opt": {"enable_bias": False},
}


def check_counts(model: PreTrainedModel, kind: str) -> None:
    sites = find_sites(model)
    plan = plan_of_kind(sites, kind)
    if plan is None:
        pytest.skip(f"no {kind} to remove")
    before, decoder = parameters_of(model), sites.decoder_parameters
    assert sites.total_parameters == before
    removed = sites.removed_parameters(plan)
    cut = apply_plan(sites, plan)
    assert removed == before - parameters_of(model) > 0
    assert decoder - cut.decoder_parameters == removed


@pytest.mark.parametrize("kind", KINDS)
def test_removed_parameters_are_counted(model: PreTrainedModel, kind: str) -> None:
    check_counts(model, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("biased", sorted(BIASED))
def test_removed_parameters_are_counted_with_other_biases(biased: str, kind: str) -> None:
    check_counts(tiny_model(biased, **BIASED[biased]), kind)


def test_added_biases_count_as_kept(sites: ModelSites) -> None:
    plan = plan_of_kind(sites, "channel")
    if plan is None:
        pytest.skip("no channels")
    repairs, added = {}, []
    for name, kept in plan.changed():
        site = sites.by_name[name]
        repairs[name] = Repair(torch.zeros(site.outputs, len(kept.kept)), torch.zeros(site.outputs))
        if site.reader.bias is None:
            added.append(name)
    before, removed = parameters_of(sites.model), sites.removed_parameters(plan, added)
    apply_plan(sites, plan, repairs)
    assert before - parameters_of(sites.model) == removed


# -- refusals of models -----------------------------------------------------------------------------------------------


def test_an_encoder_is_refused() -> None:
    small = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(**small, intermediate_size=8))
    with pytest.raises(UnsupportedModelError, match="BertForMaskedLM is no causal language model"):
        find_sites(model)


def test_an_encoder_decoder_is_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_sites(model)


def test_a_decoder_without_its_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"LlamaModel is no causal.*AutoModelForCausalLM"):
        find_sites(tiny_model("llama").model)


@pytest.mark.parametrize("flag", ["is_quantized", "hf_quantizer"])
def test_quantised_weights_are_refused(flag: str) -> None:
    model = tiny_model("llama")
    setattr(model, flag, True if flag == "is_quantized" else SimpleNamespace())
    with pytest.raises(UnsupportedModelError, match=r"quantised weights. Prune first"):
        find_sites(model)


class Wrapper(torch.Tensor):
    """A tensor that stands for another and can be detached, as those of torchao and FSDP."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict, *_: object) -> Wrapper:
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function: object, types: object, args: tuple = (), kwargs: object = None) -> Wrapper:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(function)


@pytest.mark.parametrize(
    ("name", "told"),
    [("Int8Tensor", "Prune first and quantise the result"), ("DTensor", "Prune the whole model first")],
)
@pytest.mark.parametrize("place", ["model.layers.1.mlp.down_proj", "model.embed_tokens"])
def test_weights_that_stand_for_others_are_refused(name: str, told: str, place: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    owner = model.get_submodule(place)
    owner.weight = nn.Parameter(type(name, (Wrapper,), {})(owner.weight.detach()))
    with pytest.raises(UnsupportedModelError, match=f"{place}.weight is .*{name}.*{told}"):
        find_sites(model)


def test_an_unknown_family_is_told_the_known_ones() -> None:
    config = AutoConfig.for_model("bloom", vocab_size=20, hidden_size=8, n_layer=1, n_head=2, **TOKEN_IDS)
    with pytest.raises(UnsupportedModelError, match=r"'bloom'. Known: ") as refusal:
        find_sites(AutoModelForCausalLM.from_config(config))
    assert all(family in str(refusal.value) for family in ARCHITECTURES)
    assert "architecture=" in str(refusal.value)


def test_a_module_that_is_no_pretrained_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Found Linear; load one with AutoModelForCausalLM"):
        find_sites(nn.Linear(2, 2))


def test_an_architecture_that_does_not_fit_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match=r"no list of decoder layers at 'transformer.h'"):
        find_sites(model, SimpleNamespace(model_type="llama", layers="transformer.h"))  # type: ignore[arg-type]


# -- refusals of plans ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (PruningPlan("qwen2", 3), "model_type 'qwen2', the model has 'llama'"),
        (PruningPlan("llama", 4), "for 4 layers, the model has 3"),
        (PruningPlan("llama", 3, {"layers.0.experts": SitePlan(1, 48, (0,))}), "no site layers.0.experts"),
        (PruningPlan("llama", 3, {"layers.0.mlp": SitePlan(1, 47, (0,))}), "1 x 47 units, the model has 1 x 48"),
        (PruningPlan("llama", 3, {"layers.0.attention": SitePlan(4, 1, (0,))}), "4 x 1 units, the model has 2 x 2"),
    ],
)
def test_a_plan_of_another_model_is_refused_with_the_difference(plan: PruningPlan, message: str) -> None:
    sites = find_sites(tiny_model("llama"))
    with pytest.raises(PlanError, match=re.escape(message)):
        sites.check(plan)
    with pytest.raises(PlanError, match=re.escape(message)):
        apply_plan(sites, plan)


def test_a_removed_sublayer_is_no_site_any_more() -> None:
    sites = find_sites(tiny_model("llama"))
    plan = plan_of_kind(sites, "attention")
    assert plan is not None
    cut = apply_plan(sites, plan)
    assert [site.name for site in cut if site.kind == "attention"] == ["layers.1.attention"]
    with pytest.raises(PlanError, match=r"no site layers.0.attention. Was its sublayer removed by an earlier run\?"):
        cut.check(plan)


@pytest.mark.parametrize("headless", HEADLESS)
def test_heads_that_cannot_go_are_refused_with_the_reason(headless: str) -> None:
    sites = find_sites(tiny_model(headless))
    site = sites.by_name["layers.0.attention"]
    reason = "normalises queries and keys" if headless == "olmo2" else "has no head_dim field"
    plan = PruningPlan(headless, 3, {site.name: keep_groups(site, (0,))})
    with pytest.raises(PlanError, match=f"layers.0.attention: .*{reason}"):
        sites.check(plan)
    sites.check(PruningPlan(headless, 3, {site.name: SitePlan(site.groups, site.group_size, ())}))
    sites.check(PruningPlan(headless, 3, {site.name: site.whole}))


@pytest.mark.parametrize("mixture", MIXTURES)
def test_fewer_experts_than_every_token_needs_are_refused(mixture: str) -> None:
    sites = find_sites(tiny_model(mixture))
    site = sites.by_name["layers.0.experts"]
    with pytest.raises(PlanError, match=r"1 experts would stay, but every token is sent to 2. Keep at least that many"):
        sites.check(PruningPlan(mixture, 3, {site.name: keep_groups(site, (1,))}))
    sites.check(PruningPlan(mixture, 3, {site.name: keep_groups(site, (1, 2))}))
    sites.check(PruningPlan(mixture, 3, {site.name: SitePlan(site.groups, site.group_size, ())}))


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.float32, 4), (torch.bfloat16, 8)])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_expert_widths_are_whole_sixteen_bytes(mixture: str, dtype: torch.dtype, multiple: int) -> None:
    sites = find_sites(tiny_model(mixture).to(dtype))
    site = sites.by_name["layers.0.experts"]
    for width in range(1, 25):
        kept = tuple(unit for unit in range(site.units("expert_channel")) if unit % site.group_size < width)
        plan = PruningPlan(mixture, 3, {site.name: SitePlan(site.groups, site.group_size, kept)})
        if width % multiple:
            with pytest.raises(PlanError, match=f"{width} channels per expert .* Keep a multiple of {multiple}"):
                sites.check(plan)
        else:
            sites.check(plan)


def test_whole_experts_may_go_whatever_their_width() -> None:
    sites = find_sites(tiny_model("mixtral", intermediate_size=10))
    site = sites.by_name["layers.0.experts"]
    sites.check(PruningPlan("mixtral", 3, {site.name: keep_groups(site, (0, 1, 2))}))


@pytest.mark.parametrize(
    ("family_name", "changes", "reason"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attention is scaled by the layer number"),
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}, "which layers are sparse depends on"),
    ],
)
def test_layers_whose_number_is_part_of_the_function_stay(
    family_name: str, changes: dict[str, object], reason: str
) -> None:
    sites = find_sites(tiny_model(family_name, **changes))
    with pytest.raises(UnsupportedModelError, match=f"layers of this model cannot be dropped: {reason}"):
        sites.check(PruningPlan(family_name, 3, {}, (1,)))
    sites.check(PruningPlan(family_name, 3))


def test_layers_of_the_other_families_may_go(sites: ModelSites) -> None:
    sites.check(PruningPlan(sites.architecture.model_type, 3, {}, (0, 2)))


def test_sites_come_layer_by_layer(sites: ModelSites, family: str) -> None:
    names = [site.name for site in sites]
    feed_forward = ["mlp"] * 3
    if family in MIXTURES:
        feed_forward = ["experts", "mlp" if family == "qwen3_moe" else "experts", "experts"]
    assert names == [f"layers.{i}.{kind}" for i in range(3) for kind in ("attention", feed_forward[i])]
    assert len(sites) == len(names)
    assert sites.device == torch.device("cpu")
    assert sites.model.config.vocab_size == VOCABULARY
    assert sum(sites.layer_parameters) == sites.decoder_parameters < sites.total_parameters
