"""SmolLM2-135M-Instruct, pruned, in llama.cpp: the probabilities and the texts of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llama_cpp import ask, job
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adaprune import PruningConfig, prune
from hf_adaprune.documents import read_source
from hf_adaprune.export import export_gguf

pytestmark = pytest.mark.real
PROMPTS, CONTINUED, NEW_TOKENS = 32, 8, 32
TOLD = 1000  # tokens of the vocabulary that are compared, the most probable ones; all would take a minute


@pytest.mark.parametrize("uniform", [False, True])
@torch.no_grad()
def test_llama_cpp_computes_what_transformers_computes(uniform: bool, real_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    dense = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32).eval()
    config = PruningConfig.recipe(
        "flap", pruning_ratio=0.2, uniform=uniform, channel_multiple=32,
        calibration={"samples": 4, "sequence_length": 128}, repair={"method": "none"},
    )  # fmt: skip
    saved = prune(dense, tokenizer, config).save_pretrained(tmp_path / "pruned", check=False)
    exact = export_gguf(saved, tmp_path / "exact.gguf", type="f32")
    half = export_gguf(saved, tmp_path / "half.gguf", type="f16")
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32).eval()
    assert bool(getattr(model.config, "is_heterogeneous", False)) is not uniform
    text = tokenizer("\n\n".join(read_source("python:prose", part=(2, 3)).texts[:60]))["input_ids"]
    prompts = [text[64 * number : 64 * number + 8 + number] for number in range(PROMPTS)]
    texts = [tokenizer.decode(prompt) for prompt in prompts[-CONTINUED:]]
    options = {"vocabulary": model.config.vocab_size, "say": 40, "most_probable": TOLD}
    *answers, continued = ask(
        job(exact, prompts[::4], **options),
        job(half, prompts, **options),
        job(half, texts, new_tokens=NEW_TOKENS, tokenize=True),
    )
    expected = [model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1) for ids in prompts]
    # Measured 3e-4 at most in float32. In float16 llama.cpp rounds activations, too: 2e-3 on average, 2e-2 at most.
    average, most = differences(answers[0], expected[::4])
    assert most < 1e-3, (average, most)
    average, most = differences(answers[1], expected)
    assert average < 5e-3 and most < 5e-2, (average, most)
    equal = 0
    for prompt, answer in zip(texts, continued, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert answer["ids"] == ids[0].tolist()
        new = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        equal += tokenizer.decode(new, skip_special_tokens=True) == answer["text"]
    assert equal >= CONTINUED - 2


def differences(answers: list[dict[str, Any]], expected: list[torch.Tensor]) -> tuple[float, float]:
    """Average and largest difference of the tokens that llama.cpp told of."""
    found = []
    for answer, row in zip(answers, expected, strict=True):
        told = answer["logprobs"].isfinite()
        assert int(told.sum()) == TOLD
        found.append((answer["logprobs"] - row)[told].abs())
    every = torch.cat(found)
    return float(every.mean()), float(every.max())
