"""Estimates: sizes are exact to within a unit, from a config alone, and the rest grows with what it depends on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from texts import calibration_make_tokenizer, calibration_prose
from transformers import LlamaConfig

from hf_adaprune import PruningConfig, TextSource, find_sites, gram_sums, prune, prune_to_disk, search_plan
from hf_adaprune.errors import BudgetError, UnsupportedModelError
from hf_adaprune.estimate import PROPOSAL_SECONDS, Estimate, estimate
from hf_adaprune.layer_scores import forward_only_config
from hf_adaprune.machine_speed import Speed, layer_sizes, measure_speed
from hf_adaprune.plan import PruningPlan, SitePlan
from hf_adaprune.skeleton import bound_skeleton
from hf_adaprune.stages import even_plan

SPEED = Speed(1e9, 1e9, 1e8)
# Wide enough that one unit is less than a hundredth of the model.
WIDE = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_key_value_heads": 4}


BUDGETS = [{"pruning_ratio": 0.35}, {"target_parameters": 250_000}, {"target_bytes": 1_000_000}]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("recipe", ["default", "magnitude", "flap"])
def test_bytes_are_those_after_pruning(recipe: str, budget: dict) -> None:
    model = tiny_model("llama", **WIDE, vocab_size=330)
    text = TextSource("text", [calibration_prose(1, 3000)])
    own = {"sources": (text,), "samples": 12, "sequence_length": 64, "gradient_samples": 2}
    config = PruningConfig.recipe(recipe, calibration=own, **budget)
    expected = estimate(bound_skeleton(model.config), config, SPEED)
    result = prune(model, calibration_make_tokenizer(eos_token="<eos>"), config)
    assert expected.before == result.before
    assert expected.after.bytes == pytest.approx(result.after.bytes, rel=0.01)
    assert expected.after.total == pytest.approx(result.after.total, rel=0.01)
    assert expected.pruning_ratio == pytest.approx(result.pruning_ratio, abs=0.02)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_config_is_enough(family: str) -> None:
    model = tiny_model(family)
    config = PruningConfig(units=("channel", "kv_group", "expert"))
    bare = bound_skeleton(model.config)
    assert all(parameter.is_meta for parameter in bare.model.parameters())
    assert estimate(bare, config, SPEED) == estimate(find_sites(model), config, SPEED)
    assert not even_plan(bare, config).is_whole


def test_gram_matrices_count_where_they_live() -> None:
    sites = bound_skeleton(tiny_model("llama").config)
    config = PruningConfig.recipe("default", calibration={"sequence_length": 8})  # short: the matrices set the peak
    here = estimate(sites, config, SPEED)
    elements = sum(site.columns**2 for site in sites)
    assert here.gram_bytes == 4 * elements
    away = estimate(sites, config.with_changes(gram_place="disk"), SPEED)
    assert away.gram_bytes == here.gram_bytes and away.peak_bytes == here.peak_bytes - here.gram_bytes
    assert estimate(sites, PruningConfig.recipe("magnitude"), SPEED).gram_bytes == 0
    two = {"sources": ("python:prose", "python:code"), "domain_weights": (1.0, 2.0)}
    assert estimate(sites, config.with_changes(calibration=two), SPEED).gram_bytes == 2 * here.gram_bytes


KEPT = [
    ("default", {}),
    ("default", {"gram_place": "disk"}),
    ("default", {"repair": {"schedule": "sequential"}}),
    ("default", {"repair": {"schedule": "best"}}),
    ("default", {"calibration": {"clusters": 3, "domain_weights": (1.0, 2.0, 1.0)}}),
    ("flap", {}),
    ("llm-pruner", {"protected_layers": ()}),
    ("magnitude", {}),
    ("flap", {"repair": {"method": "least_squares", "regional_steps": 1}}),
]


def kept_config(recipe: str, **changes: object) -> PruningConfig:
    text, report = TextSource("text", [calibration_prose(1, 8000)]), TextSource("report", [calibration_prose(2, 600)])
    own = {"sources": (text,), "samples": 32, "sequence_length": 64, "gradient_samples": 8}
    own |= {"report": (report,), "evaluation_tokens": 256, "evaluation_length": 64}
    return PruningConfig.recipe(recipe, calibration=own).with_changes(**changes)


def tensor_bytes(folder: Path) -> int:
    """Bytes of the tensors in all files of a folder; notes and headers are small, whatever they are of."""
    files = [file.read_bytes() for file in folder.rglob("*.safetensors")]
    return sum(len(data) - 8 - int.from_bytes(data[:8], "little") for data in files)


@pytest.mark.parametrize(("recipe", "changes"), KEPT)
def test_the_disk_of_a_run_is_stated(
    recipe: str, changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram_sums, "STRIP", 8)
    model, config = tiny_model("llama", **WIDE, vocab_size=330), kept_config(recipe, **changes)
    expected = estimate(find_sites(model), config, SPEED, is_kept=True)
    assert estimate(find_sites(model), config, SPEED).run_bytes == 0
    assert expected.output_bytes == expected.after.bytes
    prune(model, calibration_make_tokenizer(eos_token="<eos>"), config, run_dir=tmp_path / "run")
    # Held-out windows are counted as calibration, repairs with the columns that went, and for matrices on disk the
    # largest site twice, as it is at the end of a pass.
    most = 1.8 if config.gram_place == "disk" else 1.3
    assert 0.95 < expected.run_bytes / tensor_bytes(tmp_path / "run") < most


@pytest.mark.parametrize("search", [{"ratios": (0.1, 0.3)}, {"pareto": "bytes"}])
def test_a_search_that_hands_back_plans_writes_no_checkpoint(search: dict, tmp_path: Path) -> None:
    model = tiny_model("llama", intermediate_size=20_000)
    config = PruningConfig.recipe(
        "default", pruning_ratio=0.3, search={"trials": 2, **search}, calibration={"sources": "a.txt", "selection": "b"}
    )
    expected = estimate(find_sites(model), config, SPEED)
    sites = {site.name: SitePlan(site.groups, site.group_size, tuple(range(0, site.groups * site.group_size, 2)))
             for site in find_sites(model) if site.kind == "mlp"}  # fmt: skip
    PruningPlan("llama", len(sites), sites).save(
        tmp_path / "plan.json"
    )  # no two units side by side: the longest there is
    assert 2 * (tmp_path / "plan.json").stat().st_size < expected.output_bytes < expected.after.bytes


@pytest.mark.parametrize("recipe", ["default", "flap"])
def test_the_disk_of_a_walk_is_stated(recipe: str, tmp_path: Path) -> None:
    model = tiny_model("llama", **WIDE, vocab_size=330)
    model.save_pretrained(tmp_path / "dense")
    config = forward_only_config(kept_config(recipe, layer_by_layer=True, activation_bytes=2**18))
    expected = estimate(bound_skeleton(model.config), config, SPEED, is_kept=True)
    assert expected.output_bytes > expected.before.bytes
    tokenizer = calibration_make_tokenizer(eos_token="<eos>")
    prune_to_disk(str(tmp_path / "dense"), tokenizer, config, tmp_path / "out", run_dir=tmp_path / "run")
    assert 0.95 < expected.run_bytes / tensor_bytes(tmp_path / "run") < 1.6  # nearly all of it is repairs


def test_the_disk_of_a_search_is_stated(tmp_path: Path) -> None:
    model = tiny_model("llama", **WIDE, vocab_size=330)
    sources = tuple(TextSource(f"text {number}", [calibration_prose(number, 8000)]) for number in (1, 4))
    search = {"trials": 3, "strategy": "random", "selection_tokens": 128, "first_tokens": 64, "final_tokens": 96}
    config = kept_config("default", search={**search, "sequence_length": 32, "initial": 2})
    selection = TextSource("selection", [calibration_prose(3, 2000)])
    config = config.with_changes(calibration={"sources": sources, "selection": (selection,), "report": ()})
    expected = estimate(find_sites(model), config, SPEED, is_kept=True)
    search_plan(model, calibration_make_tokenizer(eos_token="<eos>"), config, run_dir=tmp_path / "run")
    assert 0.95 < expected.run_bytes / tensor_bytes(tmp_path / "run") < 1.3


def test_more_work_takes_longer() -> None:
    sites = bound_skeleton(tiny_model("llama").config)
    config = PruningConfig.recipe("default")
    once = estimate(sites, config, SPEED)
    twice = estimate(sites, config.with_changes(calibration={"samples": 512}), SPEED)
    assert twice.seconds > once.seconds and twice.calibration_flops > 1.3 * once.calibration_flops
    assert estimate(sites, config, Speed(2e9, 2e9, 2e8)).seconds == pytest.approx(once.seconds / 2)
    reported = estimate(sites, config.with_changes(calibration={"report": ("python:prose",)}), SPEED)
    assert reported.report_flops > 0 == once.report_flops
    assert "peak memory" in str(once) and once.to_dict()["pruning_ratio"] == once.pruning_ratio


def test_proposals_take_time_once_a_model_is_fitted() -> None:
    sites = bound_skeleton(tiny_model("llama").config)

    def of(**search: object) -> Estimate:
        calibration = {"selection": ("python:prose",)}
        return estimate(sites, PruningConfig.recipe("default", calibration=calibration, search=search), SPEED)

    drawn, fitted = of(trials=60, strategy="sobol"), of(trials=60, initial=10)
    assert drawn.proposal_seconds == 0 == of(trials=10, initial=10).proposal_seconds
    assert fitted.proposal_seconds == 50 * PROPOSAL_SECONDS
    assert fitted.seconds == pytest.approx(drawn.seconds + fitted.proposal_seconds)
    assert of(trials=60, strategy=("sobol:20", "gp:40")).proposal_seconds == 30 * PROPOSAL_SECONDS
    assert of(trials=60, surrogate="saas").proposal_seconds == 10 * fitted.proposal_seconds
    assert "proposals, roughly" in str(fitted) and "proposals" not in str(drawn)


def test_a_search_counts_what_trials_read_and_hold() -> None:
    def of(dtype: torch.dtype = torch.bfloat16, **search: object) -> Estimate:
        model = tiny_model("llama", vocab_size=4096, intermediate_size=512).to(dtype)
        calibration = {"sources": "a.txt", "selection": "b.txt"}
        asked = {"selection_tokens": 24576, "first_tokens": 6144, "strategy": "random", "trials": 8, **search}
        return estimate(
            find_sites(model), PruningConfig.recipe("default", calibration=calibration, search=asked), SPEED
        )

    plain, whole = of(), of(first_tokens=24576)
    # Most trials see their first text alone; all of them score and repair.
    assert of(selection_tokens=6144).search_flops < plain.search_flops < whole.search_flops
    assert plain.search_flops < of(trials=16).search_flops < 2 * plain.search_flops + 1
    # Every candidate has widths of its own, and oneDNN keeps what it compiled for them, up to a number.
    more, most = of(trials=16), of(trials=10_000)
    assert plain.peak_bytes < more.peak_bytes < most.peak_bytes == of(trials=20_000).peak_bytes
    assert of(torch.float32).peak_bytes == of(torch.float32, trials=16).peak_bytes
    # Rows of multiple choice are not read in batches of 2,048 tokens.
    assert of(objective="accuracy", tasks=("rows.jsonl",)).peak_bytes < plain.peak_bytes


def test_refused_as_the_run_would_be() -> None:
    model = tiny_model("llama")
    with pytest.raises(BudgetError):
        estimate(bound_skeleton(model.config), PruningConfig(pruning_ratio=0.99), SPEED)
    with pytest.raises(UnsupportedModelError, match="No architecture"):
        from transformers import GPTJConfig

        bound_skeleton(GPTJConfig(vocab_size=96, n_embd=16, n_layer=1, n_head=2, rotary_dim=4))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_speed_is_measured_on_the_widths_of_any_family(family: str) -> None:
    sites, before = bound_skeleton(tiny_model(family).config), torch.get_rng_state()
    speed = measure_speed(sites, 8, seconds=0.0)
    assert min(speed.model, speed.gram, speed.double) > 0
    assert torch.equal(torch.get_rng_state(), before)


# hidden size, channels, heads, KV heads, head size: of Llama 3.2 3B, Qwen3 14B, Mistral Nemo, and 405 B.
@pytest.mark.parametrize(
    "shape",
    [(3072, 8192, 24, 8, 128), (5120, 17408, 40, 8, 128), (5120, 14336, 32, 8, 128), (16384, 53248, 128, 8, 128)],
)
def test_what_is_timed_stays_small_for_large_models(shape: tuple[int, ...]) -> None:
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    config = LlamaConfig(num_hidden_layers=2, vocab_size=64, **dict(zip(names, shape, strict=True)))
    sizes = layer_sizes(bound_skeleton(config, torch.bfloat16))
    LlamaConfig(**sizes)  # which refuses what does not go together
    assert 900 < sizes["hidden_size"] < 1200 and sizes["head_dim"] == 128
    wide = sizes["intermediate_size"] / sizes["hidden_size"]
    assert wide == pytest.approx(shape[1] / shape[0], rel=0.1)


@given(heads=st.integers(1, 40), groups=st.integers(1, 8), hidden=st.integers(16, 4096))
def test_any_heads_can_be_timed(heads: int, groups: int, hidden: int) -> None:
    site = SimpleNamespace(kind="attention", columns=heads * groups * 6, columns_per_unit=6, groups=groups,
                           group_size=heads, outputs=hidden)  # fmt: skip
    sizes = layer_sizes([site])
    LlamaConfig(**sizes)
    assert sizes["num_attention_heads"] % sizes["num_key_value_heads"] == 0 < sizes["intermediate_size"]


def test_sites_of_one_kind_can_be_timed() -> None:
    site = SimpleNamespace(kind="mlp", columns=96, columns_per_unit=1, groups=1, group_size=96, outputs=100)
    assert layer_sizes([site]) == {"hidden_size": 100, "intermediate_size": 96, "num_attention_heads": 2,
                                   "num_key_value_heads": 2, "head_dim": 64}  # fmt: skip


def test_repairs_and_their_checks_take_time() -> None:
    sites = bound_skeleton(tiny_model("llama").config)
    plain = PruningConfig.recipe("default", calibration={"samples": 64})

    def repair(recipe: str = "default", **own: object) -> float:
        config = PruningConfig.recipe(recipe, calibration={"samples": 64})
        return estimate(sites, config.with_changes(repair=own), SPEED).repair_flops

    bare, checked = repair(holdout=0.0), repair()
    assert bare < checked < repair(regional_steps=8) < repair(regional_steps=16)
    assert repair(schedule="sequential") < repair(schedule="best")
    assert repair(schedule="sequential", target_mix=0.0) < repair(schedule="sequential")
    # A walk sums nothing of sites that stay.
    walk = plain.with_changes(repair={"schedule": "sequential"}, pruning_ratio=0.1)
    narrow = walk.with_changes(units=("channel",))
    assert estimate(sites, narrow, SPEED).repair_flops < estimate(sites, walk, SPEED).repair_flops
    assert repair("flap", holdout=0.0) == 0 < repair("flap")
    # Held-out windows do not calibrate.
    held, whole = estimate(sites, plain, SPEED), estimate(sites, plain.with_changes(repair={"holdout": 0.0}), SPEED)
    assert held.calibration_flops < whole.calibration_flops


def test_a_search_that_hands_back_plans_repairs_none() -> None:
    sites = bound_skeleton(tiny_model("llama").config)

    def of(**search: object) -> Estimate:
        calibration = {"sources": ("a.txt", "b.txt"), "selection": "c.txt", "samples": 64}
        return estimate(sites, PruningConfig.recipe("default", calibration=calibration, search=search), SPEED)

    assert of(trials=4, ratios=(0.2, 0.3)).repair_flops < of(trials=4).repair_flops
    # Windows that are drawn anew with the winner's weights are the search's work.
    drawn, kept = of(trials=4, redraw=True), of(trials=4)
    assert drawn.calibration_flops == kept.calibration_flops
    assert drawn.search_flops == pytest.approx(kept.search_flops + kept.calibration_flops)


def test_a_token_adds_to_the_matrices_of_its_own_experts() -> None:
    config = PruningConfig.recipe("default", units=("expert_channel",), calibration={"sequence_length": 8})
    few, many = (
        estimate(bound_skeleton(tiny_model("mixtral", num_local_experts=count).config), config, SPEED)
        for count in (4, 8)
    )
    assert many.gram_bytes > few.gram_bytes and many.calibration_flops == few.calibration_flops
