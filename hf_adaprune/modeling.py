"""The modelling half of `per_layer_config`: decoder layers built from their own layer's config.

transformers 5.23 has the config half: sizes per layer are stored, caches and generation honour them, but models still
build every layer from the global config. Here the layer class's `__init__` is wrapped, once per class and only when a
config that needs it is met; homogeneous models never notice. When transformers brings the modelling half itself, the
wrap only adds what is this package's own: removed sublayers and biases that a repair added.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

from torch import nn

from .errors import CheckpointError, UnsupportedModelError
from .experts import balance_by_layer
from .layers import LayerConfigView, is_layer_class
from .model_config import MODEL_TAGS, PROVENANCE_KEY, head_dim_of, known_architecture, provenance_of
from .surgery import add_bias, skip_sublayers

__all__ = ["note_pruned", "prepare_layer_class"]


def prepare_layer_class(model: nn.Module, config: Any) -> None:
    """Wrap the decoder layer class of a model that is being built, if its config asks for anything out of the ordinary.

    Called before the layers exist. Does nothing for families that are unknown here, or whose layers transformers
    already builds from per-layer sizes.
    """
    provenance = provenance_of(config)
    if not getattr(config, "is_heterogeneous", False) and not provenance.get("added_biases"):
        return
    architecture = _architecture_or_none(config)
    if architecture is None:
        return
    for cls in type(model).__mro__:
        layer_class = getattr(sys.modules.get(cls.__module__), architecture.layer_class, None)
        if layer_class is not None:
            if not is_layer_class(layer_class):
                raise CheckpointError(
                    f"{architecture.layer_class!r}, which the checkpoint's architecture names, is no decoder layer "
                    "built from (config, layer_idx). Is the checkpoint whole, and from a source that you trust?"
                )
            _wrap(layer_class, architecture.layer_class)
            if architecture.experts_field:
                balance_by_layer(model)
            return


def note_pruned(model: Any, config: Any) -> None:
    """Give a model that is built from a pruned checkpoint its tags, so that a push of transformers' own carries them.

    The config may name remote code of its checkpoint. A class of transformers' own saves the name without the file, and
    then the name leads nowhere: it goes.
    """
    if not provenance_of(config):
        return
    model.add_model_tags(list(MODEL_TAGS))
    references = config.__dict__.get("auto_map")
    if isinstance(references, dict) and type(model).__module__.startswith("transformers.models."):
        kept = {key: value for key, value in references.items() if not str(value).startswith("modeling_adaprune_")}
        config.auto_map = kept
        if not kept:
            del config.auto_map


def _upstream_builds_layers() -> bool:
    return importlib.util.find_spec("transformers.integrations.heterogeneity.modeling_utils") is not None


def _wrap(layer_class: type[nn.Module], name: str) -> None:
    names: set[str] | None = getattr(layer_class.__init__, "_adaprune", None)
    if names is not None:
        names.add(name)
        return
    original = layer_class.__init__
    names = {name}

    @functools.wraps(original)
    def init(self: Any, config: Any, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> None:
        provenance = provenance_of(config)
        mixed = getattr(config, "is_heterogeneous", False)
        architecture = _architecture_or_none(config) if mixed or provenance.get("added_biases") else None
        # A class stays wrapped when the model that asked for it fails: whose layer it is, each config says anew.
        if architecture is None or architecture.layer_class not in names:
            original(self, config, layer_idx, *args, **kwargs)
            return
        number = layer_idx or 0
        own = config.per_layer_config[number] if mixed and not _upstream_builds_layers() else config
        original(self, own, layer_idx, *args, **kwargs)
        skip = getattr(config.per_layer_config[number], "skip", ()) if mixed else ()
        skip_sublayers(self, number, skip, architecture, head_dim_of(config))
        for path in provenance.get("added_biases", {}).get(str(number), ()):
            readers = (architecture.attention.output, architecture.mlp.down)
            if path not in readers:
                raise CheckpointError(
                    f"`{PROVENANCE_KEY}.added_biases` in config.json should name {' or '.join(readers)}. Found "
                    f"{path!r}. Is the checkpoint whole, and from a source that you trust?"
                )
            module = self.get_submodule(path)
            add_bias(module, _outputs(module))
        view = LayerConfigView(config, number)
        for module in self.modules():
            if module.__dict__.get("config") is own and own is not config:
                module.config = view

    init._adaprune = names  # type: ignore[attr-defined]
    layer_class.__init__ = init  # type: ignore[method-assign]


def _outputs(module: nn.Module) -> int:
    size = getattr(module, "out_features", None) or getattr(module, "nf", None)
    assert size is not None
    return int(size)


def _architecture_or_none(config: Any) -> Any:
    try:
        return known_architecture(config)
    except UnsupportedModelError:
        return None
