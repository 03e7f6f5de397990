"""Quantise after pruning: a pruned checkpoint loads with a `quantization_config` as a dense one does."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import logits_of, tiny_model, tokens
from plans import plan_of_kind

from hf_adaprune.sites import find_sites
from hf_adaprune.surgery import apply_plan

# torchao warns of itself when it is imported, so it gets a process of its own.
LOAD = """
import sys, torch
import hf_adaprune
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import AutoModelForCausalLM, TorchAoConfig
torch.set_num_threads(1)
known = torch.load(sys.argv[2])
config = TorchAoConfig(Int8WeightOnlyConfig())
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config, dtype=torch.float32)
assert "Int8" in type(model.model.layers[0].mlp.down_proj.weight).__name__
with torch.no_grad():
    found = model(input_ids=known["ids"], use_cache=False).logits
print(float((found - known["logits"]).norm() / known["logits"].norm()))
in_place = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
quantize_(in_place, Int8WeightOnlyConfig())
for quantised in (model, in_place):
    try:
        hf_adaprune.prune(quantised, None, hf_adaprune.PruningConfig.recipe("magnitude"))
    except ValueError as error:
        assert "Prune first and quantise the result" in str(error), error
    else:
        raise AssertionError("quantised weights were pruned")
"""


@pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None and not os.environ.get("CI"), reason="torchao is not installed"
)
@pytest.mark.parametrize("kind", ["channel", "kv_group"])
def test_a_pruned_checkpoint_loads_quantised(tmp_path: Path, kind: str) -> None:
    model = tiny_model("llama")
    sites = find_sites(model)
    plan = plan_of_kind(sites, kind)
    assert plan is not None
    apply_plan(sites, plan)
    model.save_pretrained(tmp_path / "pruned")
    torch.save({"ids": tokens(), "logits": logits_of(model, tokens())}, tmp_path / "known.pt")
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(tmp_path / "pruned"), str(tmp_path / "known.pt")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    error = float(ran.stdout.split()[-1])
    assert 0 < error < 0.05
