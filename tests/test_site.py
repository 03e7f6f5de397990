"""Laws of one site: what a unit costs, how heads fold, and which rows and columns are a unit's."""

from __future__ import annotations

import pytest
import torch
from conftest import logits_of, parameters_of, tiny_model, tokens
from plans import keep_groups
from transformers import PreTrainedModel

from hf_adaprune.plan import PruningPlan, SitePlan
from hf_adaprune.site import Site
from hf_adaprune.sites import ModelSites, find_sites
from hf_adaprune.surgery import apply_plan


@pytest.mark.parametrize("kind", ["channel", "kv_group", "query_head", "expert", "expert_channel"])
def test_unit_parameters_are_what_one_unit_costs(sites: ModelSites, kind: str) -> None:
    site_kind = {"channel": "mlp", "kv_group": "attention", "query_head": "attention"}.get(kind, "experts")
    site = next((site for site in sites if site.kind == site_kind and not site.refusal), None)
    if site is None:
        pytest.skip(f"no {kind} to remove")
    if kind in ("kv_group", "expert"):
        kept, units = keep_groups(site, tuple(range(1, site.groups))), 1
    else:  # the last units of every group leave: aligned experts lose eight channels
        goes = 8 if kind == "expert_channel" else 1
        units = goes * site.groups
        kept = SitePlan(
            site.groups,
            site.group_size,
            tuple(u for u in range(site.groups * site.group_size) if u % site.group_size < site.group_size - goes),
        )
    expected = units * site.unit_parameters(kind)
    assert site.removed_parameters(kept) == expected
    before = parameters_of(sites.model)
    apply_plan(sites, PruningPlan(sites.architecture.model_type, len(sites.layers), {site.name: kept}))
    assert before - parameters_of(sites.model) == expected


# -- grouped queries --------------------------------------------------------------------------------------------------


def reader_inputs(model: PreTrainedModel, site: Site) -> torch.Tensor:
    seen = []
    hook = site.reader.module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    logits_of(model, tokens())
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("grouped", ["llama", "qwen3", "phi3", "gemma3_text", "mixtral"])
def test_a_grouped_query_score_folds_kv_groups_queries_head_dim(grouped: str) -> None:
    model = tiny_model(grouped, hidden_size=36, num_attention_heads=6, num_key_value_heads=3)
    site = find_sites(model).by_name["layers.0.attention"]
    assert (site.groups, site.group_size, site.columns_per_unit) == (3, 2, 12)
    before = reader_inputs(model, site)
    fused = site.fused
    for group in range(3):  # disturb the value head of one group: only its block of the reader's inputs may change
        writer = site.writers[0 if fused else 2]
        start = (6 + 3 + group) * 12 if fused else group * 12
        with torch.no_grad():
            saved = writer.parameter.clone()
            writer.parameter[start : start + 12] += 1
        moved = (reader_inputs(model, site) - before).abs().amax((0, 1))
        with torch.no_grad():
            writer.parameter.copy_(saved)
        folded = moved.reshape(3, 2, 12).amax(-1)
        assert torch.equal(folded > 0, torch.arange(3)[:, None].expand(3, 2) == group)
        assert torch.equal(site.fold(moved, "kv_group").amax(-1) > 0, torch.arange(3) == group)
        assert torch.equal(site.fold(moved, "query_head").amax(-1) > 0, torch.arange(6) // 2 == group)


def test_zeroed_columns_of_a_query_head_fold_into_its_block(sites: ModelSites) -> None:
    for site in sites:
        if site.kind != "attention":
            continue
        head = site.columns_per_unit
        for unit in range(site.groups * site.group_size):
            weight = site.reader.weight.clone()
            weight[:, unit * head : (unit + 1) * head] = 0
            energy = site.fold(weight.square().sum(0), "query_head").sum(-1)
            assert torch.equal(energy == 0, torch.arange(len(energy)) == unit)
            block = site.fold(weight.square().sum(0), "kv_group").reshape(site.groups, site.group_size, head).sum(-1)
            assert (block == 0).nonzero().tolist() == [[unit // site.group_size, unit % site.group_size]]


def test_column_and_row_indices_of_a_fused_attention() -> None:
    site = find_sites(tiny_model("phi3")).by_name["layers.0.attention"]
    kept = SitePlan(2, 2, (1, 2))
    assert site.column_index(kept).tolist() == list(range(12, 36))
    query, key = 48, 24
    values = [*range(12, 36), *range(query, query + 24), *range(query + key, query + key + 24)]
    assert site.row_index(0, kept).tolist() == values


def test_writer_rows_sum_to_their_units(sites: ModelSites) -> None:
    for site in sites:
        kinds = {"attention": ("kv_group", "query_head"), "mlp": ("channel",), "experts": ("expert", "expert_channel")}
        if site.refusal:
            continue
        for kind in kinds[site.kind]:
            for number, writer in enumerate(site.writers):
                rows = writer.weight.sum(-1)
                summed = site.writer_units(number, kind, rows)
                if kind == "query_head" and number > 0:
                    assert summed is None
                    continue
                assert summed is not None
                assert summed.shape == (site.units(kind),)
                if not (kind == "query_head" and site.fused):
                    torch.testing.assert_close(summed.sum(), rows.sum())
