"""Pruned models whose layers differ go through torch.compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import logits_of, tiny_model, tokens
from plans import mixed_cut, plan_of_kind
from test_pipeline import TEXT, config_of, tiny_tokenizer
from test_pipeline import tiny_model as model_with_vocabulary
from transformers import AutoModelForCausalLM

from hf_adaprune import RecoveryConfig, prune, prune_to_disk, recover, search_plan
from hf_adaprune.errors import UnsupportedModelError
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


def test_a_compiled_model_is_pruned_recovered_and_saved_as_the_model_that_it_is(tmp_path: Path) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    result = prune(torch.compile(model, backend="eager"), None, config_of("magnitude"))
    assert result.model is model
    again = AutoModelForCausalLM.from_pretrained(result.save_pretrained(tmp_path / "out"))
    prune(plain, None, config_of("magnitude"))
    assert torch.equal(logits_of(again, tokens()), logits_of(plain, tokens()))
    on_disk = prune_to_disk(
        torch.compile(tiny_model("llama"), backend="eager"), None, config_of("magnitude"), tmp_path / "disk"
    )
    assert AutoModelForCausalLM.from_pretrained(on_disk.folder).num_parameters() == again.num_parameters()
    student = prune(model_with_vocabulary("llama"), None, config_of("magnitude")).model
    config = RecoveryConfig(tokens=64, batch_size=1, sequence_length=32, precision="fp32", held_out=0)
    dense = model_with_vocabulary("llama")
    recovered = recover(torch.compile(student, backend="eager"), tiny_tokenizer(), dense, config, sources=TEXT)
    assert recovered.model is student
    AutoModelForCausalLM.from_pretrained(recovered.save_pretrained(tmp_path / "recovered"))


def test_a_model_with_compiled_parts_is_refused_before_any_work(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    whole = torch.compile(tiny_model("llama"), backend="eager")
    whole.model.norm = torch.compile(whole.model.norm, backend="eager")
    for compiled in (model, whole):
        with pytest.raises(UnsupportedModelError, match="compile the result"):
            prune(compiled, None, config_of("magnitude"))
        with pytest.raises(UnsupportedModelError, match="compile the result"):
            search_plan(compiled, tiny_tokenizer(), config_of("magnitude"))
        with pytest.raises(UnsupportedModelError, match="compile the result"):
            prune_to_disk(compiled, None, config_of("magnitude"), tmp_path / "out")
        with pytest.raises(UnsupportedModelError, match="compile the result"):
            recover(compiled, tiny_tokenizer(), tiny_model("llama"), sources=TEXT)
