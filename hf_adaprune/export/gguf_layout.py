"""How a pruned model lies in a GGUF file: the architecture, its keys and its tensors, as llama.cpp reads them.

llama.cpp allocates tensors by its own rules and skips what it does not expect to need, so a model that is described
almost rightly loads and answers wrongly. What is written here was compared with llama.cpp on log-probabilities, and
everything else is refused:

- Equal layers keep their family's architecture. It knows one head count and one MLP width only; Qwen 2's also takes
  it that all heads together are as wide as the hidden state, which they are not where heads were removed.
- Layers that differ are written as `deci`, llama.cpp's architecture with sizes per layer, which otherwise computes what
  `llama` computes. Families that differ from Llama by biases and by the order of rotated pairs alone fit in it.
- A layer without attention and MLP adds nothing and is left out. `deci` skips the attention's output where a layer has
  no MLP, so such a layer gets an MLP of zeros; it reads the head size from the first layer, so a first layer without
  attention gets one head of zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..model_config import head_dim_of, skipped_sublayers

__all__ = ["FAMILIES", "Entry", "Layout", "layout_of"]

ZERO_CHANNELS = 32  # of an MLP that stands for none: rows that Q8_0 can hold
_ADVICE = "Prune the model with uniform=True (`--uniform`)"
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_ALL_BIASES = _QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}


@dataclass(frozen=True)
class Family:
    """How llama.cpp knows a family.

    Args:
        arch (`str`): its architecture for equal layers.
        rotates_pairs (`bool`): it rotates neighbouring rows of a head, where transformers rotates halves, so rows of
            queries and keys are reordered.
        biases (`frozenset[str]`): tensors whose bias it adds.
        as_deci (`bool`): layers that differ may be written as `deci`.
        norms (`Mapping[str, str]`): norms of a layer beside the usual two.
        square (`bool`): its heads together must be as wide as the hidden state.
    """

    arch: str
    rotates_pairs: bool = False
    biases: frozenset[str] = frozenset()
    as_deci: bool = False
    norms: Mapping[str, str] | None = None
    square: bool = False


# Each compared with llama.cpp by tests/test_gguf.py.
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", True, _ALL_BIASES, True),
    "mistral": Family("llama", True, _ALL_BIASES, True),
    "qwen2": Family("qwen2", False, _QKV, True, square=True),
    "qwen3": Family("qwen3", norms=_QK_NORMS),
}
_DECI = Family("deci", True, _ALL_BIASES, True)


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Args:
        name (`str`): llama.cpp's name.
        shape (`tuple[int, ...]`): outermost dimension first.
        read (`Callable`): makes the tensor, when it is its turn to be written.
        exact (`bool`): always float32: norms, biases and rope factors, as llama.cpp wants them.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    exact: bool

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """A model as llama.cpp sees it.

    Args:
        arch (`str`): llama.cpp's architecture.
        keys (`Mapping[str, Any]`): metadata under the architecture's prefix.
        tensors (`tuple[Entry, ...]`): in the order of the file.
        vocabulary (`int`): rows of the embedding.
    """

    arch: str
    keys: Mapping[str, int | float | str | list[int]]
    tensors: tuple[Entry, ...]
    vocabulary: int


@dataclass(frozen=True)
class _Layer:
    """One decoder layer and its sizes; zeros where a sublayer is gone."""

    module: nn.Module
    heads: int
    kv_heads: int
    width: int
    biases: frozenset[str]


def layout_of(model: Any) -> Layout:
    """Decide how a model is written, and refuse what llama.cpp would compute wrongly.

    Args:
        model (`PreTrainedModel`): pruned or not; not changed.

    Raises:
        UnsupportedModelError: a family, a setting or a combination of sizes that llama.cpp does not know; a model with
            adapters or without a head.
    """
    if getattr(model, "peft_config", None):
        raise UnsupportedModelError(
            "this model has adapters, which the file would leave out. Merge them (merge_and_unload() of a PeftModel) "
            "and export the model that comes back."
        )
    config = model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"models of type {config.model_type!r} are not written for llama.cpp; {', '.join(sorted(FAMILIES))} are. "
            "Those were compared with what llama.cpp computes."
        )
    if not hasattr(model, "model") or not hasattr(model, "lm_head"):
        raise UnsupportedModelError(
            f"a {type(model).__name__} has no language modelling head, which llama.cpp needs. Load the checkpoint with "
            "AutoModelForCausalLM."
        )
    _check_config(config, family)
    base = model.model
    head_dim = head_dim_of(config)
    names = {**_BLOCK, **(family.norms or {})}
    layers = [_sizes(number, layer, names, head_dim) for number, layer in enumerate(base.layers)]
    # A layer without both sublayers is the identity; `deci` would lose rows at such a last layer.
    layers = [layer for layer in layers if layer.heads or layer.width]
    if not layers:
        raise UnsupportedModelError("every sublayer of this model is gone; llama.cpp needs at least one layer.")
    biases = frozenset[str]().union(*(layer.biases for layer in layers))
    equal = len({(layer.heads, layer.kv_heads, layer.width) for layer in layers}) == 1
    hidden = base.embed_tokens.embedding_dim
    plain = equal and all((layers[0].heads, layers[0].width)) and biases <= family.biases
    plain = plain and not (family.square and layers[0].heads * head_dim != hidden)
    if not plain and not family.as_deci:
        what = f"biases on {', '.join(sorted(biases - family.biases))}"
        if not equal:
            what = "layers of different widths"
        elif biases <= family.biases:
            what = "removed sublayers"
        raise UnsupportedModelError(
            f"llama.cpp has no architecture for {config.model_type} models with {what}; only "
            f"{', '.join(sorted(name for name, known in FAMILIES.items() if known.as_deci))} can be written so. "
            f"{_ADVICE}, with a repair without intercept."
        )
    written = family if plain else _DECI
    sizes = _written_sizes(layers, plain)
    keys = _keys(config, base, head_dim, sizes, plain)
    tensors = list(_model_tensors(model, head_dim))
    for number, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
        tensors.extend(_layer_tensors(number, layer, size, written, names, head_dim, hidden))
    return Layout(written.arch, keys, tuple(tensors), base.embed_tokens.num_embeddings)


def _read(config: Any, name: str, default: Any = None) -> Any:
    return config._getattr_without_heterogeneous_validation(name, default)


def _check_config(config: Any, family: Family) -> None:
    activation = _read(config, "hidden_act")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"llama.cpp computes this family with silu; this model has {activation!r}.")
    window, types = _read(config, "sliding_window"), _read(config, "layer_types")
    context = _read(config, "max_position_embeddings")
    if window and window < context and (types is None or "sliding_attention" in types):
        raise UnsupportedModelError(
            f"this model attends to a sliding window of {window} tokens, which llama.cpp's {family.arch} would ignore. "
            f"Set config.sliding_window to None and max_position_embeddings to {window} (now {context}) to export it "
            "for texts of that length."
        )
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise UnsupportedModelError(
            f"rotary embeddings of type {rope['rope_type']!r} are not written; default, linear and llama3 are."
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError("rotary embeddings of a part of each head are not written.")
    spec = config.__dict__.get("_heterogeneity_spec")
    known = {"num_attention_heads", "num_key_value_heads", "intermediate_size", "skip", "attention_dropout"}
    own = {name for values in (spec.per_layer_overrides.values() if spec else ()) for name in values}
    if own - known:
        raise UnsupportedModelError(
            f"per_layer_config changes {', '.join(sorted(own - known))}, which a GGUF file cannot say layer by layer."
        )


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(_read(config, "rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModelError("rotary embeddings that differ by layer type are not written.")
    return {"rope_type": "default", **rope}


def _sizes(number: int, layer: nn.Module, names: Mapping[str, str], head_dim: int) -> _Layer:
    gone = skipped_sublayers(layer)
    used = {path: name for path, name in names.items() if path not in _paths_of(gone)}
    present = {path: getattr(layer.get_submodule(path), "bias", None) is not None for path in used}
    expected = {f"{path}.weight" for path in used} | {f"{path}.bias" for path, bias in present.items() if bias}
    # The norm in front of a removed sublayer stays in the checkpoint and says nothing.
    unread = {"attention": "input_layernorm.weight", "mlp": "post_attention_layernorm.weight"}
    odd = set(layer.state_dict()) ^ expected ^ {unread[kind] for kind in gone}
    if odd:
        raise UnsupportedModelError(
            f"layer {number} has or lacks {', '.join(sorted(odd))}, unlike its family; a file for llama.cpp cannot "
            "hold it. Merge adapters, and undo quantisation, before the export."
        )
    size: Any = layer.get_submodule
    return _Layer(
        layer,
        0 if "attention" in gone else size("self_attn.q_proj").weight.shape[0] // head_dim,
        0 if "attention" in gone else size("self_attn.k_proj").weight.shape[0] // head_dim,
        0 if "mlp" in gone else size("mlp.down_proj").weight.shape[1],
        frozenset(name for path, name in used.items() if present[path]),
    )


def _paths_of(gone: Iterable[str]) -> set[str]:
    paths: set[str] = set()
    if "attention" in gone:
        paths |= {path for path in (*_BLOCK, *_QK_NORMS) if path.startswith("self_attn.")} | {"input_layernorm"}
    if "mlp" in gone:
        paths |= {path for path in _BLOCK if path.startswith("mlp.")} | {"post_attention_layernorm"}
    return paths


def _written_sizes(layers: list[_Layer], plain: bool) -> list[tuple[int, int, int]]:
    """Heads, KV heads and width per layer in the file, with the zeros that stand in where llama.cpp needs some."""
    sizes = [(layer.heads, layer.kv_heads, layer.width or ZERO_CHANNELS) for layer in layers]
    if not plain and not layers[0].heads:
        sizes[0] = (1, 1, layers[0].width)
    return sizes


def _keys(
    config: Any, base: Any, head_dim: int, sizes: list[tuple[int, int, int]], plain: bool
) -> dict[str, int | float | str | list[int]]:
    rope = _rope(config)
    keys: dict[str, int | float | str | list[int]] = {
        "block_count": len(sizes),
        "context_length": _read(config, "max_position_embeddings"),
        "embedding_length": base.embed_tokens.embedding_dim,
        "vocab_size": base.embed_tokens.num_embeddings,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    names = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    for position, name in enumerate(names):
        values = [size[position] for size in sizes]
        keys[name] = values[0] if plain else values
    return keys


def _model_tensors(model: Any, head_dim: int) -> Iterable[Entry]:
    base = model.model
    embedding, head = base.embed_tokens.weight, model.lm_head.weight
    if getattr(model.lm_head, "bias", None) is not None:
        raise UnsupportedModelError("the head has a bias, which llama.cpp does not add for this family.")
    yield _entry("token_embd.weight", embedding)
    yield _entry("output_norm.weight", base.norm.weight)
    if head.data_ptr() != embedding.data_ptr():  # without it llama.cpp reads the embedding
        yield _entry("output.weight", head)
    rope = _rope(model.config)
    if rope["rope_type"] == "llama3":
        factors = llama3_factors(rope, head_dim)
        yield Entry("rope_freqs.weight", tuple(factors.shape), lambda: factors, True)


def _entry(name: str, tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Entry:
    if not tensor.is_floating_point() or tensor.is_meta:
        raise UnsupportedModelError(
            f"{name} is {'on the meta device' if tensor.is_meta else f'of type {tensor.dtype}'}; the export needs the "
            "model's weights in a floating-point type. Load it without quantisation."
        )

    def read() -> torch.Tensor:
        value = tensor.detach()
        return value if change is None else change(value)

    return Entry(name, tuple(tensor.shape), read, tensor.dim() < 2)


def _zeros(name: str, *shape: int) -> Entry:
    return Entry(name, shape, lambda: torch.zeros(shape), len(shape) < 2)


def _layer_tensors(
    number: int,
    layer: _Layer,
    size: tuple[int, int, int],
    written: Family,
    names: Mapping[str, str],
    head_dim: int,
    hidden: int,
) -> Iterable[Entry]:
    heads, kv_heads, width = size
    prefix = f"blk.{number}."
    attention = {"attn_q": (heads, hidden), "attn_k": (kv_heads, hidden), "attn_v": (kv_heads, hidden)}
    gone = ([] if layer.heads else ["attention"]) + ([] if layer.width else ["mlp"])
    unused = _paths_of(gone)
    for path, name in names.items():
        if path in unused:
            continue
        module: Any = layer.module.get_submodule(path)
        count = {"attn_q": heads, "attn_k": kv_heads}.get(name, 0)
        change = _reorder(count) if written.rotates_pairs and count else None
        yield _entry(f"{prefix}{name}.weight", module.weight, change)
        if getattr(module, "bias", None) is not None:
            yield _entry(f"{prefix}{name}.bias", module.bias, change)
    if not layer.heads and heads:
        yield _zeros(f"{prefix}attn_norm.weight", hidden)
        for name, (count, inputs) in attention.items():
            yield _zeros(f"{prefix}{name}.weight", count * head_dim, inputs)
        yield _zeros(f"{prefix}attn_output.weight", hidden, heads * head_dim)
    if not layer.width:
        yield _zeros(f"{prefix}ffn_norm.weight", hidden)
        for name in ("ffn_gate", "ffn_up"):
            yield _zeros(f"{prefix}{name}.weight", width, hidden)
        yield _zeros(f"{prefix}ffn_down.weight", hidden, width)


def _reorder(heads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Rows of every head `[half, pair]` become `[pair, half]`: llama.cpp rotates neighbours, transformers halves."""

    def change(value: torch.Tensor) -> torch.Tensor:
        rows = value.shape[0] // heads
        return value.reshape(heads, 2, rows // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)

    return change


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """What Llama 3's scaling divides every rotary frequency by `[head_dim / 2]`.

    Args:
        rope (`Mapping[str, Any]`): `rope_parameters` of the config.
        head_dim (`int`): size of a head.
    """
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    frequencies = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = float(rope["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    # Slow turns are stretched, fast ones are left alone, in between the frequencies are mixed.
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1.0 / ((1 - smooth) / factor + smooth)).float()
