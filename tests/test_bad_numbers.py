"""Numbers that are not finite, moments without an inverse, dead units: a sane result, or an error with a name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logits_of, tokens
from conftest import tiny_model as tiny_random_model
from plans import plan_of_kind
from test_pipeline import config_of, passage, tiny_model, tiny_tokenizer
from texts import random_blocks
from torch import nn
from trainings import pruning_config, training

from hf_adaprune import PruningConfig, PruningPlan, TextSource, find_sites, prune, prune_to_disk
from hf_adaprune.compensation import Moments, output_error, repair_from_moments, repair_plan
from hf_adaprune.config import RepairConfig
from hf_adaprune.errors import AdaPruneError, StatisticsError, UnsupportedModelError
from hf_adaprune.evaluation import per_window_top_kl, top_tokens
from hf_adaprune.gram_sums import GramSums, summing_dtype
from hf_adaprune.importance import raw_scores, scored_kinds
from hf_adaprune.metrics import Context
from hf_adaprune.plan import SitePlan
from hf_adaprune.recording import collect_statistics
from hf_adaprune.repairing import lowest
from hf_adaprune.statistics import Needs, Statistics
from hf_adaprune.tracing import mean_hidden_states
from hf_adaprune.training import AdaPrunerCallback

NAN, INF = math.nan, math.inf
LAYER = 1  # where the fault is
DEAD = (3, 7, 20)  # channels


# -- faults -----------------------------------------------------------------------------------------------------------


def _spoil_output(module: nn.Module, value: float) -> None:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[..., 5] = value
        return output

    module.register_forward_hook(hook)


def _spoil_gradient(module: nn.Module, value: float) -> None:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * value)

    module.register_forward_hook(hook)


def activations_are(value: float) -> Callable[[Any], Any]:
    def fault(model: Any) -> Any:
        _spoil_output(model.model.layers[LAYER].mlp.up_proj, value)
        return model

    return fault


def heads_are(value: float) -> Callable[[Any], Any]:
    def fault(model: Any) -> Any:
        _spoil_output(model.model.layers[LAYER].self_attn.v_proj, value)
        return model

    return fault


def last_output_is(value: float) -> Callable[[Any], Any]:
    """Behind everything that pruned units feed: no reader's input shows it."""

    def fault(model: Any) -> Any:
        _spoil_output(model.model.layers[-1].mlp.down_proj, value)
        return model

    return fault


def gradients_are(value: float) -> Callable[[Any], Any]:
    def fault(model: Any) -> Any:
        _spoil_gradient(model.model.layers[LAYER].mlp.down_proj, value)
        return model

    return fault


def float16_overflows(model: Any) -> Any:
    model.half()
    model.model.layers[LAYER].mlp.up_proj.weight.data.mul_(3e4)
    return model


def squares_overflow(model: Any) -> Any:
    """Activations that float32 holds, and their squares that it does not."""
    model.model.layers[LAYER].mlp.up_proj.weight.data.mul_(1e22)
    model.model.layers[LAYER].mlp.down_proj.weight.data.mul_(1e-22)
    return model


def duplicated_columns(model: Any) -> Any:
    mlp = model.model.layers[LAYER].mlp
    for writer in (mlp.gate_proj, mlp.up_proj):
        writer.weight.data[24:] = writer.weight.data[:24]
    return model


def dead_channels(model: Any) -> Any:
    model.model.layers[LAYER].mlp.gate_proj.weight.data[list(DEAD)] = 0
    return model


def dead_readers(model: Any) -> Any:
    model.model.layers[LAYER].mlp.down_proj.weight.data[:, list(DEAD)] = 0
    return model


def dead_mlp(model: Any) -> Any:
    model.model.layers[LAYER].mlp.gate_proj.weight.data.zero_()
    return model


def dead_head_group(model: Any) -> Any:
    model.model.layers[LAYER].self_attn.v_proj.weight.data[12:] = 0
    return model


def dead_heads(model: Any) -> Any:
    model.model.layers[LAYER].self_attn.v_proj.weight.data.zero_()
    return model


def weights_are(value: float) -> Callable[[Any], Any]:
    def fault(model: Any) -> Any:
        model.model.layers[LAYER].mlp.up_proj.weight.data[0, 0] = value
        return model

    return fault


ACTIVATIONS = {
    "NaN activation": activations_are(NAN),
    "inf activation": activations_are(INF),
    "inf in a head": heads_are(INF),
    "NaN behind the last unit": last_output_is(NAN),
    "float16 overflow": float16_overflows,
}
GRADIENTS = {"NaN gradient": gradients_are(NAN), "inf gradient": gradients_are(INF)}
WEIGHTS = {"NaN weight": weights_are(NAN), "inf weight": weights_are(INF)}
HARMLESS = {
    "duplicated columns": duplicated_columns,
    "dead channels": dead_channels,
    "dead columns of the reader": dead_readers,
    "dead MLP": dead_mlp,
    "dead head group": dead_head_group,
    "dead heads": dead_heads,
}
DEAD_UNITS = {
    "dead channels": ("layers.1.mlp", set(DEAD)),
    "dead columns of the reader": ("layers.1.mlp", set(DEAD)),
    "dead head group": ("layers.1.attention", {2, 3}),
}

# -- ways to prune ----------------------------------------------------------------------------------------------------


def in_memory(recipe: str = "default", **changes: Any) -> Callable[[Any, Path], Any]:
    return lambda model, folder: prune(model, tiny_tokenizer(), config_of(recipe, **changes)).plan


def to_disk(recipe: str, **changes: Any) -> Callable[[Any, Path], Any]:
    def way(model: Any, folder: Path) -> Any:
        result = prune_to_disk(model, tiny_tokenizer(), config_of(recipe, **changes), folder / "out")
        return result.plan

    return way


def in_training(model: Any, folder: Path) -> Any:
    callback = AdaPrunerCallback(pruning_config(), mode="once")
    training(folder, callback, model=model, max_steps=1, save_strategy="no", learning_rate=0.0).train()
    return callback.plan


PROSE = TextSource("choice", [passage(seed) for seed in range(60, 90)])
SEARCH = {"trials": 3, "strategy": "random", "selection_tokens": 64, "first_tokens": 64, "final_tokens": 64,
          "sequence_length": 16}  # fmt: skip
FORWARD = {
    "flap": in_memory("flap"),
    "wanda-sp": in_memory("wanda-sp"),
    "shortgpt": in_memory("shortgpt"),
    "obs, no check": in_memory(importance={"metrics": {"obs": 1.0}}, repair={"holdout": 0.0}),
    "to disk, flap": to_disk("flap"),
    "to disk, sequential": to_disk("default"),
    "to disk, wanda-sp": to_disk("wanda-sp"),
    "sequential repair alone": in_memory(
        "magnitude",
        repair={"method": "least_squares", "schedule": "sequential", "min_tokens_per_column": 1.0, "holdout": 0.0},
    ),
}
BACKWARD = {
    "default": in_memory(),
    "llm-pruner": in_memory("llm-pruner", protected_layers=(0,)),
    "adapt-pruner": in_memory("adapt-pruner"),
    "sequential": in_memory(repair={"schedule": "sequential"}),
    "best": in_memory(repair={"schedule": "best"}),
    "layer by layer": in_memory(layer_by_layer=True, importance={"metrics": {"fisher": 1.0}}),
    "regional": in_memory(repair={"regional_steps": 2}),
    "callback": in_training,
}
BLIND = {"magnitude": in_memory("magnitude"), "random": in_memory("random")}
WAYS = {**FORWARD, **BACKWARD, **BLIND}


def attempt(model: Any, way: Callable[[Any, Path], Any], folder: Path) -> Any:
    """A plan, carried out, with finite weights; or the error, with the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    try:
        plan = way(model, folder)
    except AdaPruneError as error:
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) or value.isnan().any() for name, value in before.items())
        assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        assert not list(folder.glob("out*")) and not list(folder.glob(".*"))
        return error
    assert all(torch.isfinite(p).all() for p in model.parameters())
    return plan


def cases(faults: dict[str, Any], ways: dict[str, Any]) -> Any:
    return pytest.mark.parametrize(("fault", "way"), [pytest.param(f, w, id=f"{f}-{w}") for f in faults for w in ways])


COMMON = (
    "default", "flap", "wanda-sp", "adapt-pruner", "sequential", "regional", "callback", "magnitude", "to disk, flap",
    "to disk, sequential",
)  # fmt: skip
PLACES = {
    "NaN activation": r"^layers\.1\.mlp: ",
    "inf activation": r"^layers\.1\.mlp: ",
    "inf in a head": r"^layers\.1\.attention: ",
    "NaN behind the last unit": r"^layers\.2: ",
    "float16 overflow": r"^layers\.1\.mlp: ",
    "NaN gradient": r"^layers\.1\.mlp: |^layers\.1\.attention: ",
    "inf gradient": r"^layers\.1\.mlp: |^layers\.1\.attention: ",
}


@cases(ACTIVATIONS, {**FORWARD, **BACKWARD})
def test_activations_that_are_not_finite_are_refused_where_they_begin(fault: str, way: str, tmp_path: Path) -> None:
    found = attempt(ACTIVATIONS[fault](tiny_model("llama")), WAYS[way], tmp_path)
    assert isinstance(found, StatisticsError), found
    # A walk that has no statistics looks at the sites that it repairs.
    place = r"^layers\.[12]" if way == "sequential repair alone" else PLACES[fault]
    assert re.search(place, str(found)) and "load the model in bfloat16 or float32" in str(found).lower(), found


@cases(GRADIENTS, {**BACKWARD, "flap": 0, "to disk, sequential": 0})
def test_gradients_that_are_not_finite_stop_those_who_read_them(fault: str, way: str, tmp_path: Path) -> None:
    found = attempt(GRADIENTS[fault](tiny_model("llama")), WAYS[way], tmp_path)
    if way in BACKWARD:
        assert isinstance(found, StatisticsError) and re.search(PLACES[fault], str(found)), found
    else:
        assert isinstance(found, PruningPlan)


@cases(WEIGHTS, dict.fromkeys(["default", "flap", "to disk, flap", "callback", "random"]))
def test_weights_that_are_not_finite_are_refused(fault: str, way: str, tmp_path: Path) -> None:
    found = attempt(WEIGHTS[fault](tiny_model("llama")), WAYS[way], tmp_path)
    assert isinstance(found, UnsupportedModelError)
    assert "model.layers.1.mlp.up_proj.weight contains NaN or infinite" in str(found)


@cases(HARMLESS, dict.fromkeys(COMMON))
def test_dead_units_and_equal_ones_are_pruned_like_others(fault: str, way: str, tmp_path: Path) -> None:
    model = HARMLESS[fault](tiny_model("llama"))
    plan = attempt(model, WAYS[way], tmp_path)
    assert isinstance(plan, PruningPlan) and plan.changed()
    assert torch.isfinite(logits_of(model, tokens())).all()
    name, dead = DEAD_UNITS.get(fault, ("", set()))
    if dead and way not in ("magnitude", "to disk, sequential", "regional"):
        cut = dict(plan.changed())
        assert name not in cut or not dead & set(cut[name].kept), "what computes nothing should go first"
        assert name in cut or way in ("wanda-sp", "adapt-pruner"), "they share ratios out before they look at units"


@pytest.mark.parametrize("way", ["flap", "wanda-sp", "default", "obs, no check", "callback", "magnitude"])
def test_squares_that_overflow_name_their_site(way: str, tmp_path: Path) -> None:
    found = attempt(squares_overflow(tiny_model("llama")), WAYS[way], tmp_path)
    assert isinstance(found, StatisticsError) and str(found).startswith("layers.1.mlp: "), found


FEW = {"samples": 2, "sequence_length": 8, "gradient_samples": 2}


@pytest.mark.parametrize("fault", [None, "duplicated columns", "dead MLP", "dead heads"])
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("metric", ["obs", "obs_greedy", "obs_gradient_greedy"])
@pytest.mark.parametrize("schedule", ["cached", "sequential"])
def test_moments_without_an_inverse(fault: str | None, damping: float, metric: str, schedule: str) -> None:
    """Fewer tokens than columns, equal columns and zeros, with and without damping."""
    model = HARMLESS.get(fault or "", lambda own: own)(tiny_model("llama"))
    config = config_of(
        calibration=FEW,
        importance={"metrics": {metric: 1.0}, "damping": damping},
        repair={"damping": damping, "min_tokens_per_column": 0.0, "holdout": 0.0, "schedule": schedule},
    )
    result = prune(model, tiny_tokenizer(), config)
    assert result.pruning_ratio >= 0.25
    assert torch.isfinite(logits_of(model, tokens())).all()
    largest = max(float(p.detach().abs().max()) for p in model.parameters())
    assert largest < 100, "a repair from moments without an inverse should not blow up"


def starved_mixture() -> Any:
    """A mixture whose last expert never gets a token: its logit is the mean of the others', so one is higher."""
    model = tiny_model("mixtral", num_experts_per_tok=1)
    for layer in model.model.layers:
        router = layer.mlp.gate.weight.data
        router[3] = router[:3].mean(0)
    return model


MIXTURE_WAYS = {
    "default": {}, "flap": {}, "wanda-sp": {}, "sequential": {"repair": {"schedule": "sequential"}},
    "obs": {"importance": {"metrics": {"obs": 1.0}}}, "to disk": {},
}  # fmt: skip


@pytest.mark.parametrize("way", MIXTURE_WAYS)
@pytest.mark.parametrize("unit", ["expert", "expert_channel"])
def test_experts_that_got_no_token(way: str, unit: str, tmp_path: Path) -> None:
    model = starved_mixture()
    plan = prunes_experts(model, way, unit, tmp_path)
    if way != "to disk":
        assert torch.isfinite(logits_of(model, tokens())).all()
    for name, kept in plan.changed():
        if unit == "expert" and name.endswith("experts"):
            assert 3 not in kept.kept_groups, "the expert that no token reaches goes first"


def prunes_experts(model: Any, way: str, unit: str, folder: Path) -> PruningPlan:
    recipe = way if way in ("default", "flap", "wanda-sp") else "flap" if way == "to disk" else "default"
    config = config_of(recipe, ratio=0.15, units=(unit, "kv_group"), **MIXTURE_WAYS[way])
    if way == "to disk":
        return prune_to_disk(model, tiny_tokenizer(), config, folder / "out").plan
    return prune(model, tiny_tokenizer(), config).plan


# -- what only one way meets ------------------------------------------------------------------------------------------


def test_training_that_broke_the_weights_is_told_at_the_next_cut(tmp_path: Path) -> None:
    callback = AdaPrunerCallback(PruningConfig.recipe("random", pruning_ratio=0.4), at=(0.0, 0.5))
    trainer = training(tmp_path, callback, learning_rate=1e30, save_strategy="no")
    with pytest.raises(UnsupportedModelError, match=r"contains NaN .* lower learning rate"):
        trainer.train()
    assert callback.plan is not None and len(callback.done) == 1


def test_a_search_tells_the_site_before_any_trial(tmp_path: Path) -> None:
    model = activations_are(INF)(tiny_model("llama"))
    config = config_of(search=SEARCH, calibration={"selection": PROSE})
    with pytest.raises(StatisticsError, match=r"^layers\.1\.mlp: "):
        prune(model, tiny_tokenizer(), config, journal=tmp_path / "journal.jsonl")


def test_a_walk_whose_loss_is_no_number_does_not_win() -> None:
    assert lowest({"sequential": NAN, "cached": 2.0}) == "cached"
    assert lowest({"sequential": INF, "none": NAN}) == "sequential"
    assert lowest({"repaired": 2.0, "pruned": 2.0}) == "repaired"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_repair_that_the_dtype_cannot_hold_is_refused(dtype: torch.dtype) -> None:
    """An output that float16 holds may need weights that it does not."""
    sites = find_sites(tiny_model("llama").to(dtype))
    site = sites.by_name["layers.1.mlp"]
    kept = SitePlan(site.whole.groups, site.whole.group_size, site.whole.kept[1:])
    covariance = torch.eye(site.columns, dtype=torch.float64)
    covariance[0, 0], covariance[1, 1] = 1e20, 1e-10
    covariance[0, 1] = covariance[1, 0] = 1e5
    moments = Moments(covariance, torch.zeros(site.columns, dtype=torch.float64))
    config = replace(config_of().repair, damping=0.0, damping_scale="column")
    if dtype == torch.float16:
        with pytest.raises(StatisticsError, match=r"^layers\.1\.mlp: the repair is not finite in torch\.float16"):
            repair_from_moments(site, kept, moments, config)
    else:
        assert torch.isfinite(repair_from_moments(site, kept, moments, config).weight.to(dtype)).all()
    broken = Moments(torch.full_like(covariance, NAN), moments.mean)
    with pytest.raises(StatisticsError, match=r"^layers\.1\.mlp: moments"):
        repair_from_moments(site, kept, broken, config)


def test_padding_may_hold_anything() -> None:
    """What stands behind the end of a text is not read, and so does not matter."""
    sites = find_sites(last_output_at(tiny_model("llama"), slice(8, None)))
    blocks = random_blocks(4, 11, padding=(3, 3, 3, 3))
    collect_statistics(sites, blocks, Needs(gram=True))
    with pytest.raises(StatisticsError, match=r"^layers\.2: outputs"):
        collect_statistics(sites, random_blocks(4, 11), Needs(gram=True))


def last_output_at(model: Any, positions: slice) -> Any:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, positions] = NAN
        return output

    model.model.layers[-1].mlp.down_proj.register_forward_hook(hook)
    return model


class OnApple(torch.Tensor):
    """A tensor that has no float64 until it is on the CPU; what is computed from it is such a tensor, too."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = super().__torch_function__(func, types, args, kwargs or {})
        if func is torch.Tensor.cpu:
            return found.as_subclass(torch.Tensor)
        if isinstance(found, OnApple) and found.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        return found


def test_no_float64_on_a_device_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model, blocks = tiny_model("llama"), random_blocks(4, 12, padding=(5,))
    sites, dense = find_sites(model), top_tokens(model, blocks, k=8)
    means, divergences = mean_hidden_states(sites, blocks), per_window_top_kl(model, dense, blocks)
    moved = model.get_input_embeddings().register_forward_hook(lambda *seen: seen[-1].as_subclass(OnApple))
    with pytest.raises(TypeError, match="MPS"):
        model.base_model(input_ids=blocks.input_ids).last_hidden_state.double()
    assert torch.equal(mean_hidden_states(sites, blocks), means)
    assert torch.equal(per_window_top_kl(model, dense, blocks), divergences)
    moved.remove()
    # The sums of the repair's check stay on the device, as wide as it has them.
    assert summing_dtype(torch.device("cpu")) == summing_dtype(torch.device("cuda")) == torch.float64
    assert summing_dtype(torch.device("mps")) == torch.float32
    site = sites.by_name["layers.0.mlp"]
    kept, rows = SitePlan(site.groups, site.group_size, tuple(range(5))), torch.randn(7, site.columns)
    wide = output_error(site, kept, None, rows)
    monkeypatch.setattr("hf_adaprune.compensation.summing_dtype", lambda device: torch.float32)
    narrow = output_error(site, kept, None, rows.as_subclass(OnApple))
    assert wide.dtype == torch.float64 and narrow.dtype == torch.float32
    assert float(narrow) == pytest.approx(float(wide), rel=1e-5)


@pytest.mark.parametrize("per_domain", [False, True])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_gram_matrices_on_a_device_without_float64_are_inverted_on_the_cpu(
    family: str, per_domain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = find_sites(tiny_random_model(family))
    blocks, weights = random_blocks(12, 24, domains=2), torch.linspace(0.5, 1.5, 12)
    kinds = scored_kinds(sites, ("channel", "expert_channel", "kv_group"))
    plan = plan_of_kind(sites, "channel" if family == "llama" else "expert_channel")
    assert plan is not None

    def found(statistics: Statistics) -> list[torch.Tensor]:
        scores = [
            raw_scores(sites, kinds, name, Context(statistics, weights)) for name in ("obs", "obs_gradient_greedy")
        ]
        values = [value for own in scores for value in own.values()]
        for dtype, intercept in ((torch.float64, False), (torch.float64, True), (torch.float32, False)):
            config = RepairConfig(intercept=intercept, min_tokens_per_column=0)
            for repair in repair_plan(sites, plan, statistics, weights, config, dtype).values():
                values += [repair.weight] if repair.bias is None else [repair.weight, repair.bias]
        return values

    needs = Needs(gram=True, gradients=True, per_domain=per_domain)
    statistics = collect_statistics(sites, blocks, needs, gradient_samples=12, gram_place="model")
    expected = found(statistics)
    grams = {name: own.gram for name, own in statistics.sites.items() if own.gram is not None}
    moved = {name: replace(statistics.sites[name], gram=gram.as_subclass(OnApple)) for name, gram in grams.items()}
    for room in ("gram_sums", "moments"):
        monkeypatch.setattr(f"hf_adaprune.{room}.summing_dtype", lambda device: torch.float32)
    for one, other in zip(found(replace(statistics, sites=moved)), expected, strict=True):
        assert not isinstance(one, OnApple)
        torch.testing.assert_close(one, other)
    assert GramSums(sites.sites[0], 1, "model").dtype == torch.float32
