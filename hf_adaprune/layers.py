"""What stands in a pruned model's layers beside transformers' own modules: config views and removed sublayers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["LayerConfigView", "SizedConfigView", "SkippedAttention", "SkippedMlp", "bind_views", "is_layer_class"]


class LayerConfigView:
    """A model's config as one layer sees it: the layer's own values first, everything else live from the model.

    transformers' own `config.per_layer_config[i]` is a copy, which later changes of the model's config (such as
    `model.set_attn_implementation`) do not reach.
    """

    def __init__(self, config: Any, layer: int) -> None:
        """Bind a config and a layer number."""
        self.__dict__["_config"] = config
        self.__dict__["_layer"] = layer

    def __getattr__(self, name: str) -> Any:
        """Read the layer's value, or the model's."""
        if name.startswith("__") or name in ("_config", "_layer"):
            raise AttributeError(name)
        config = self.__dict__["_config"]
        spec = config.__dict__.get("_heterogeneity_spec")
        if spec is not None:
            own = spec.per_layer_overrides.get(self.__dict__["_layer"], {})
            name_here = config.attribute_map.get(name, name)
            if name in own or name_here in own:
                return own.get(name, own.get(name_here))
        return config._getattr_without_heterogeneous_validation(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Write to the model's config."""
        setattr(self.__dict__["_config"], name, value)


class SizedConfigView:
    """A config with other values for some fields, for a layer that belongs to no model."""

    def __init__(self, config: Any, sizes: Mapping[str, Any]) -> None:
        self.__dict__.update(sizes, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":
            raise AttributeError(name)
        return getattr(self._config, name)


class SkippedAttention(nn.Module):
    """Stands where an attention sublayer was removed: adds nothing to the residual stream.

    It still shows its cache layer how many tokens went by, with one zero head: transformers reads the sequence length
    of the cache from the first layer of each attention type, which may be this one.
    """

    removed_sublayer = "attention"

    def __init__(self, layer_idx: int, head_dim: int) -> None:
        """Take the layer number and the head size of the zero head."""
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = head_dim

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        past_key_values: Any = None,
        layer_past: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Zeros `[batch, tokens, hidden]`, and no attention weights."""
        cache = past_key_values if past_key_values is not None else layer_past
        if cache is not None and hidden_states.dim() == 3:
            batch, tokens, _ = hidden_states.shape
            heads, head_dim = self._cache_shape(cache)
            nothing = hidden_states.new_zeros(batch, heads, tokens, head_dim)
            cache.update(nothing, nothing, self.layer_idx)
        return torch.zeros_like(hidden_states), None

    def _cache_shape(self, cache: Any) -> tuple[int, int]:
        # A static cache that was allocated early has the shape that the config states, which may be another one.
        layers = getattr(cache, "layers", ())
        keys = getattr(layers[self.layer_idx], "keys", None) if self.layer_idx < len(layers) else None
        return (keys.shape[1], keys.shape[-1]) if keys is not None and keys.dim() == 4 else (1, self.head_dim)


class SkippedMlp(nn.Module):
    """Stands where an MLP was removed: adds nothing to the residual stream."""

    removed_sublayer = "mlp"

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Zeros in the shape of the input."""
        return torch.zeros_like(hidden_states)


def is_layer_class(kind: Any) -> bool:
    """Whether something is a class of modules that are built from a config and a number, as decoder layers are.

    Args:
        kind (`type`): a class; where it hands its arguments on (`*args`), the one that it extends decides.
    """
    if not isinstance(kind, type) or not issubclass(kind, nn.Module):
        return False
    for cls in kind.__mro__:
        if "__init__" in vars(cls):
            own = list(inspect.signature(vars(cls)["__init__"]).parameters.values())[1:]
            if not own or own[0].kind is not inspect.Parameter.VAR_POSITIONAL:
                return len(own) > 1 and own[0].name == "config" and own[1].kind is own[1].POSITIONAL_OR_KEYWORD
    return False


def bind_views(layers: Iterable[Any], config: Any) -> None:
    """Let every module of every layer read its own layer's values from the model's config.

    Modules whose config is the model's own or a view already are bound; in a homogeneous model they get the plain
    config back.
    """
    mixed = getattr(config, "is_heterogeneous", False)
    for number, layer in enumerate(layers):
        view = LayerConfigView(config, number) if mixed else config
        for module in layer.modules():
            own = module.__dict__.get("config")
            # By name: a model that was loaded by its remote code has views of a class of its own.
            if own is not None and (own is config or type(own).__name__ == LayerConfigView.__name__):
                module.config = view
