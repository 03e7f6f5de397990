"""An in-flight cut equals stop, cut, rebuild, go on: bit by bit."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import tiny_model, tokens
from plans import KINDS, plan_of_kind, random_repairs

from hf_adaprune.optimizer_state import OptimizerFollower
from hf_adaprune.sites import find_sites
from hf_adaprune.surgery import apply_plan


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = tokens(2, 9, seed)
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "qwen3_moe"])
def test_in_flight_equals_rebuilt(family: str, kind: str) -> None:
    live = tiny_model(family)  # in eval mode: dropout would draw other numbers for each model
    plan = plan_of_kind(find_sites(live), kind)
    if plan is None:
        pytest.skip(f"no {kind} in {family}")
    optimizer = torch.optim.AdamW(live.parameters(), lr=1e-2)
    for seed in range(3):
        step(live, optimizer, seed)
    # What a rebuilt run would hold: models whose parameters are the moments, cut by the same plan.
    other = copy.deepcopy(live)
    moments = {}
    for name in ("exp_avg", "exp_avg_sq"):
        holder = copy.deepcopy(live)
        for parameter, ours in zip(live.parameters(), holder.parameters(), strict=True):
            if parameter in optimizer.state:
                ours.data.copy_(optimizer.state[parameter][name])
        moments[name] = dict(apply_plan(find_sites(holder), plan).model.named_parameters())
    repairs = random_repairs(find_sites(live), plan, bias=False)
    follower = OptimizerFollower(optimizer, live)
    apply_plan(find_sites(live), plan, repairs, follower.follow)
    follower.finish()
    apply_plan(find_sites(other), plan, repairs)
    rebuilt = torch.optim.AdamW(other.parameters(), lr=1e-2)
    for (name, parameter), mine in zip(other.named_parameters(), live.parameters(), strict=True):
        if mine in optimizer.state:
            state = {key: values[name].detach().clone() for key, values in moments.items()}
            rebuilt.state[parameter] = {"step": torch.tensor(3.0), **state}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in live.parameters()}
    for seed in range(3, 6):
        step(live, optimizer, seed)
        step(other, rebuilt, seed)
    for (name, mine), theirs in zip(live.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


def test_factored_moments_start_anew() -> None:
    from transformers import Adafactor

    model = tiny_model("llama").train()
    optimizer = Adafactor(model.parameters(), lr=1e-3, relative_step=False)
    step(model, optimizer, 0)
    plan = plan_of_kind(find_sites(model), "channel")
    assert plan is not None
    untouched = model.model.embed_tokens.weight
    follower = OptimizerFollower(optimizer, model)
    apply_plan(find_sites(model), plan, None, follower.follow)
    follower.finish()
    assert model.model.layers[0].mlp.down_proj.weight not in optimizer.state
    assert optimizer.state[untouched]["step"] == 1
    step(model, optimizer, 1)


def test_added_biases_join_the_group_without_decay_in_the_models_order() -> None:
    model = tiny_model("qwen2").train()
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}])
    step(model, optimizer, 0)
    plan = plan_of_kind(find_sites(model), "channel")
    assert plan is not None
    sites = find_sites(model)
    follower = OptimizerFollower(optimizer, model)
    apply_plan(sites, plan, random_repairs(sites, plan), follower.follow)
    follower.finish()
    expected = [id(p) for p in model.parameters() if p.dim() <= 1]
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == expected
    assert len(expected) > len(rest)
    step(model, optimizer, 1)
