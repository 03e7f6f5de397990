"""Model families as data: where the prunable matrices are, and what couples with what. Imports no torch.

A family is one `Architecture` value of about a dozen lines. To prune an architecture of your own, build one and pass it
as `architecture=`; nothing has to be registered or subclassed. Paths are relative to a decoder layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .errors import UnsupportedModelError

__all__ = ["ARCHITECTURES", "Architecture", "Attention", "Experts", "Mlp", "architecture_for"]


@dataclass(frozen=True)
class Attention:
    """Where a layer's attention keeps its heads.

    Args:
        module (`str`): the attention module; its first output is the sublayer's contribution to the residual stream.
        query, key, value (`str`): projections that write heads, one after the other. Equal paths mean one fused matrix
            whose rows are `[query | key | value]`.
        output (`str`): the matrix that reads the concatenated heads.
        refuse_heads (`str`): why heads and KV groups cannot be removed; empty where they can.
    """

    module: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    refuse_heads: str = ""

    @property
    def fused(self) -> bool:
        """Whether query, key and value share one matrix."""
        return self.query == self.key


@dataclass(frozen=True)
class Mlp:
    """Where a layer's MLP keeps its channels.

    Args:
        module (`str`): the MLP module; empty when its matrices sit in the layer itself (OPT).
        up (`tuple[str, ...]`): matrices that write the channels. One path with `fused=2` means `[gate | up]` rows.
        down (`str`): the matrix that reads the channels.
        fused (`int`): how many copies of the channels `up` holds side by side.
    """

    module: str = "mlp"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    fused: int = 1


@dataclass(frozen=True)
class Experts:
    """Where a mixture-of-experts layer keeps its experts (three-dimensional parameters, as transformers 5 stores them).

    Args:
        module (`str`): the sparse block; its output is the sublayer's contribution to the residual stream.
        experts (`str`): the module that holds `gate_up [experts, 2 * channels, hidden]` and
            `down [experts, hidden, channels]`.
        router (`str`): the module with `weight [experts, hidden]` and `top_k`.
    """

    module: str = "mlp"
    experts: str = "mlp.experts"
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    router: str = "mlp.gate"


@dataclass(frozen=True)
class Architecture:
    """One model family.

    Args:
        model_type (`str`): transformers' name of the family.
        layers (`str`): path of the list of decoder layers in the causal language model.
        layer_class (`str`): class of a decoder layer, in the module of the model class. It takes
            `(config, layer_idx)`.
        attention, mlp, experts: where the units are. A layer whose `experts.experts` does not exist is dense.
        heads_field, kv_heads_field, width_field, experts_field, expert_width_field (`str`): config fields that carry
            the sizes; empty where the family has none.
        explicit_head_dim (`bool`): the config may state `head_dim`; needed to change the number of heads.
        heads_must_divide_hidden (`bool`): the config class refuses head counts that do not divide `hidden_size`, and
            reads them globally (so per-layer head counts need
            `allow_global_per_layer_attribute_access`).
        heads_read_globally (`bool`): the config class reads the head count globally for another reason; the same flag
            is needed.
        layer_lists (`tuple[str, ...]`): config fields with one entry per layer; cut together with layers.
        layer_index_lists (`tuple[str, ...]`): config fields that hold layer indices; renumbered together with layers.
        removed_attention (`tuple[str, Any]`): config field, and the value it gets in layers whose attention is removed.
            A transformers without this package reads that field from the global config and then refuses to build,
            instead of filling the missing weights with random numbers.
        layer_refusals (`tuple[tuple[str, str], ...]`): config flags that make the layer number part of the function,
            with the reason why layers cannot be dropped while they are set.
    """

    model_type: str
    layer_class: str
    layers: str = "model.layers"
    attention: Attention = Attention()
    mlp: Mlp = Mlp()
    experts: Experts | None = None
    heads_field: str = "num_attention_heads"
    kv_heads_field: str = "num_key_value_heads"
    width_field: str = "intermediate_size"
    experts_field: str = ""
    expert_width_field: str = ""
    layers_field: str = "num_hidden_layers"
    explicit_head_dim: bool = True
    heads_must_divide_hidden: bool = False
    heads_read_globally: bool = False
    layer_lists: tuple[str, ...] = ("layer_types",)
    layer_index_lists: tuple[str, ...] = ()
    removed_attention: tuple[str, Any] = ("num_key_value_heads", 1)
    layer_refusals: tuple[tuple[str, str], ...] = ()


_NO_HEAD_DIM = (
    "{family} derives the head size from hidden_size / num_attention_heads and has no head_dim field, so a checkpoint "
    "with fewer heads could not be described"
)


def _family_reason(family: str) -> str:
    return _NO_HEAD_DIM.format(family=family)


_LLAMA = Architecture("llama", "LlamaDecoderLayer", heads_must_divide_hidden=True)

_FAMILIES = (
    _LLAMA,
    replace(_LLAMA, model_type="mistral", layer_class="MistralDecoderLayer", heads_must_divide_hidden=False),
    Architecture("qwen2", "Qwen2DecoderLayer"),
    Architecture("qwen3", "Qwen3DecoderLayer"),
    Architecture("gemma2", "Gemma2DecoderLayer", heads_must_divide_hidden=True),
    Architecture("gemma3_text", "Gemma3DecoderLayer", heads_must_divide_hidden=True),
    Architecture(
        "phi3",
        "Phi3DecoderLayer",
        attention=Attention(query="self_attn.qkv_proj", key="self_attn.qkv_proj", value="self_attn.qkv_proj"),
        mlp=Mlp(up=("mlp.gate_up_proj",), fused=2),
        heads_read_globally=True,  # Phi3Config.validate_rope
    ),
    Architecture("smollm3", "SmolLM3DecoderLayer", layer_lists=("layer_types", "no_rope_layers")),
    Architecture(
        "olmo2",
        "Olmo2DecoderLayer",
        attention=Attention(
            refuse_heads="OLMo 2 normalises queries and keys over all heads together, so removing a head would change "
            "every other head"
        ),
    ),
    Architecture(
        "mixtral",
        "MixtralDecoderLayer",
        experts=Experts(),
        experts_field="num_local_experts",
        expert_width_field="intermediate_size",
    ),
    Architecture(
        "qwen3_moe",
        "Qwen3MoeDecoderLayer",
        experts=Experts(),
        experts_field="num_experts",
        expert_width_field="moe_intermediate_size",
        layer_index_lists=("mlp_only_layers",),
        layer_refusals=(
            ("decoder_sparse_step", "which layers are sparse depends on the layer number (decoder_sparse_step > 1)"),
        ),
    ),
    Architecture(
        "gpt_neox",
        "GPTNeoXLayer",
        layers="gpt_neox.layers",
        attention=Attention(
            module="attention",
            query="attention.query_key_value",
            key="attention.query_key_value",
            value="attention.query_key_value",
            output="attention.dense",
            refuse_heads=_family_reason("GPT-NeoX"),
        ),
        mlp=Mlp(up=("mlp.dense_h_to_4h",), down="mlp.dense_4h_to_h"),
        kv_heads_field="",
        explicit_head_dim=False,
        heads_must_divide_hidden=True,
        removed_attention=("attention_dropout", 1.0),
    ),
    Architecture(
        "gpt2",
        "GPT2Block",
        layers="transformer.h",
        attention=Attention(
            module="attn",
            query="attn.c_attn",
            key="attn.c_attn",
            value="attn.c_attn",
            output="attn.c_proj",
            refuse_heads=_family_reason("GPT-2"),
        ),
        mlp=Mlp(up=("mlp.c_fc",), down="mlp.c_proj"),
        width_field="n_inner",
        layers_field="n_layer",
        heads_field="n_head",
        kv_heads_field="",
        explicit_head_dim=False,
        removed_attention=("n_head", 1),
        layer_refusals=(
            ("scale_attn_by_inverse_layer_idx", "attention is scaled by the layer number"),
            ("add_cross_attention", "cross-attention layers are counted in a cache of their own"),
        ),
    ),
    Architecture(
        "opt",
        "OPTDecoderLayer",
        layers="model.decoder.layers",
        attention=Attention(output="self_attn.out_proj", refuse_heads=_family_reason("OPT")),
        mlp=Mlp(module="", up=("fc1",), down="fc2"),
        width_field="ffn_dim",
        kv_heads_field="",
        explicit_head_dim=False,
        removed_attention=("num_attention_heads", 1),
    ),
)

ARCHITECTURES: dict[str, Architecture] = {family.model_type: family for family in _FAMILIES}


def architecture_for(model_type: str, own: Iterable[Architecture] = ()) -> Architecture:
    """The architecture of a model type, from the caller's own ones first.

    Args:
        model_type (`str`): `model.config.model_type`.
        own (iterable of [`Architecture`], *optional*): architectures of the caller.

    Raises:
        UnsupportedModelError: no architecture of that name; the message lists the known ones.
    """
    for architecture in own:
        if architecture.model_type == model_type:
            return architecture
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    raise UnsupportedModelError(
        f"No architecture for model_type {model_type!r}. Known: {', '.join(sorted(ARCHITECTURES))}. For a decoder "
        "of your own, describe it as hf_adaprune.Architecture(...) and pass it as architecture=; "
        "examples/own_architecture.py shows how."
    )
