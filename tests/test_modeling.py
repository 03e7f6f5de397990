"""Laws of checkpoints: save, load, logits equal; what a plain transformers cannot build it refuses."""

from __future__ import annotations

import dataclasses
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, HEADLESS, MIXTURES, TOKEN_IDS, logits_of, tiny_model, tokens
from plans import KINDS, generated, keep_groups, keep_nothing, mixed_cut, plan_of_kind, random_repairs
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_adaprune import modeling
from hf_adaprune.architectures import ARCHITECTURES
from hf_adaprune.errors import UnsupportedModelError
from hf_adaprune.layers import is_layer_class
from hf_adaprune.modeling import prepare_layer_class
from hf_adaprune.plan import PruningPlan, SitePlan
from hf_adaprune.sites import ModelSites, find_sites
from hf_adaprune.surgery import apply_plan


@pytest.fixture
def modelling_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """What hf_adaprune.loading installs: layers built from per-layer sizes."""
    original = PreTrainedModel.__init__

    def init(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        prepare_layer_class(self, config)
        original(self, config, *args, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "__init__", init)


def reloads_equal(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Save, load, compare; returns the loaded model."""
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is type(model)
    state, other = model.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())
    assert torch.equal(logits_of(loaded, tokens()), logits_of(model, tokens()))
    assert torch.equal(generated(loaded), generated(model))
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(folder)} | {
        name: value for name, value in loaded.config.to_dict().items() if name in ("_name_or_path", "architectures")
    }
    return loaded


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_logits_equal(modelling_half: None, sites: ModelSites, kind: str, tmp_path: Path) -> None:
    plan = plan_of_kind(sites, kind)
    if plan is None:
        pytest.skip(f"no {kind} to remove")
    apply_plan(sites, plan)
    reloads_equal(sites.model, tmp_path)


@pytest.mark.parametrize("kind", ["channel", "kv_group", "query_head"])
def test_save_load_logits_equal_with_added_biases(
    modelling_half: None, sites: ModelSites, kind: str, tmp_path: Path
) -> None:
    plan = plan_of_kind(sites, kind)
    if plan is None:
        pytest.skip(f"no {kind} to remove")
    apply_plan(sites, plan, random_repairs(sites, plan))
    reloads_equal(sites.model, tmp_path)


def test_a_loaded_model_is_pruned_further(modelling_half: None, sites: ModelSites, family: str, tmp_path: Path) -> None:
    apply_plan(sites, *mixed_cut(sites))
    sites = find_sites(reloads_equal(sites.model, tmp_path / "once"))
    apply_plan(sites, PruningPlan(family, 3, {}, (1,)))
    sites = find_sites(reloads_equal(sites.model, tmp_path / "twice"))
    site = next(site for site in sites if site.kind != "attention")
    keep = keep_groups(site, (0, 1)) if site.groups > 1 else SitePlan(1, site.columns, tuple(range(8)))
    plan = PruningPlan(family, 2, {site.name: keep})
    apply_plan(sites, plan, random_repairs(sites, plan))
    reloads_equal(sites.model, tmp_path / "thrice")


@pytest.mark.parametrize("second", ["kv_group", "attention"])
def test_uniform_then_not(modelling_half: None, second: str, tmp_path: Path) -> None:
    sites = find_sites(tiny_model("llama", num_key_value_heads=4))
    first = {site.name: keep_groups(site, (1, 2)) for site in sites if site.kind == "attention"}
    sites = apply_plan(sites, PruningPlan("llama", 3, first))
    assert not sites.model.config.is_heterogeneous
    plan = plan_of_kind(sites, second)
    assert plan is not None
    apply_plan(sites, plan)
    assert sites.model.config.is_heterogeneous
    reloads_equal(sites.model, tmp_path)


def test_heads_that_do_not_divide_the_hidden_size(modelling_half: None, tmp_path: Path) -> None:
    sites = find_sites(tiny_model("llama", num_key_value_heads=4))
    cuts = {site.name: keep_groups(site, (0, 1, 3)) for site in sites if site.kind == "attention"}
    apply_plan(sites, PruningPlan("llama", 3, cuts))
    reloads_equal(sites.model, tmp_path)


def test_rope_factors_that_the_config_counts_from_the_heads(modelling_half: None, tmp_path: Path) -> None:
    factors = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors}
    changes = {"hidden_size": 48, "rope_parameters": rope, "original_max_position_embeddings": 64}
    sites = find_sites(tiny_model("phi3", **changes))
    plan = plan_of_kind(sites, "kv_group", uniform=True)
    assert plan is not None
    apply_plan(sites, plan)
    reloads_equal(sites.model, tmp_path)


def test_a_homogeneous_model_after_a_cut_one_is_plain(modelling_half: None, tmp_path: Path) -> None:
    sites = find_sites(tiny_model("llama"))
    apply_plan(sites, *mixed_cut(sites))
    reloads_equal(sites.model, tmp_path)
    plain = tiny_model("llama")
    assert all(module.config is plain.config for module in plain.model.layers[0].modules() if hasattr(module, "config"))


# -- uniform form -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["channel", "kv_group", "query_head", "expert", "expert_channel", "layer"])
def test_a_uniform_cut_leaves_no_trace(sites: ModelSites, kind: str, tmp_path: Path) -> None:
    model = sites.model
    model.save_pretrained(tmp_path / "dense")
    plan = plan_of_kind(sites, kind, uniform=True)
    if plan is None:
        pytest.skip(f"no {kind} to remove")
    if kind in ("channel", "expert", "expert_channel"):
        sizes = {"channel": 20, "expert": 3, "expert_channel": 8}
        cuts = {}
        for name in plan.sites:
            site = sites.by_name[name]
            if kind == "expert":
                cuts[name] = keep_groups(site, (0, 1, 3))
            else:
                kept = (u for u in range(site.groups * site.group_size) if u % site.group_size < sizes[kind])
                cuts[name] = SitePlan(site.groups, site.group_size, tuple(kept))
        plan = PruningPlan(plan.model_type, plan.num_layers, cuts)
    apply_plan(sites, plan)
    assert not model.config.is_heterogeneous
    model.save_pretrained(tmp_path / "cut")
    dense, cut = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("dense", "cut"))
    assert set(cut) - set(dense) <= {"head_dim"}
    assert set(dense) <= set(cut)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert torch.equal(logits_of(loaded, tokens()), logits_of(model, tokens()))


def test_a_cut_that_becomes_uniform_leaves_no_trace() -> None:
    sites = find_sites(tiny_model("llama"))
    first = PruningPlan("llama", 3, {"layers.0.attention": keep_groups(sites.by_name["layers.0.attention"], (0,))})
    sites = apply_plan(sites, first)
    assert sites.model.config.allow_global_per_layer_attribute_access
    rest = {f"layers.{i}.attention": keep_groups(sites.by_name[f"layers.{i}.attention"], (1,)) for i in (1, 2)}
    sites = apply_plan(sites, PruningPlan("llama", 3, rest))
    written = sites.model.config.to_dict()
    assert not {"per_layer_config", "adaprune", "allow_global_per_layer_attribute_access"} & set(written)
    assert (written["num_attention_heads"], written["num_key_value_heads"], written["head_dim"]) == (2, 1, 12)


# -- when transformers has the modelling half -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["channel", "kv_group", "query_head", "attention", "mlp", "layer"])
def test_our_half_steps_aside_when_transformers_builds_the_layers(
    modelling_half: None, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer class that builds itself from the whole config gets that config, and loads what was saved."""
    sites = find_sites(tiny_model("llama"))
    plan = plan_of_kind(sites, kind)
    assert plan is not None
    apply_plan(sites, plan)
    plain = inspect.unwrap(LlamaDecoderLayer.__init__)  # another test may have met a config that needs ours
    given = []

    def upstream(self: LlamaDecoderLayer, config: Any, layer_idx: int) -> None:
        given.append(config)
        plain(self, config.per_layer_config[layer_idx] if config.is_heterogeneous else config, layer_idx)

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", upstream)
    monkeypatch.setattr(modeling, "_upstream_builds_layers", lambda: True)
    loaded = reloads_equal(sites.model, tmp_path)
    assert len(given) == len(find_sites(loaded).layers)
    assert all(config is loaded.config for config in given)


# -- without the modelling half ---------------------------------------------------------------------------------------

PLAIN = """
import json, sys, warnings
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
torch.set_num_threads(1)
assert "hf_adaprune" not in sys.modules
ids = torch.tensor(json.loads(sys.argv[1]))
for folder in sys.stdin.read().split():
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
    except Exception as error:
        print(json.dumps([folder, "raised", type(error).__name__]))
        continue
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    same = torch.equal(logits, torch.load(folder + "/logits.pt"))
    print(json.dumps([folder, "equal" if same else "WRONG", ""]))
"""


def plan_for(sites: ModelSites, *gone: str, dropped: tuple[int, ...] = ()) -> PruningPlan:
    """Whole sublayers go."""
    cuts = {name: keep_nothing(sites.by_name[name]) for name in gone}
    return PruningPlan(sites.architecture.model_type, len(sites.layers), cuts, dropped)


def one_head(family: str) -> dict[str, int]:
    """Changes that leave a family one head for keys and values."""
    if "num_key_value_heads" in FAMILIES[family]:
        return {"num_key_value_heads": 1}
    return {"n_head" if family == "gpt2" else "num_attention_heads": 1}


def plain_cases(family: str) -> Iterator[tuple[str, str, PreTrainedModel]]:
    """What a plain transformers should do with it, a name, and the pruned model."""
    for kind in KINDS:
        sites = find_sites(tiny_model(family))
        plan = plan_of_kind(sites, kind)
        if plan is not None:
            apply_plan(sites, plan)
            same = kind == "layer" or (family, kind) == ("qwen3_moe", "channel")  # which has one dense layer
            yield "equal" if same else "raised", kind, sites.model
        if plan is not None and kind in ("channel", "kv_group"):
            sites = find_sites(tiny_model(family))
            apply_plan(sites, plan, random_repairs(sites, plan))
            yield "raised", f"{kind}-bias", sites.model
        sites = find_sites(tiny_model(family))
        plan = plan_of_kind(sites, kind, uniform=True)
        if plan is not None and kind in ("kv_group", "query_head"):
            apply_plan(sites, plan)
            yield "equal", f"{kind}-uniform", sites.model
            sites = find_sites(tiny_model(family))
            if any(site.reader.bias is None for site in sites if site.kind == "attention"):
                apply_plan(sites, plan, random_repairs(sites, plan))
                yield "raised", f"{kind}-uniform-bias", sites.model
    names = [site.name for site in find_sites(tiny_model(family))]
    for name in names:
        sites = find_sites(tiny_model(family))
        apply_plan(sites, plan_for(sites, name))
        yield "raised", f"only-{name}", sites.model
    for kind in ("attention", "mlp"):
        sites = find_sites(tiny_model(family))
        every = [name for name in names if name.endswith("attention") == (kind == "attention")]
        apply_plan(sites, plan_for(sites, *every))
        yield "raised", f"every-{kind}", sites.model
    sites = find_sites(tiny_model(family, **one_head(family)))
    apply_plan(sites, plan_for(sites, "layers.1.attention"))
    yield "raised", "one-head-attention", sites.model
    sites = find_sites(tiny_model(family))
    sites = apply_plan(sites, plan_for(sites, "layers.1.attention", dropped=(0,)))
    yield "raised", "attention-and-layer", sites.model
    if family == "qwen3_moe":
        sites = find_sites(tiny_model(family, mlp_only_layers=[0, 1, 2]))
        apply_plan(sites, plan_for(sites, "layers.1.mlp"))
        yield "raised", "all-dense-mlp", sites.model
    if family not in HEADLESS:  # heads mixed, then equal again, then an attention removed
        sites = find_sites(tiny_model(family))
        for layers in ((0,), (1, 2)):
            cuts = {f"layers.{i}.attention": keep_groups(sites.by_name[f"layers.{i}.attention"], (1,)) for i in layers}
            sites = apply_plan(sites, PruningPlan(family, 3, cuts))
        apply_plan(sites, plan_for(sites, "layers.2.attention"))
        yield "raised", "mixed-equal-attention", sites.model
        sites = find_sites(tiny_model(family))
        cut = {"layers.1.attention": keep_groups(sites.by_name["layers.1.attention"], (1,))}
        sites = apply_plan(sites, PruningPlan(family, 3, cut))
        apply_plan(sites, plan_for(sites, "layers.1.attention"))
        yield "raised", "cut-then-removed", sites.model


def test_a_plain_transformers_refuses_what_it_cannot_build(tmp_path: Path) -> None:
    expected = {}
    ids = tokens()
    for family in FAMILIES:
        for outcome, name, model in plain_cases(family):
            folder = tmp_path / f"{family}-{name}"
            model.save_pretrained(folder)
            torch.save(logits_of(model, ids), folder / "logits.pt")
            expected[str(folder)] = outcome
    run = subprocess.run(
        [sys.executable, "-c", PLAIN, json.dumps(ids.tolist())],
        input="\n".join(expected),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    assert run.returncode == 0, run.stderr
    found = {folder: outcome for folder, outcome, _ in map(json.loads, run.stdout.splitlines())}
    wrong = {Path(f).name: (outcome, found.get(f)) for f, outcome in expected.items() if found.get(f) != outcome}
    assert wrong == {}


# -- an architecture of the user's own --------------------------------------------------------------------------------


class MyLlamaConfig(LlamaConfig):
    """Llama under a name that hf_adaprune does not know."""

    model_type = "my_llama"


class MyLlamaForCausalLM(LlamaForCausalLM):
    """The same model, another model_type."""

    config_class = MyLlamaConfig


AutoConfig.register("my_llama", MyLlamaConfig, exist_ok=True)
AutoModelForCausalLM.register(MyLlamaConfig, MyLlamaForCausalLM, exist_ok=True)


@pytest.mark.parametrize("kind", ["channel", "kv_group", "query_head", "attention", "mlp", "layer", "mixed"])
def test_an_architecture_of_the_users_own(modelling_half: None, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MyLlamaForCausalLM(MyLlamaConfig(**FAMILIES["llama"], **TOKEN_IDS, initializer_range=0.2)).eval()
    with pytest.raises(UnsupportedModelError, match="'my_llama'"):
        find_sites(model)
    own = dataclasses.replace(ARCHITECTURES["llama"], model_type="my_llama")
    sites = find_sites(model, own)
    plan, repairs = mixed_cut(sites) if kind == "mixed" else (plan_of_kind(sites, kind), {})
    assert plan is not None
    apply_plan(sites, plan, repairs)
    loaded = reloads_equal(model, tmp_path)
    if model.config.is_heterogeneous:
        assert loaded.config.adaprune["architecture"]["model_type"] == "my_llama"
    again = find_sites(loaded, own)
    apply_plan(again, PruningPlan("my_llama", len(again.layers), {}, (0,)))
    reloads_equal(loaded, tmp_path / "again")


@pytest.mark.usefixtures("modelling_half")
@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("cut", ["widths", "heads", "experts"])
def test_the_router_loss_is_that_of_the_reloaded_model(mixture: str, cut: str, tmp_path: Path) -> None:
    sites = find_sites(tiny_model(mixture))
    cuts: dict[str, SitePlan] = {}
    for site in sites:
        if site.kind == "experts":
            experts = (1, 2) if cut == "experts" and site.layer == 0 else (0, 2, 3)
            width = site.group_size // 2 if cut == "widths" and site.layer == 0 else site.group_size
            kept = tuple(expert * site.group_size + unit for expert in experts for unit in range(width))
            cuts[site.name] = SitePlan(site.groups, site.group_size, kept)
        elif site.kind == "attention" and cut == "heads" and site.layer == 1:
            cuts[site.name] = keep_groups(site, (1,))
    model: Any = apply_plan(sites, PruningPlan(mixture, len(sites.layers), cuts)).model
    loaded: Any = reloads_equal(model, tmp_path / "out")
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for options in ({}, {"attention_mask": mask}):
        asked = {"input_ids": ids, "labels": ids, "output_router_logits": True, "use_cache": False, **options}
        live, fresh = model(**asked), loaded(**asked)
        assert torch.equal(live.loss, fresh.loss) and torch.equal(live.aux_loss, fresh.aux_loss)
        assert live.loss.requires_grad
        counts = {site.groups for site in find_sites(model) if site.kind == "experts"}
        assert counts == ({2, 3} if cut == "experts" else {3})
        if cut == "experts":  # the mean over layers of each number
            balance = inspect.getmodule(type(model)).load_balancing_loss_func  # type: ignore[union-attr]
            logits, top = live.router_logits, model.num_experts_per_tok
            rest = options.get("attention_mask")
            expected = balance(logits[:1], 2, top, rest) + (len(logits) - 1) * balance(logits[1:], 3, top, rest)
            assert torch.allclose(live.aux_loss, expected / len(logits))


def test_layers_are_known_by_a_config_and_a_number() -> None:
    class Plain(nn.Module):
        def __init__(self, config: Any, layer_id: int) -> None:
            super().__init__()

    class HandsOn(Plain):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    class Norm(nn.Module):
        def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
            super().__init__()

    assert is_layer_class(Plain) and is_layer_class(HandsOn)
    assert not is_layer_class(Norm) and not is_layer_class(nn.Module) and not is_layer_class(len)
