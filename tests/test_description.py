"""What a plan or a checkpoint is said to be, without loading it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, HEADLESS, MIXTURES, tiny_model
from plans import rich_plan

from hf_adaprune import PruningConfig, PruningPlan, apply_plan, find_sites, prune
from hf_adaprune.description import describe, describe_checkpoint
from hf_adaprune.errors import CheckpointError, ConfigError, PlanError
from hf_adaprune.plan import SitePlan
from hf_adaprune.width_plot import plot_widths
from hf_adaprune.widths import layer_widths


def test_describe_a_pruned_checkpoint(tmp_path: Path) -> None:
    config = PruningConfig.recipe("magnitude", pruning_ratio=0.3, units=("channel", "kv_group", "mlp"))
    model = tiny_model("llama")
    plan = PruningPlan("llama", 3, {"layers.0.mlp": SitePlan(1, 48, tuple(range(9)))}, (1,))
    result = prune(model, None, config, plan=plan)
    result.save_pretrained(tmp_path / "out")
    found = describe(tmp_path / "out")
    assert (found.parameters, found.bytes, found.dense_parameters) == (
        result.after.total,
        result.after.bytes,
        result.before.total,
    )
    assert [row.layer for row in found.layers] == [0, 1, 2] and found.layers[1].dropped
    assert found.layers[0].channels == (9, 48) and found.layers[2].channels == (48, 48)
    assert found.provenance["recipe"] == "magnitude" and found.dtypes == ("F32",)
    assert "magnitude" in str(found) and "pruning ratio" in found.title
    assert json.loads(json.dumps(found.to_dict()))["layers"][0]["channels"] == [9, 48]
    assert describe(tmp_path / "out" / "pruning_plan.json").layers == layer_widths(plan)


def test_describe_skipped_sublayers_without_provenance(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    apply_plan(find_sites(model), rich_plan())
    model.save_pretrained(tmp_path)
    rows = describe_checkpoint(tmp_path).layers
    assert [(row.groups, row.channels) for row in rows] == [((1, 2), (20, 48)), ((2, 2), (0, 48)), ((0, 2), (48, 48))]
    assert "removed" in str(describe_checkpoint(tmp_path))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_describe_every_family(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    found, sites = describe_checkpoint(tmp_path), find_sites(model)
    assert found.parameters == sites.total_parameters and found.bytes == 2 * sites.total_parameters
    assert tuple(row.after for row in found.layers) == sites.layer_parameters
    for site in sites:
        row = found.layers[site.layer]
        if site.kind == "attention":
            assert row.groups == (site.groups, site.groups) and row.heads[0] == site.groups * site.group_size
        elif site.kind == "experts":
            assert (row.experts[0], row.channels[0]) == (site.groups, site.group_size)
        elif family != "gpt2":  # its config leaves the width out
            assert row.channels[0] == site.group_size
    assert ("experts" in str(found)) == (family in MIXTURES)
    assert family in HEADLESS or found.layers[0].heads == (4, 4)


def test_an_unknown_family_is_still_counted(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "new"}))
    found = describe(tmp_path)
    assert found.layers == () and found.parameters > 0 and "new" in str(found)
    with pytest.raises(ConfigError, match="no layer widths to draw"):
        plot_widths(found.layers, tmp_path / "x.png")


def test_garbage_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is nothing at"):
        describe(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="should hold a JSON object"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        describe(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for content in (b"", b"\xff" * 20, b"\x02" + b"\0" * 7 + b"[]"):
        (tmp_path / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="no safetensors file"):
            describe(tmp_path)
    for text in (b"{}", b"\xff\xfe", b"no"):
        (tmp_path / "plan.json").write_bytes(text)
        with pytest.raises(PlanError, match="is no plan"):
            describe(tmp_path / "plan.json")
