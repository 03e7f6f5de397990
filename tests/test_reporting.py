"""Widths of layers, tables and pictures."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import tiny_model
from plans import rich_plan

from hf_adaprune import PruningConfig, PruningPlan, apply_plan, find_sites
from hf_adaprune.description import describe
from hf_adaprune.errors import ConfigError, MissingDependencyError
from hf_adaprune.evaluation import Measurement
from hf_adaprune.pipeline import PruningResult, Sizes
from hf_adaprune.reporting import evaluation_table, plan_table, size_table, text_table
from hf_adaprune.width_plot import plot_widths
from hf_adaprune.widths import LayerWidths, layer_widths


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
