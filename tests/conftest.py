"""Tiny random models of every supported family, and what else all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from hf_adaprune.errors import AdaPruneError
from hf_adaprune.sites import ModelSites, find_sites

VOCABULARY = 96
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 128}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
_MOE = {"num_experts_per_tok": 2}

FAMILIES: dict[str, dict] = {
    "llama": {**_SMALL, **_HEADS, "intermediate_size": 48, "tie_word_embeddings": True},
    "qwen2": {**_SMALL, **_HEADS, "intermediate_size": 48},
    "qwen3": {**_SMALL, **_HEADS, "intermediate_size": 48},
    "mistral": {**_SMALL, **_HEADS, "intermediate_size": 48, "sliding_window": None},
    "gemma2": {**_SMALL, **_HEADS, "intermediate_size": 48, "query_pre_attn_scalar": 12},
    "gemma3_text": {**_SMALL, **_HEADS, "intermediate_size": 48, "query_pre_attn_scalar": 12},
    "phi3": {**_SMALL, **_HEADS, "intermediate_size": 48, "pad_token_id": 0, "head_dim": 12},
    "smollm3": {**_SMALL, **_HEADS, "intermediate_size": 48, "pad_token_id": 0},
    "olmo2": {**_SMALL, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48},
    "mixtral": {**_SMALL, **_HEADS, **_MOE, "intermediate_size": 24, "num_local_experts": 4},
    "qwen3_moe": {
        **_SMALL,
        **_HEADS,
        **_MOE,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
    "gpt_neox": {**_SMALL, "num_attention_heads": 4, "intermediate_size": 48},
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
    },
}
HEADLESS = ("olmo2", "gpt_neox", "gpt2", "opt")  # families whose heads cannot be removed
MIXTURES = ("mixtral", "qwen3_moe")
TOKEN_IDS = {"bos_token_id": 1, "eos_token_id": 2}


def tiny_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random float32 model of a family, with weights large enough that every unit matters."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **TOKEN_IDS, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokens(batch: int = 2, length: int = 11, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, length], special ones left out."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def parameters_of(model: torch.nn.Module) -> int:
    """How many parameters a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits without a cache."""
    return model(input_ids=ids, use_cache=False).logits


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every supported family."""
    return request.param


@pytest.fixture
def model(family: str) -> PreTrainedModel:
    """A tiny model of the family."""
    return tiny_model(family)


@pytest.fixture
def sites(model: PreTrainedModel) -> ModelSites:
    """Its sites."""
    return find_sites(model)


@pytest.fixture(scope="module")
def real_folder() -> Path:
    """SmolLM2-135M-Instruct, fetched once; skips where it cannot be, unless `CI` is set."""
    from hf_adaprune.demo import fetch_model

    torch.set_num_threads(2)
    try:
        return fetch_model()
    except AdaPruneError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the model cannot be fetched: {error}")
