"""A pruned model for people without this package: one readable Python file beside the weights.

Checkpoints whose layers differ in size need `import hf_adaprune` until transformers builds layers from per-layer sizes
itself. Where that is too much to ask, the folder can carry the few lines that do it, as transformers' remote code:
`from_pretrained(..., trust_remote_code=True)`. The file imports torch and transformers, changes no class of theirs, and
is written from one template; the modules that stand in for removed sublayers are this package's own source.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from string import Template
from typing import Any

from .errors import CheckpointError, UnsupportedModelError
from .layers import LayerConfigView, SkippedAttention, SkippedMlp, is_layer_class
from .model_config import LOADING, PROVENANCE_KEY, known_architecture, provenance_of

__all__ = ["add_remote_code", "is_needed", "load_class", "module_name", "render"]

_PREFIX = "modeling_adaprune_"
_AUTO_CLASS = "AutoModelForCausalLM"

_TEMPLATE = Template('''\
"""$model_class with decoder layers that differ in size, for transformers without hf_adaprune.

    AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)

config.json says how large every layer is (`per_layer_config`), which sublayers were removed (its `skip`), and which
matrices have a bias that the family's config cannot state (`adaprune.added_biases`). Layers are built from that, and
everything else is $base_module. Written by hf_adaprune $version.
"""

import importlib.util
from typing import Any

import torch
from torch import nn
from $base_module import $layer_class
from $base_module import $model_class as _Base

# From then on transformers builds layers from their own sizes.
BUILT_IN = importlib.util.find_spec("transformers.integrations.heterogeneity.modeling_utils") is not None


$modules


LAYERS = $layers
# What stands where a sublayer was removed: path in the layer, module.
ATTENTION = (($attention, SkippedAttention),)
MLP = $mlp


class $model_class(_Base):
    """$model_class, its layers built one by one."""

    def __init__(self, config, *args, **kwargs):
        count = config.num_hidden_layers
        if BUILT_IN:
            super().__init__(config, *args, **kwargs)
        else:
            config.num_hidden_layers = 0  # so that no layer is built from the global sizes
            try:
                super().__init__(config, *args, **kwargs)
            finally:
                config.num_hidden_layers = count
        layers = self.get_submodule(LAYERS)
        for number in range(len(layers), count):
            layers.append(_build_layer(config, number))
        for number, layer in enumerate(layers):
            _finish_layer(config, number, layer)
        self.post_init()

    @classmethod
    def is_custom_code(cls):
        return False  # or the renamings between stored and live weights of the family would not be applied

    # transformers reads these two off the source of a class's module, and the attention is in the base's.
    @classmethod
    def _can_set_attn_implementation(cls):
        return _Base._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls):
        return _Base._can_set_experts_implementation()


def _build_layer(config, number):
    own = config.per_layer_config[number]
    layer = $layer_class(own, number)
    # `own` is a copy, which later changes of the model's config would not reach.
    for module in layer.modules():
        if module.__dict__.get("config") is own and own is not config:
            module.config = LayerConfigView(config, number)
    return layer


def _finish_layer(config, number, layer):
    read = config._getattr_without_heterogeneous_validation
    head_dim = read("head_dim", None) or config.hidden_size // read("num_attention_heads")
    skip = getattr(config.per_layer_config[number], "skip", ())
    for kind, places in (("attention", ATTENTION), ("mlp", MLP)):
        for path, stand_in in places if kind in skip else ():
            parent, _, name = path.rpartition(".")
            module = stand_in(number, head_dim) if stand_in is SkippedAttention else stand_in()
            setattr(layer.get_submodule(parent), name, module)
    for path in (getattr(config, $provenance, None) or {}).get("added_biases", {}).get(str(number), ()):
        module = layer.get_submodule(path)
        if module.bias is None:
            outputs = getattr(module, "out_features", None) or module.nf
            module.bias = nn.Parameter(module.weight.new_zeros(outputs))
''')


def module_name(model_type: str) -> str:
    """Name of the file, without its ending."""
    return _PREFIX + model_type


def is_needed(config: Any) -> bool:
    """Whether plain transformers cannot build a model of this config.

    Args:
        config (`PreTrainedConfig`): of a pruned model.
    """
    return bool(getattr(config, "is_heterogeneous", False) or provenance_of(config).get("added_biases"))


def render(model_class: type, config: Any) -> str:
    """The text of the file for a pruned model.

    Args:
        model_class (`type`): class of the model.
        config (`PreTrainedConfig`): its config.

    Raises:
        UnsupportedModelError: the class is not one of transformers' own, so a file that imports transformers alone
            cannot build it.
    """
    from . import __version__

    architecture = known_architecture(config)
    base = _base_of(model_class)
    module = sys.modules.get(base.__module__) if base is not None else None
    if base is None or not is_layer_class(getattr(module, architecture.layer_class, None)):
        raise UnsupportedModelError(
            f"remote code is written for classes that transformers brings. {model_class.__name__} is not one of them: "
            "save without remote_code, and publish its own code with it."
        )
    stand_ins = [(architecture.mlp.module, "SkippedMlp")]
    if not architecture.mlp.module:
        # The layer itself holds the matrices: the writer passes its input on and the reader returns nothing.
        stand_ins = [*((path, "nn.Identity") for path in architecture.mlp.up), (architecture.mlp.down, "SkippedMlp")]
    sources = (inspect.getsource(thing).rstrip() for thing in (LayerConfigView, SkippedAttention, SkippedMlp))
    # Whatever comes from a config goes in as a literal, never as text.
    return _TEMPLATE.substitute(
        model_class=base.__name__,
        base_module=base.__module__,
        layer_class=architecture.layer_class,
        layers=repr(architecture.layers),
        attention=repr(architecture.attention.module),
        mlp="(" + " ".join(f"({path!r}, {name})," for path, name in stand_ins) + ")",
        modules="\n\n\n".join(sources),
        provenance=repr(PROVENANCE_KEY),
        version=__version__,
    )


def _base_of(model_class: type) -> type | None:
    """The class of transformers' own that a model class is, or extends."""
    return next((cls for cls in model_class.__mro__ if cls.__module__.startswith("transformers.models.")), None)


def add_remote_code(folder: Path, model_class: type, config: Any) -> Path | None:
    """Put the file into a checkpoint's folder and name it in its config.json; `model_type` and `architectures` stay.

    Args:
        folder (`Path`): the checkpoint.
        model_class (`type`): class of the model.
        config (`PreTrainedConfig`): its config.

    Returns:
        `Path`, *optional*: the file; none for a model that plain transformers loads.

    Raises:
        UnsupportedModelError: see [`render`].
    """
    if not is_needed(config):
        return None
    name = module_name(config.model_type)
    file = folder / f"{name}.py"
    file.write_text(render(model_class, config), encoding="utf-8")
    base = _base_of(model_class)
    assert base is not None
    place = folder / "config.json"
    data = json.loads(place.read_text(encoding="utf-8"))
    # The class has the name of the one it extends: a model loaded with it saves the same `architectures` again.
    data["auto_map"] = {**data.get("auto_map", {}), _AUTO_CLASS: f"{name}.{base.__name__}"}
    data[PROVENANCE_KEY] = {**data.get(PROVENANCE_KEY, {}), "loading": f"{LOADING}, or pass it trust_remote_code=True"}
    place.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return file


def load_class(folder: Path) -> type | None:
    """The model class in a folder that [`add_remote_code`] has written just now; runs that file.

    Only for files of this package's own making: what a stranger's folder holds is for `trust_remote_code=True`.

    Args:
        folder (`Path`): the checkpoint.

    Raises:
        CheckpointError: the file does not define the class.
    """
    reference = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map", {}).get(_AUTO_CLASS)
    if reference is None or not reference.startswith(_PREFIX):
        return None
    name, _, class_name = reference.partition(".")
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # a __pycache__ has no place in a checkpoint
    sys.modules[name] = module  # transformers looks its classes' modules up there
    try:
        spec.loader.exec_module(module)
        return getattr(module, class_name)
    except Exception as error:
        del sys.modules[name]
        raise CheckpointError(f"the remote code of this checkpoint does not run: {error}. Please report it.") from error
    finally:
        sys.dont_write_bytecode = before
