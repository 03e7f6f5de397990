"""Pruned models whose layers differ go through torch.compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import logits_of, tokens
from plans import mixed_cut, plan_of_kind
from transformers import AutoModelForCausalLM

from hf_adaprune.sites import ModelSites
from hf_adaprune.surgery import apply_plan

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("form", ["adaptive", "mixed"])
def test_compiled_equals_eager(sites: ModelSites, form: str, tmp_path: Path) -> None:
    """Tracing is what layers of different sizes could break; the code that inductor makes of it is not ours."""
    if form == "mixed":
        plan, repairs = mixed_cut(sites)
    else:
        found = plan_of_kind(sites, "channel") or plan_of_kind(sites, "expert_channel")
        assert found is not None
        plan, repairs = found, {}
    model = apply_plan(sites, plan, repairs).model
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch._dynamo.reset()
    compiled = torch.compile(loaded, backend="eager")
    assert torch.allclose(logits_of(compiled, tokens()), logits_of(model.eval(), tokens()), atol=1e-5)
    torch._dynamo.reset()
