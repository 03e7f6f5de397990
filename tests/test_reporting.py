"""Tables, descriptions and pictures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, HEADLESS, MIXTURES, tiny_model
from plans import keep_groups, keep_nothing

from hf_adaprune import PruningConfig, PruningPlan, apply_plan, find_sites, prune
from hf_adaprune.errors import CheckpointError, ConfigError, MissingDependencyError, PlanError
from hf_adaprune.evaluation import Measurement
from hf_adaprune.pipeline import PruningResult, Sizes
from hf_adaprune.plan import SitePlan
from hf_adaprune.reporting import (
    LayerWidths,
    describe,
    describe_checkpoint,
    evaluation_table,
    layer_widths,
    plan_table,
    size_table,
    text_table,
)
from hf_adaprune.width_plot import plot_widths


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


def test_text_table_lines_up() -> None:
    lines = text_table(("what", "n"), [("a", "1,000"), ("long name", "5")]).splitlines()
    assert lines == ["what           n", "---------  -----", "a          1,000", "long name      5"]


def test_size_table() -> None:
    table = size_table(Sizes(1000, 2000, 4 * 2**20), Sizes(750, 1750, 3 * 2**20))
    assert "25.0 %" in table and "12.5 %" in table and "4.0 MiB" in table


def test_plan_table_adds_up() -> None:
    sites = find_sites(tiny_model("llama", num_hidden_layers=4))
    plan = rich_plan()
    dense = sites.decoder_parameters
    left = dense - sites.removed_parameters(plan)
    table = plan_table(plan, sites)
    rows = layer_widths(plan, sites)
    assert sum(row.before for row in rows) == dense and sum(row.after for row in rows) == left
    assert f"{dense:,}" in table and f"{left:,}" in table
    assert "20/48" in table and "1/2" in table and "2/4" in table
    assert table.count("layer removed") == 1 and table.splitlines()[4].count("removed") >= 1
    cut = apply_plan(sites, plan)
    assert rows == layer_widths(plan, find_sites(tiny_model("llama", num_hidden_layers=4)), cut.layer_parameters)


def test_a_plan_alone_knows_the_widths() -> None:
    full = layer_widths(rich_plan(), find_sites(tiny_model("llama", num_hidden_layers=4)))
    alone = layer_widths(rich_plan())
    for row, known in zip(alone, full, strict=True):
        assert row == replace(known, before=None, after=None)
    assert "parameters" not in plan_table(rich_plan())
    assert layer_widths(PruningPlan("llama", 2))[0] == LayerWidths(0)


def test_evaluation_table() -> None:
    model = tiny_model("llama")
    size = Sizes(2, 2, 2)
    values = {"dense": 10.0, "pruned": 12.5}
    pair = {which: Measurement("perplexity", value, 0.1, 100, 4) for which, value in values.items()}
    done = PruningResult(model, None, PruningConfig(), PruningPlan("llama", 3), size, size, evaluation={"wiki": pair})
    assert "wiki" in evaluation_table(done) and "1.250" in evaluation_table(done)
    assert evaluation_table(PruningResult(model, None, PruningConfig(), PruningPlan("llama", 3), size, size)) == ""


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


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_pictures(suffix: str, tmp_path: Path) -> None:
    file = plot_widths(layer_widths(rich_plan()), tmp_path / "new" / f"widths{suffix}", "a title")
    start = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}[suffix]
    assert file.read_bytes().startswith(start)


def test_pictures_of_a_mixture(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    assert plot_widths(describe(tmp_path).layers, tmp_path / "x.svg").stat().st_size > 1000


def test_pictures_say_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"should end in \.png"):
        plot_widths(layer_widths(rich_plan()), tmp_path / "x.gif")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"hf_adaprune\[report\]"):
        plot_widths(layer_widths(rich_plan()), tmp_path / "x.png")
