"""One layer in memory at a time gives the same plan and weights as the whole model, and leaves nothing else behind."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import logits_of, tiny_model, tokens
from test_pipeline import TEXT, config_of, passage, tiny_tokenizer
from test_pipeline import tiny_model as text_model
from test_runs import killed_at_news
from texts import random_blocks
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_adaprune import (
    PruningConfig,
    PruningPlan,
    StreamedResult,
    TextSource,
    find_sites,
    layer_scores,
    layer_writing,
    layerwise,
    prune,
    prune_to_disk,
    shards,
    streamed,
)
from hf_adaprune.activations import Activations, ActivationStore
from hf_adaprune.errors import CheckpointError, ConfigError, RunError, UnsupportedModelError
from hf_adaprune.evaluation import per_window_loss, run_layers
from hf_adaprune.footprint import activation_bytes, peak_by_layer
from hf_adaprune.layer_scores import forward_only_config
from hf_adaprune.offloading import is_offloaded, layer_weights, load_offloaded
from hf_adaprune.run_folder import locked_output
from hf_adaprune.sites import ModelSites
from hf_adaprune.skeleton import bound_skeleton
from hf_adaprune.statistics import Needs
from hf_adaprune.streaming import HiddenStream

SEQUENTIAL = {"method": "least_squares", "schedule": "sequential", "min_tokens_per_column": 1.0, "holdout": 0.25}
UNITS = ("channel", "kv_group", "expert_channel")


def offloaded(folder: Path, family: str = "llama", **changes: object) -> PreTrainedModel:
    """A tiny model that was saved and opened again with its layers left on disk."""
    return in_pieces(folder, text_model(family, **changes))


def in_pieces(folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    model.save_pretrained(folder / "dense")
    sites = bound_skeleton(model.config)
    return load_offloaded(folder / "dense", sites, folder / "offload", dtype=torch.float32)


def small(recipe: str = "flap", **changes: object) -> PruningConfig:
    repair = changes.pop("repair", SEQUENTIAL)
    return config_of(recipe, repair=repair, units=changes.pop("units", UNITS), **changes)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def assert_same_weights(first: Path, second: Path) -> None:
    one, other = weights_of(first), weights_of(second)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def untouched(model: PreTrainedModel) -> None:
    for number, layer in enumerate(find_sites(model).layers):
        assert all(parameter.is_meta and parameter.requires_grad for parameter in layer.parameters()), number
        with layer_weights(find_sites(model), number):
            assert not any(parameter.is_meta for parameter in layer.parameters())
    assert is_offloaded(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.isfinite(logits_of(model, tokens())).all()  # accelerate still brings every layer in


# -- the same numbers -------------------------------------------------------------------------------------------------

CASES = {
    "gemma2": {},
    "gpt2": {"units": ("channel",)},
    "llama": {},
    "mixtral": {"units": ("expert",), "ratio": 0.1},
    "phi3": {},
    "qwen2": {},
    "qwen3_moe": {},
}


@pytest.mark.parametrize("family", sorted(CASES))
def test_same_plan_and_weights_as_in_memory(family: str, tmp_path: Path) -> None:
    config = small(**CASES[family])
    model = text_model(family)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    pieces = offloaded(tmp_path, family)
    assert all(torch.equal(dense[name], value) for name, value in pieces.state_dict().items() if not value.is_meta)
    here = prune(model, tiny_tokenizer(), config)
    here.save_pretrained(tmp_path / "memory")
    there = prune_to_disk(pieces, tiny_tokenizer(), config, tmp_path / "disk", max_shard_size=20_000)
    assert there.plan == here.plan and not there.plan.is_whole
    assert (there.before, there.after) == (here.before, here.after)
    assert there.repair_schedule == here.repair_schedule
    assert len(list((tmp_path / "disk").glob("model-*.safetensors"))) > 2
    assert_same_weights(tmp_path / "memory", tmp_path / "disk")
    written = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("memory", "disk")]
    for data in written:
        data.pop("_name_or_path", None)
    assert written[0] == written[1]
    untouched(pieces)


def test_experts_without_a_repair_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small(units=("expert_channel",), repair={"method": "bias"})
    prune(text_model("mixtral"), tiny_tokenizer(), config)
    sites = "layers.0.experts, layers.1.experts, layers.2.experts"
    told = f"3 of 3 cut sites stay unrepaired, their experts have no bias: {sites}."
    assert caplog.text.count(told) == 1
    prune_to_disk(offloaded(tmp_path, "mixtral"), tiny_tokenizer(), config, tmp_path / "disk")
    assert caplog.text.count(told) == 2
    prune(text_model("mixtral"), tiny_tokenizer(), small(units=("expert_channel",)))
    assert caplog.text.count("unrepaired") == 2


TWO = (TEXT, TextSource("b", [passage(99) * 9]))


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("default", {"importance": {"metrics": {"obs_greedy": 1.0}, "normalization": "none"}}),
        ("flap", {"repair": {**SEQUENTIAL, "target_mix": 0.5, "intercept": True, "holdout": 0.0}}),
        ("flap", {"repair": {"method": "bias", "holdout": 0.25}}),
        ("flap", {"calibration": {"sources": TWO, "domain_weights": (1.0, 3.0)}}),
        ("shortgpt", {"units": ("layer",), "repair": {**SEQUENTIAL, "holdout": 0.0}, "ratio": 0.3}),
        ("wanda-sp", {"allocation": {"method": "similarity", "steps": 2}, "repair": {"method": "none"}}),
        ("shortgpt", {"units": ("layer", "channel"), "allocation": {"steps": 3}, "repair": {"method": "none"}}),
        ("magnitude", {"uniform": True, "repair": {"method": "none"}}),
    ],
    ids=lambda value: json.dumps(value, default=str)[:60],
)
def test_same_numbers_for_every_way(recipe: str, changes: dict, tmp_path: Path) -> None:
    config = small(recipe, **changes)
    pieces = offloaded(tmp_path, num_hidden_layers=4)
    here = prune(text_model("llama", num_hidden_layers=4), tiny_tokenizer(), config)
    here.save_pretrained(tmp_path / "memory")
    there = prune_to_disk(pieces, tiny_tokenizer(), config, tmp_path / "disk")
    assert there.plan == here.plan and not there.plan.is_whole
    assert there.repairs == here.repairs and there.repair_schedule == here.repair_schedule
    assert_same_weights(tmp_path / "memory", tmp_path / "disk")


def test_spilled_activations_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, spilled = offloaded(tmp_path), []
    place = ActivationStore.place
    monkeypatch.setattr(ActivationStore, "place", lambda self: spilled.append(place(self)) or spilled[-1])
    report = TextSource("held back", [passage(1000 + seed) for seed in range(8)])
    calibration = {"report": report, "evaluation_tokens": 64, "evaluation_length": 16}
    found = {}
    for budget in (2**29, 3000, 0):
        config = small(calibration=calibration, activation_bytes=budget)
        found[budget] = prune_to_disk(pieces, tiny_tokenizer(), config, tmp_path / str(budget))
        assert bool(spilled) == (budget < 2**29)
    for budget in (3000, 0):
        assert found[budget].plan == found[2**29].plan and found[budget].evaluation == found[2**29].evaluation
        assert_same_weights(tmp_path / str(2**29), tmp_path / str(budget))
    assert not any(path.exists() for path in spilled)
    assert not list(tmp_path.glob(".*"))


def test_report_text_is_measured_on_the_way(tmp_path: Path) -> None:
    report = TextSource("held back", [passage(1000 + seed) for seed in range(8)])
    config = small(calibration={"report": report, "evaluation_tokens": 70, "evaluation_length": 16})
    here = prune(text_model("llama"), tiny_tokenizer(), config).evaluation["held back"]
    pieces = offloaded(tmp_path)
    there = prune_to_disk(pieces, tiny_tokenizer(), config, tmp_path / "disk").evaluation["held back"]
    assert there["dense"] == here["dense"]
    assert there["pruned"].value == pytest.approx(here["pruned"].value, rel=1e-5)
    assert there["pruned"].value != there["dense"].value


def test_a_repair_that_does_not_help_is_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = offloaded(tmp_path)
    report = TextSource("held back", [passage(1000 + seed) for seed in range(8)])
    calibration = {"report": report, "evaluation_tokens": 64, "evaluation_length": 16}
    config = small(calibration=calibration)
    with monkeypatch.context() as patch:
        patch.setattr(layer_writing._Windows, "loss", lambda self: 1.0 if self.how == "repaired" else 0.0)
        dropped = prune_to_disk(pieces, tiny_tokenizer(), config, tmp_path / "b", max_shard_size=9000)
    config = config.with_changes(repair={"method": "none", "schedule": "cached"})
    none = prune_to_disk(pieces, tiny_tokenizer(), config, tmp_path / "a", plan=dropped.plan)
    assert dropped.repair_schedule == "none" and dropped.evaluation == none.evaluation
    assert_same_weights(tmp_path / "a", tmp_path / "b")


@torch.no_grad()
def test_a_stream_through_all_layers_is_the_model(family: str) -> None:
    model = tiny_model(family)
    sites = find_sites(model)
    blocks = random_blocks(5, 11, padding=(3, 1))
    expected = per_window_loss(model, blocks)
    stream = HiddenStream(sites)
    for number in range(len(sites.layers)):
        with stream.at(number, "nothing"):
            run_layers(model, blocks)
        with stream.at(number):
            run_layers(model, blocks)
    with stream.at(len(sites.layers), "nothing"):
        assert torch.equal(per_window_loss(model, blocks), expected)
    assert "forward" not in {name for layer in sites.layers for name in vars(layer)}


def test_a_model_in_memory_or_named_is_pruned_to_disk_too(tmp_path: Path) -> None:
    model = text_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prune_to_disk(model, tiny_tokenizer(), small(), tmp_path / "a")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    result = prune_to_disk(tmp_path / "dense", config=small(), output_dir=tmp_path / "b")
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert PruningPlan.load(tmp_path / "b" / "pruning_plan.json") == result.plan
    again = type(tiny_tokenizer()).from_pretrained(tmp_path / "b")
    assert again.encode("a river") == tiny_tokenizer().encode("a river")
    data = json.loads((tmp_path / "b" / "pruning_config.json").read_text())
    assert data["after"]["total"] == result.after.total and data["config"]["layer_by_layer"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "dense"]
    with pytest.raises(CheckpointError, match="already"):
        result.save_pretrained(tmp_path / "c")


# -- nothing is left behind -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "stop"),
    [
        (streamed, "gather_texts"),
        (streamed, "decide_by"),
        (layer_writing, "cut_layer"),
        (streamed, "check_shards"),
        (streamed, "write_records"),
        (layer_writing, "check_repairs"),
    ],
)
def test_an_exception_leaves_nothing(
    room: ModuleType, stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = offloaded(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    calls = []

    def fails(*args: object, **kwargs: object) -> None:
        calls.append(sorted(path.name for path in tmp_path.iterdir()))
        raise KeyboardInterrupt

    monkeypatch.setattr(room, stop, fails)
    repair = {"method": "bias", "holdout": 0.25} if stop == "check_repairs" else SEQUENTIAL
    with pytest.raises(KeyboardInterrupt):
        prune_to_disk(pieces, tiny_tokenizer(), small(repair=repair, activation_bytes=0), tmp_path / "out")
    assert calls and calls[0] != before  # there was something to leave behind
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    untouched(pieces)


def test_the_plan_is_saved_before_the_repair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    pieces = offloaded(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(layer_writing, "repairs_by_layer", fails)
        with pytest.raises(KeyboardInterrupt):
            prune_to_disk(pieces, tiny_tokenizer(), small(), tmp_path / "a", plan_path=tmp_path / "plan.json")
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert prune_to_disk(pieces, tiny_tokenizer(), small(), tmp_path / "a", plan=plan).plan == plan
    assert prune_to_disk(pieces, tiny_tokenizer(), small(), tmp_path / "b").plan == plan
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_a_checkpoint_that_does_not_reload_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = offloaded(tmp_path)
    add = shards.ShardWriter.add

    def spoiled(self: object, tensors: dict) -> None:
        add(
            self,
            {name: value * 2 if name.endswith("1.mlp.down_proj.weight") else value for name, value in tensors.items()},
        )

    monkeypatch.setattr(shards.ShardWriter, "add", spoiled)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight differs"):
        prune_to_disk(pieces, tiny_tokenizer(), small(), tmp_path / "out")
    monkeypatch.setattr(
        shards.ShardWriter,
        "add",
        lambda self, found: add(self, {n: t for n, t in found.items() if "0.mlp.up" not in n}),
    )
    with pytest.raises(CheckpointError, match="up_proj"):
        prune_to_disk(pieces, tiny_tokenizer(), small(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "offload"]


def test_a_full_disk_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = offloaded(tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(CheckpointError, match=r"1 MiB free; the checkpoint and .* of activations"):
        prune_to_disk(pieces, tiny_tokenizer(), small(activation_bytes=0), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "offload"]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_prune_names_the_function_for_offloaded_models(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="prune_to_disk"):
        prune(offloaded(tmp_path), tiny_tokenizer(), small())


def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    model = text_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    for plan in (None, PruningPlan("llama", 3)):
        with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight contains NaN"):
            prune_to_disk(tmp_path / "dense", tiny_tokenizer(), small(), tmp_path / "out", plan=plan)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"importance": {"metrics": {"fisher": 1.0}}}, "no backward pass"),
        ({"repair": {**SEQUENTIAL, "regional_steps": 2}}, "regional_steps"),
        ({"calibration": {"clusters": 2}}, "clusters"),
        ({"calibration": {"sources": "self"}}, "self"),
        ({"budgets": {"decode_tokens_per_second": 5.0}}, "a speed"),
        ({"search": {}}, "search"),
    ],
)
def test_what_needs_the_whole_model_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        forward_only_config(small(**changes))


def test_metrics_that_go_backward_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    both = {"metrics": {"fisher": 1.0, "wifv": 1.0}, "normalization": "mean"}
    assert forward_only_config(small(importance=both)).importance.metrics == {"wifv": 1.0}
    assert "without fisher" in caplog.text
    own = forward_only_config(PruningConfig.recipe("default"))
    assert own.importance == PruningConfig.recipe("flap").importance and own.repair.method == "least_squares"
    assert "as the recipe flap does" in caplog.text
    assert forward_only_config(own) == own


# -- memory -----------------------------------------------------------------------------------------------------------


def test_activations_keep_to_their_budget(tmp_path: Path) -> None:
    store = ActivationStore(100, tmp_path)
    first, second = Activations(store), Activations(store)
    windows = [torch.arange(10.0) + number for number in range(4)]
    for window in windows:
        first.append(window)
        second.append(window[None].expand(2, 10)[0])
    assert store.used == 80 and len(list(tmp_path.rglob("*.safetensors"))) == 6
    second[1] = windows[0]
    first[0] = windows[3]
    assert [float(window[0]) for window in first] == [3, 1, 2, 3]
    assert [float(window[0]) for window in second] == [0, 0, 2, 3]
    first.close()
    second.close()
    assert store.used == 0 and not list(tmp_path.rglob("*.safetensors"))


def test_the_stated_peak_does_not_grow_with_depth() -> None:
    shape = {"hidden_size": 64, "intermediate_size": 512, "head_dim": 16}
    config = forward_only_config(small())
    stated = {
        depth: peak_by_layer(
            bound_skeleton(tiny_model("llama", **shape, num_hidden_layers=depth).config), config, 2**16
        )
        for depth in (3, 6)
    }
    assert stated[3] == stated[6]
    sites = bound_skeleton(tiny_model("llama").config)
    more = config.with_changes(calibration={"samples": 1000})
    assert peak_by_layer(sites, more) > peak_by_layer(sites, config)
    # Beyond the budget, windows cost disk and no memory but what is kept per window.
    tight = more.with_changes(activation_bytes=0)
    assert peak_by_layer(sites, more) - peak_by_layer(sites, tight) == activation_bytes(sites, more) > 0


# -- runs that die ----------------------------------------------------------------------------------------------------

DYING = {
    "sequential": ("llama", {"calibration": {"report": TextSource("report", [passage(301)])}}),
    "experts": ("mixtral", {"units": ("expert",), "ratio": 0.1}),
    "bias, held out": ("qwen2", {"recipe": "flap", "repair": {"method": "bias", "holdout": 0.25}}),
    "rounds": ("llama", {"allocation": {"steps": 2}, "activation_bytes": 0}),
}


@pytest.mark.parametrize("way", DYING)
def test_killed_anywhere_and_started_again_equals_uninterrupted(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, changes = DYING[way]
    config, pieces = small(**changes), offloaded(tmp_path, family)

    def run(name: str, place: Path | None) -> StreamedResult:
        return prune_to_disk(pieces, tiny_tokenizer(), config, tmp_path / name, max_shard_size=20_000, run_dir=place)

    wanted = run("whole", None)
    seen: set[str] = set()
    while killed_at_news(monkeypatch, seen, lambda: run("parts", tmp_path / "run")):
        assert len(seen) < 40 and not list(tmp_path.glob("parts*"))
    assert {"pool", "rounds/dense", "layers/dense/0000", "layers/dense/0002", "weights/0002"} <= seen
    shutil.rmtree(tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(streamed, "score_layers", lambda *args: pytest.fail("measured again"))
        patch.setattr(layerwise, "_repairs_of", lambda *args: pytest.fail("solved again"))
        again = run("parts", tmp_path / "run")
    assert json.dumps({**again.to_dict(), "seconds": 0}) == json.dumps({**wanted.to_dict(), "seconds": 0})
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "parts").iterdir())
    for name in names:
        own, other = ((tmp_path / folder / name).read_bytes() for folder in ("parts", "whole"))
        assert own == other or name == "pruning_config.json", name
    untouched(pieces)


def test_layers_that_are_scored_are_only_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, needs = offloaded(tmp_path, "llama"), []
    real = layer_scores.collect_statistics

    def collect(sites: ModelSites, blocks: object, asked: Needs, **options: object) -> object:
        needs.append(asked)
        return real(sites, blocks, asked, **options)

    monkeypatch.setattr(layer_scores, "collect_statistics", collect)
    run = functools.partial(prune_to_disk, pieces, tiny_tokenizer(), small(), tmp_path / "a", run_dir=tmp_path / "r")
    assert killed_at_news(monkeypatch, {"pool", "weights/0000", "layers/dense/0000", "weights/0001"}, run)
    assert len(needs) == 2 and needs[0] == needs[1] != Needs()
    needs.clear()
    run()
    assert needs[:2] == [Needs()] * 2 and needs[2] != Needs()


def test_a_changed_layer_is_named(tmp_path: Path) -> None:
    pieces = offloaded(tmp_path, "llama")
    prune_to_disk(pieces, tiny_tokenizer(), small(), tmp_path / "a", run_dir=tmp_path / "run")
    model = text_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    other = in_pieces(tmp_path / "other", model)
    with pytest.raises(RunError, match="something else: weights of layer 1"):
        prune_to_disk(other, tiny_tokenizer(), small(), tmp_path / "b", run_dir=tmp_path / "run")
    other = in_pieces(tmp_path / "turned", text_model("llama"))
    other.config.rope_parameters["rope_theta"] = 100.0  # type: ignore[index]
    with pytest.raises(RunError, match=r"rope_theta 10000\.0 -> 100\.0"):
        prune_to_disk(other, tiny_tokenizer(), small(), tmp_path / "b", run_dir=tmp_path / "run")
    with pytest.raises(RunError, match="units"):
        config = small(units=("channel",))
        prune_to_disk(pieces, tiny_tokenizer(), config, tmp_path / "b", run_dir=tmp_path / "run")
    assert not (tmp_path / "b").exists()


def test_an_output_in_use_is_refused(tmp_path: Path) -> None:
    pieces, refused = offloaded(tmp_path, "llama"), []

    def other() -> None:
        try:
            prune_to_disk(pieces, tiny_tokenizer(), small(), tmp_path / "out")
        except RunError as error:
            refused.append(str(error))

    with locked_output(tmp_path / "out"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(refused) == 1 and "is writing to" in refused[0]


@pytest.mark.parametrize("repair", [{"method": "bias", "holdout": 0.25}, SEQUENTIAL], ids=["bias", "sequential"])
def test_a_domain_of_weight_0_decides_nothing(repair: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[dict[str, float]] = []
    monkeypatch.setattr(layer_writing, "lowest", lambda found: losses.append(dict(found)) or "repaired")
    results = []
    for name, seeds in (("a", range(100, 160)), ("b", range(200, 260))):
        other = TextSource("other", [passage(seed)[::-1] for seed in seeds])
        own = {"sources": [TEXT, other], "domain_weights": (1.0, 0.0)}
        config = small(calibration=own, repair={"min_tokens_per_column": 0.0, **repair})
        results.append(prune_to_disk(text_model("llama"), tiny_tokenizer(), config, tmp_path / name))
    assert results[0].repairs == results[1].repairs and losses[:1] == losses[1:]
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_the_run_lies_beside_the_output(tmp_path: Path) -> None:
    for run_dir in (tmp_path / "out", tmp_path / "out" / "run", tmp_path):
        with pytest.raises(ConfigError, match="Name a place beside it"):
            prune_to_disk(tiny_model("llama"), tiny_tokenizer(), None, tmp_path / "out", run_dir=run_dir)
    assert not (tmp_path / "out").exists()
