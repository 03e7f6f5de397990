"""Remote code: the same model for people without the package, in every family and for every kind of unit."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch
from conftest import FAMILIES, logits_of, tiny_model, tokens
from plans import KINDS, generated, mixed_cut, plan_of_kind, random_repairs
from test_pipeline import config_of, tiny_tokenizer
from test_pipeline import tiny_model as model_with_vocabulary
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_adaprune import prune, remote_code
from hf_adaprune.errors import CheckpointError, UnsupportedModelError
from hf_adaprune.plan import PruningPlan
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


def test_another_process_without_the_package_loads_every_family(tmp_path: Path) -> None:
    for family in FAMILIES:
        sites = find_sites(tiny_model(family))
        cut(sites, "mixed")
        folder, ids = saved(sites.model, tmp_path / family), tokens(2, 5)
        known = {"ids": tokens(), "prompt": ids, "logits": logits_of(sites.model, tokens())}
        known |= {cache: generated(sites.model, cache_implementation=cache) for cache in ("dynamic", "static")}
        torch.save(known, folder / "known.pt")
    folders = [str(tmp_path / family) for family in FAMILIES]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", OTHER_PROCESS]
    ran = subprocess.run(command, input="\n".join(folders), capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [row[0] for row in rows] == folders
    assert all(row[2] for row in rows), rows
    # Without the file a plain transformers refuses, whatever the family; it never loads wrong weights.
    assert "loaded" not in {row[1] for row in rows}


def test_the_file_is_self_contained_and_changes_no_class(tmp_path: Path) -> None:
    layer = LlamaDecoderLayer.__init__
    sites = find_sites(tiny_model("llama"))
    cut(sites, "mixed")
    folder = saved(sites.model, tmp_path / "out")
    text = (folder / "modeling_adaprune_llama.py").read_text()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    roots = {(node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name for node in nodes}
    assert {root.split(".")[0] for root in roots} == {"importlib", "typing", "torch", "transformers"}
    assert max(map(len, text.splitlines())) <= 120 and len(text.splitlines()) < 200
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["model_type"] == "llama"
    assert "trust_remote_code=True" in config["adaprune"]["loading"]
    remote: Any = load_class(folder)
    remote.from_pretrained(folder)
    assert LlamaDecoderLayer.__init__ is layer
    assert not (folder / "__pycache__").exists()


def test_a_model_loaded_by_its_remote_code_lives_on(tmp_path: Path) -> None:
    sites = find_sites(tiny_model("phi3"))
    cut(sites, "mixed")
    remote: Any = load_class(saved(sites.model, tmp_path / "out"))
    loaded = remote.from_pretrained(tmp_path / "out")
    remote.register_for_auto_class("AutoModelForCausalLM")
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == json.loads((tmp_path / "out" / "config.json").read_text())
    assert (tmp_path / "again" / "modeling_adaprune_phi3.py").is_file()
    # Attention implementations reach the layers, and the model is pruned further as any other.
    loaded.set_attn_implementation("eager")
    assert all(m.config._attn_implementation == "eager" for m in loaded.modules() if hasattr(m, "config"))
    sites = apply_plan(find_sites(loaded), PruningPlan("phi3", 3, {}, (1,)))
    mine = apply_plan(find_sites(remote.from_pretrained(tmp_path / "out")), PruningPlan("phi3", 3, {}, (1,)))
    assert torch.equal(logits_of(mine.model, tokens()), logits_of(apply_twice(tmp_path / "out"), tokens()))
    assert sites.model.config.num_hidden_layers == 2


def apply_twice(folder: Path) -> PreTrainedModel:
    """The checkpoint by the plugin, its middle layer dropped."""
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    return apply_plan(find_sites(loaded), PruningPlan("phi3", 3, {}, (1,))).model


def test_saving_with_it_is_checked_and_without_it_leaves_no_trace(tmp_path: Path, monkeypatch: Any) -> None:
    result = prune(model_with_vocabulary("qwen2"), tiny_tokenizer(), config_of("flap"))
    folder = result.save_pretrained(tmp_path / "out", remote_code=True)
    assert (folder / "modeling_adaprune_qwen2.py").is_file()
    # By the plugin's class: the name of a file that is not saved along is forgotten.
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert set(loaded.model_tags) == {"hf-adaprune", "pruned"}
    loaded.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    spoiled = remote_code._TEMPLATE.template.replace("_build_layer(config, number))", "_build_layer(config, 0))")
    monkeypatch.setattr(remote_code, "_TEMPLATE", Template(spoiled))
    with pytest.raises(CheckpointError, match="by its remote code"):
        result.save_pretrained(tmp_path / "spoiled", remote_code=True)
    monkeypatch.setattr(remote_code, "_TEMPLATE", Template("1 / 0"))
    with pytest.raises(CheckpointError, match="does not run"):
        result.save_pretrained(tmp_path / "spoiled", remote_code=True)
    assert not (tmp_path / "spoiled").exists()
    assert "modeling_adaprune_qwen2" not in sys.modules


def test_a_uniform_model_needs_none(tmp_path: Path) -> None:
    result = prune(model_with_vocabulary("llama"), tiny_tokenizer(), config_of("magnitude", uniform=True))
    folder = result.save_pretrained(tmp_path / "out", remote_code=True)
    assert not list(folder.glob("*.py"))
    assert "auto_map" not in json.loads((folder / "config.json").read_text())


def test_new_weights_are_initialised_like_the_familys_own(tmp_path: Path) -> None:
    sites = find_sites(tiny_model("llama"))
    cut(sites, "channel")
    remote: Any = load_class(saved(sites.model, tmp_path))
    fresh = remote(AutoConfig.from_pretrained(tmp_path))
    weight = fresh.model.layers[2].mlp.down_proj.weight
    assert 0.01 < weight.detach().std().item() < 0.03
    assert fresh.model.layers[2].input_layernorm.weight.eq(1).all()


def test_a_class_that_is_not_transformers_own_gets_none() -> None:
    class Own(PreTrainedModel):
        pass

    with pytest.raises(UnsupportedModelError, match="publish its own code"):
        render(Own, AutoConfig.for_model("llama"))
