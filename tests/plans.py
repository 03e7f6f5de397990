"""Plans for tests: one of every unit kind, with widths that differ by layer, and hypothesis strategies."""

from __future__ import annotations

import torch
from conftest import tiny_model, tokens
from hypothesis import strategies as st
from transformers import PreTrainedModel

from hf_adaprune.compensation import Repair
from hf_adaprune.plan import PruningPlan, SitePlan, site_name
from hf_adaprune.site import Site
from hf_adaprune.sites import ModelSites, find_sites

KINDS = ("channel", "kv_group", "query_head", "expert", "expert_channel", "attention", "mlp", "layer")
SITE_OF_KIND = {
    "channel": "mlp",
    "kv_group": "attention",
    "query_head": "attention",
    "expert": "experts",
    "expert_channel": "experts",
}


def keep_groups(site: Site, groups: tuple[int, ...]) -> SitePlan:
    """Whole groups that stay."""
    size = site.group_size
    return SitePlan(site.groups, size, tuple(group * size + unit for group in groups for unit in range(size)))


def keep_nothing(site: Site) -> SitePlan:
    """The sublayer goes."""
    return SitePlan(site.groups, site.group_size, ())


def _random_units(site: Site, per_group: int, generator: torch.Generator) -> SitePlan:
    kept: list[int] = []
    for group in range(site.groups):
        chosen = torch.randperm(site.group_size, generator=generator)[:per_group].sort().values
        kept.extend((group * site.group_size + chosen).tolist())
    return SitePlan(site.groups, site.group_size, tuple(kept))


def width_plan(site: Site, kind: str, generator: torch.Generator, uniform: bool = False) -> SitePlan | None:
    """A cut of one site: different for every layer, or equally wide in all; `None` where it stays whole."""
    layer = 0 if uniform else site.layer
    if kind == "channel":
        return _random_units(site, site.group_size // 2 + layer, generator)
    if kind == "expert_channel":
        return _random_units(site, 8 if layer else 16, generator)
    if kind == "query_head":
        return _random_units(site, 1, generator) if uniform or layer != 2 else None
    if kind == "expert":
        return keep_groups(site, (0, 2, 3) if layer else (1, 3))
    if uniform:
        return keep_groups(site, (site.layer % site.groups,))
    return None if layer == 0 else keep_groups(site, (layer % site.groups,))


def plan_of_kind(sites: ModelSites, kind: str, seed: int = 1, uniform: bool = False) -> PruningPlan | None:
    """A plan that removes units of one kind; `None` for a model that has none of them to remove.

    Args:
        sites: the model.
        kind: one of `KINDS`.
        seed: which units.
        uniform: equal widths in all layers.
    """
    generator = torch.Generator().manual_seed(seed)
    cuts: dict[str, SitePlan] = {}
    for site in sites:
        if site.kind == "attention" and site.layer != 1:
            goes = kind == "attention"
        else:
            goes = kind == "mlp" and site.kind != "attention" and site.layer == 1
        if goes:
            cuts[site.name] = keep_nothing(site)
        elif site.kind == SITE_OF_KIND.get(kind) and not site.refusal:
            cut = width_plan(site, kind, generator, uniform)
            if cut is not None:
                cuts[site.name] = cut
    plan = PruningPlan(sites.architecture.model_type, len(sites.layers), cuts, (1,) if kind == "layer" else ())
    return None if plan.is_whole else plan


def whole_plan(sites: ModelSites) -> PruningPlan:
    """Every site named, nothing removed."""
    return PruningPlan(sites.architecture.model_type, len(sites.layers), {site.name: site.whole for site in sites})


def random_repairs(sites: ModelSites, plan: PruningPlan, bias: bool = True, seed: int = 3) -> dict[str, Repair]:
    """New weights of the right shapes for every site that a plan narrows."""
    generator = torch.Generator().manual_seed(seed)
    repairs = {}
    for name, kept in plan.changed():
        site = sites.by_name[name]
        if kept.is_empty:
            continue
        shape: tuple[int, ...] = (site.outputs, len(site.column_index(kept)))
        if site.kind == "experts":
            shape = (len(kept.kept_groups), site.outputs, kept.kept_per_group)
        weight = torch.randn(shape, generator=generator) * 0.1
        with_bias = bias and site.kind != "experts"
        repairs[name] = Repair(weight, torch.randn(site.outputs, generator=generator) if with_bias else None)
    return repairs


def mixed_cut(sites: ModelSites) -> tuple[PruningPlan, dict[str, Repair]]:
    """Attention of layer 0 removed, other widths cut with a bias, and the MLP of the last layer removed."""
    channels = plan_of_kind(sites, "channel") or plan_of_kind(sites, "expert_channel")
    assert channels is not None
    cuts = dict(channels.sites)
    last = [site for site in sites if site.layer == 2][-1]
    cuts["layers.0.attention"] = keep_nothing(sites.by_name["layers.0.attention"])
    cuts[last.name] = keep_nothing(last)
    plan = PruningPlan(sites.architecture.model_type, len(sites.layers), cuts)
    return plan, random_repairs(sites, plan)


def generated(model: PreTrainedModel, new_tokens: int = 4, **options: object) -> torch.Tensor:
    """Greedy continuation of two prompts."""
    ids = tokens(2, 5)
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        pad_token_id=0,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        **options,
    )


@st.composite
def site_plans(draw: st.DrawFn, groups: int | None = None, group_size: int | None = None) -> SitePlan:
    """Any valid `SitePlan`."""
    groups = groups or draw(st.integers(1, 5))
    size = group_size or draw(st.integers(1, 9))
    chosen = draw(st.lists(st.integers(0, groups - 1), unique=True))
    per_group = draw(st.integers(1, size))
    kept: list[int] = []
    for group in sorted(chosen):
        units = draw(st.lists(st.integers(0, size - 1), unique=True, min_size=per_group, max_size=per_group))
        kept.extend(group * size + unit for unit in sorted(units))
    return SitePlan(groups, size, tuple(kept))


@st.composite
def pruning_plans(draw: st.DrawFn) -> PruningPlan:
    """Any valid `PruningPlan`."""
    layers = draw(st.integers(1, 12))
    names = [site_name(layer, kind) for layer in range(layers) for kind in ("attention", "mlp", "experts")]
    cuts = draw(st.dictionaries(st.sampled_from(names), site_plans(), max_size=6))
    dropped = draw(st.lists(st.integers(0, layers - 1), unique=True, max_size=layers - 1))
    return PruningPlan(draw(st.sampled_from(["llama", "gpt2"])), layers, cuts, tuple(dropped))


def rich_plan() -> PruningPlan:
    """Something of everything: widths, groups, a removed sublayer of each kind, and a layer."""
    sites = find_sites(tiny_model("llama", num_hidden_layers=4)).by_name
    return PruningPlan(
        "llama",
        4,
        {
            "layers.0.mlp": SitePlan(1, 48, tuple(range(20))),
            "layers.0.attention": keep_groups(sites["layers.0.attention"], (1,)),
            "layers.2.mlp": keep_nothing(sites["layers.2.mlp"]),
            "layers.3.attention": keep_nothing(sites["layers.3.attention"]),
        },
        (1,),
    )
