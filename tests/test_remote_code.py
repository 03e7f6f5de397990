"""Remote code: the same model for people without the package, in every family and for every kind of unit."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, TOKEN_IDS, logits_of, tiny_model, tokens
from plans import KINDS, generated, mixed_cut, plan_of_kind, random_repairs
from test_pipeline import config_of, tiny_tokenizer
from test_pipeline import tiny_model as model_with_vocabulary
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import hf_adaprune
from hf_adaprune import prune, saving
from hf_adaprune.errors import CheckpointError, UnsupportedModelError
from hf_adaprune.remote_code import add_remote_code, load_class, render
from hf_adaprune.sites import ModelSites, find_sites
from hf_adaprune.surgery import apply_plan

# Runs without the package: loads every folder in both ways, compares with what was saved beside the weights.
OTHER_PROCESS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging
logging.set_verbosity_error()
torch.set_num_threads(1)
for folder in sys.stdin.read().split():
    known = torch.load(folder + "/known.pt")
    try:
        AutoModelForCausalLM.from_pretrained(folder)
        plain = "loaded"
    except Exception as error:
        plain = type(error).__name__
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = known["ids"]
    with torch.no_grad():
        same = torch.equal(model(input_ids=ids, use_cache=False).logits, known["logits"])
    options = dict(pad_token_id=0, do_sample=False, min_new_tokens=4, max_new_tokens=4)
    for cache in ("dynamic", "static"):
        made = model.generate(known["prompt"], attention_mask=torch.ones_like(known["prompt"]),
                              cache_implementation=cache, **options)
        same = same and torch.equal(made, known[cache])
    print(json.dumps([folder, plain, same]))
assert not [name for name in sys.modules if name.startswith("hf_adaprune")]
"""


def cut(sites: ModelSites, kind: str) -> bool:
    """Cut a model by one kind of unit, with added biases where it narrows; whether there was anything to cut."""
    if kind == "mixed":
        apply_plan(sites, *mixed_cut(sites))
        return True
    plan = plan_of_kind(sites, kind)
    if plan is None:
        return False
    apply_plan(sites, plan, random_repairs(sites, plan) if kind in ("channel", "kv_group", "query_head") else None)
    return True


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    add_remote_code(folder, type(model), model.config)
    return folder


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_remote_code_builds_the_same_model(sites: ModelSites, kind: str, tmp_path: Path) -> None:
    if not cut(sites, kind):
        pytest.skip(f"no {kind} to remove")
    model = sites.model
    file = add_remote_code(saved(model, tmp_path), type(model), model.config)
    if file is None:
        assert not model.config.is_heterogeneous
        return
    remote: Any = load_class(tmp_path)
    assert remote is not type(model)
    loaded = remote.from_pretrained(tmp_path)
    state, other = model.state_dict(), loaded.state_dict()
    assert state.keys() == other.keys()
    assert torch.equal(logits_of(loaded, tokens()), logits_of(model, tokens()))
    for cache in ("dynamic", "static"):
        expected = generated(model, cache_implementation=cache)
        assert torch.equal(generated(loaded, cache_implementation=cache), expected)
    assert len(loaded(input_ids=tokens(), output_hidden_states=True).hidden_states) == len(sites.layers) + 1
