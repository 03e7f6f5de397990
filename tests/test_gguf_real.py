"""SmolLM2-135M-Instruct, pruned, in llama.cpp: the probabilities and the texts of transformers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from llama_cpp import ask, job
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaprune import PruningConfig, prune
from hf_adaprune.demo import fetch_model
from hf_adaprune.documents import read_source
from hf_adaprune.errors import AdaPruneError
from hf_adaprune.export import export_gguf

pytestmark = pytest.mark.real
PROMPTS, CONTINUED, NEW_TOKENS = 32, 8, 32
TOLD = 1000  # tokens of the vocabulary that are compared, the most probable ones; all would take a minute


@pytest.fixture(scope="module")
def folder() -> Path:
    torch.set_num_threads(2)
    try:
        return fetch_model()
    except AdaPruneError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the model cannot be fetched: {error}")


@pytest.mark.parametrize("uniform", [False, True])
@torch.no_grad()
def test_llama_cpp_computes_what_transformers_computes(uniform: bool, folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    config = PruningConfig.recipe(
        "flap", pruning_ratio=0.2, uniform=uniform, channel_multiple=32,
        calibration={"samples": 4, "sequence_length": 128}, repair={"method": "none"},
    )  # fmt: skip
    saved = prune(dense, tokenizer, config).save_pretrained(tmp_path / "pruned", check=False)
    file = export_gguf(saved, tmp_path / "pruned.gguf")
    # The numbers that the file holds, computed in float32.
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float16).float().eval()
    assert bool(model.config.is_heterogeneous) is not uniform
    text = tokenizer("\n\n".join(read_source("python:prose", part=(2, 3)).texts[:60]))["input_ids"]
    prompts = [text[64 * number : 64 * number + 8 + 3 * number] for number in range(PROMPTS)]
    texts = [tokenizer.decode(prompt) for prompt in prompts[-CONTINUED:]]
    vocabulary = model.config.vocab_size
    answers, continued = ask(
        job(file, prompts, vocabulary, say=40, most_probable=TOLD),
        job(file, texts, new_tokens=NEW_TOKENS, tokenize=True),
    )
    differences = []
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = model(torch.tensor([prompt]), use_cache=False).logits[0, -1].log_softmax(-1)
        told = answer["logprobs"].isfinite()
        assert int(told.sum()) == TOLD
        differences.append((answer["logprobs"] - expected)[told].abs().max())
    assert float(torch.stack(differences).max()) < 1e-2
    equal = 0
    for prompt, answer in zip(texts, continued, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert answer["ids"] == ids[0].tolist()
        new = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        equal += tokenizer.decode(new, skip_special_tokens=True) == answer["text"]
    assert equal >= CONTINUED - 2
