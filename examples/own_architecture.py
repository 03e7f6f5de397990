"""Prune an architecture that is not built in: describe it as data, pass it, and reload the result.

The model here is a tiny random Llama under another name; yours is whatever `AutoModelForCausalLM` builds.

    python examples/own_architecture.py OUTPUT
"""

import sys

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_adaprune
from hf_adaprune import Architecture, Attention, Mlp, PruningConfig


class MyConfig(LlamaConfig):
    """A config of our own."""

    model_type = "my_model"


class MyModel(LlamaForCausalLM):
    """A model of our own."""

    config_class = MyConfig


ARCHITECTURE = Architecture(
    model_type="my_model",
    layer_class="LlamaDecoderLayer",
    layers="model.layers",
    attention=Attention(module="self_attn", output="self_attn.o_proj"),
    mlp=Mlp(module="mlp", up=("mlp.gate_proj", "mlp.up_proj"), down="mlp.down_proj"),
    heads_must_divide_hidden=True,
)


def main(output: str) -> None:
    AutoConfig.register("my_model", MyConfig, exist_ok=True)
    AutoModelForCausalLM.register(MyConfig, MyModel, exist_ok=True)
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
    model = MyModel(MyConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    config = PruningConfig.recipe("magnitude", pruning_ratio=0.3)
    result = hf_adaprune.prune(model, config=config, architecture=ARCHITECTURE)
    result.save_pretrained(output)
    again = AutoModelForCausalLM.from_pretrained(output)
    print(f"{type(again).__name__}: {result.before.total:,} -> {again.num_parameters():,} parameters")


if __name__ == "__main__":
    main(sys.argv[1])
