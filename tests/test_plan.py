"""Laws of plans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from plans import pruning_plans, site_plans

from hf_adaprune.errors import PlanError
from hf_adaprune.plan import PruningPlan, SitePlan, site_name, split_site_name

CUT = SitePlan(1, 6, (0, 1, 4))
few = settings(max_examples=60, deadline=None)


@few
@given(pruning_plans())
def test_json_round_trip(plan: PruningPlan) -> None:
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert again.digest == plan.digest
    assert dict(again.changed()) == dict(plan.changed())


@few
@given(pruning_plans(), pruning_plans())
def test_digests_are_equal_iff_plans_are(one: PruningPlan, other: PruningPlan) -> None:
    assert (one.digest == other.digest) == (one == other)
    assert one.digest == PruningPlan.from_dict(one.to_dict()).digest


@few
@given(pruning_plans())
def test_equal_plans_are_one_key(plan: PruningPlan) -> None:
    again = PruningPlan(plan.model_type, plan.num_layers, dict(reversed(plan.sites.items())), plan.dropped_layers[::-1])
    assert again == plan
    assert len({plan: 1, again: 2}) == 1


def test_what_stays_whole_or_goes_with_its_layer_is_no_difference() -> None:
    bare = PruningPlan("llama", 3, {}, (1,))
    named = PruningPlan("llama", 3, {"layers.0.mlp": SitePlan.whole(1, 6), "layers.1.mlp": CUT}, (1,))
    assert named == bare
    assert named.digest == bare.digest
    assert hash(named) == hash(bare)
    assert list(named.changed()) == []
    assert named != "a plan"


@few
@given(site_plans())
def test_counts_of_a_site(site: SitePlan) -> None:
    assert len(site.kept) == len(site.kept_groups) * site.kept_per_group
    assert site.is_empty == (not site.kept)
    assert site.is_whole == (site == SitePlan.whole(site.groups, site.group_size))
    assert {unit // site.group_size for unit in site.kept} == set(site.kept_groups)


def test_kept_units_are_written_as_runs() -> None:
    plan = PruningPlan("llama", 1, {"layers.0.mlp": SitePlan(1, 10, (0, 1, 2, 5, 8, 9))})
    assert plan.to_dict()["sites"]["layers.0.mlp"]["kept"] == [[0, 3], [5, 6], [8, 10]]
    empty = PruningPlan("llama", 1, {"layers.0.mlp": SitePlan(1, 10, ())})
    assert empty.to_dict()["sites"]["layers.0.mlp"]["kept"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 6, (0, 0)), "ascending without repeats"),
        ((1, 6, (3, 1)), "ascending without repeats"),
        ((1, 6, (0, 6)), r"in \[0, 6\). Found 0 to 6"),
        ((1, 6, (-1, 2)), r"in \[0, 6\). Found -1 to 2"),
        ((2, 3, (0, 1, 3)), r"same number of units .* Found \[1, 2\]"),
        ((0, 3, ()), "at least one group of one unit. Found 0 x 3"),
        ((1, 0, ()), "at least one group of one unit. Found 1 x 0"),
    ],
)
def test_refused_site_plans(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SitePlan(*arguments)


@pytest.mark.parametrize(
    ("sites", "dropped", "message"),
    [
        ({}, (2,), r"dropped layers should be in \[0, 2\). Found \[2\]"),
        ({}, (-1,), r"dropped layers should be in \[0, 2\). Found \[-1\]"),
        ({}, (0, 1), "leave at least one layer"),
        ({"layers.2.mlp": CUT}, (), "no site 'layers.2.mlp' in a model of 2 layers"),
        ({"layers.0.norm": CUT}, (), "no site 'layers.0.norm'"),
        ({"layer.0.mlp": CUT}, (), "looks like layers.3.mlp. Found 'layer.0.mlp'"),
        ({"layers.x.mlp": CUT}, (), "looks like layers.3.mlp"),
        ({"layers.01.mlp": CUT}, (), "looks like layers.3.mlp"),
        ({"layers.\u00b2.mlp": CUT}, (), "looks like layers.3.mlp"),
        ({"layers.0.mlp.down": CUT}, (), "looks like layers.3.mlp"),
    ],
)
def test_refused_plans(sites: dict[str, SitePlan], dropped: tuple[int, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        PruningPlan("llama", 2, sites, dropped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "has format 2; this version reads 1. Update hf_adaprune"),
        ({"format": None}, "has format None"),
        ({"sites": None}, "not a pruning plan"),
        ({"sites": {"layers.0.mlp": {}}}, "not a pruning plan: KeyError"),
        ({"sites": {"layers.0.mlp": {"groups": 1, "group_size": 6, "kept": [3]}}}, "not a pruning plan: TypeError"),
        ({"sites": {"layers.0.mlp": {"groups": 1, "group_size": 6, "kept": [[0, 7]]}}}, "kept units should be in"),
        ({"num_layers": "many"}, "not a pruning plan: ValueError"),
        ({"dropped_layers": [5]}, "dropped layers should be in"),
    ],
)
def test_refused_json(change: dict[str, Any], message: str) -> None:
    data = {**PruningPlan("llama", 2, {"layers.0.mlp": CUT}).to_dict(), **change}
    with pytest.raises(PlanError, match=message):
        PruningPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}"])
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a pruning plan"):
        PruningPlan.from_json(text)


def test_save_and_load(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for plan in (PruningPlan("llama", 2, {"layers.0.mlp": CUT}), PruningPlan("llama", 2, {}, (1,))):
        plan.save(path)
        assert PruningPlan.load(path) == plan
        assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_load_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is no plan at"):
        PruningPlan.load(tmp_path / "none.json")


def test_dropped_layers_are_sorted_and_their_sites_do_not_count() -> None:
    plan = PruningPlan("llama", 4, {"layers.3.mlp": CUT, "layers.0.mlp": CUT}, (3, 1, 3))
    assert plan.dropped_layers == (1, 3)
    assert plan.kept_layers() == (0, 2)
    assert [name for name, _ in plan.changed()] == ["layers.0.mlp"]
    assert not plan.is_whole
    assert not PruningPlan("llama", 4, {}, (0,)).is_whole
    assert PruningPlan("llama", 4).is_whole


def test_sites_by_layer_number() -> None:
    names = [f"layers.{layer}.mlp" for layer in (10, 2, 0)]
    plan = PruningPlan("llama", 12, dict.fromkeys(names, CUT))
    assert list(plan.sites) == ["layers.0.mlp", "layers.2.mlp", "layers.10.mlp"]
    assert plan.site(2, "mlp") == CUT
    assert plan.site(3, "mlp") is None
    assert split_site_name(site_name(11, "experts")) == (11, "experts")
