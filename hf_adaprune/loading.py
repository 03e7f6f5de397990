"""What happens to transformers when this package is imported: a keyword of `from_pretrained`, layers built one by one.

Two methods of `PreTrainedModel` are wrapped, once: `from_pretrained` understands `pruning_config=`, and `__init__`
prepares the decoder layer class of models whose config gives their layers different sizes. Without such a keyword or
config both do exactly what they did. transformers (and with it torch) is not imported for this: where it is not there
yet, the wrap waits for it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .config import RECIPES, PruningConfig
from .errors import ConfigError

if TYPE_CHECKING:
    from .pipeline import PruningResult

__all__ = ["install", "result_of"]

_MODULE = "transformers.modeling_utils"
_TOKENIZER_KEYWORDS = (
    "revision",
    "token",
    "cache_dir",
    "subfolder",
    "local_files_only",
    "trust_remote_code",
    "gguf_file",
)
_results: weakref.WeakKeyDictionary[Any, PruningResult] = weakref.WeakKeyDictionary()


def install() -> None:
    """Wrap `PreTrainedModel`, now or as soon as transformers' modelling code is imported. Calling again is harmless."""
    module = sys.modules.get(_MODULE)
    if module is not None and hasattr(module, "PreTrainedModel"):
        _wrap(module)
    elif not any(isinstance(finder, _WaitsForModeling) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WaitsForModeling())


def result_of(model: Any) -> PruningResult | None:
    """The [`PruningResult`] of a model that `from_pretrained(..., pruning_config=...)` returned."""
    found = _results.get(model)
    return None if found is None else replace(found, model=model)


class _WaitsForModeling(importlib.abc.MetaPathFinder):
    """Finds one module, in the usual way, and has it wrapped after it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_wrap(module: ModuleType) -> None:
                run(module)
                _wrap(module)

            spec.loader.exec_module = run_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap(module: ModuleType) -> None:
    base = module.PreTrainedModel
    if getattr(base.__init__, "_adaprune", False):
        return
    build, load = base.__init__, base.from_pretrained.__func__

    @functools.wraps(build)
    def init(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        from .modeling import note_pruned, prepare_layer_class

        prepare_layer_class(self, config)
        build(self, config, *args, **kwargs)
        note_pruned(self, config)

    @functools.wraps(load)
    def from_pretrained(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        pruning_config = kwargs.pop("pruning_config", None)
        if pruning_config is None:
            return load(cls, pretrained_model_name_or_path, *args, **kwargs)
        config = _read_config(pruning_config)
        tokenizer = kwargs.pop("pruning_tokenizer", None)
        architecture = kwargs.pop("pruning_architecture", None)
        loaded = load(cls, pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        _prune_loaded(model, tokenizer, architecture, config, pretrained_model_name_or_path, kwargs)
        return loaded

    init._adaprune = True  # type: ignore[attr-defined]
    base.__init__ = init
    base.from_pretrained = classmethod(from_pretrained)


def _read_config(given: Any) -> PruningConfig:
    """A config, its fields, a recipe's name, or a folder or file that holds one; nothing is looked up on the Hub."""
    if isinstance(given, (str, os.PathLike)) and given not in RECIPES:
        if os.path.exists(given):
            return PruningConfig.from_pretrained(given)
        raise ConfigError(
            "`pruning_config` should be a PruningConfig, a mapping of its fields, the name of a recipe "
            f"({', '.join(sorted(RECIPES))}), or a folder or JSON file that holds one. Found {os.fspath(given)!r}, "
            "which is not there. PruningConfig.from_pretrained(name) reads one from the Hub."
        )
    return PruningConfig.read(given, "pruning_config")


def _prune_loaded(
    model: Any, tokenizer: Any, architecture: Any, config: PruningConfig, name: Any, kwargs: Mapping[str, Any]
) -> None:
    from .pipeline import prune
    from .stages import needs_text

    if tokenizer is None and needs_text(config):
        from transformers import AutoTokenizer

        if name is None:
            raise ConfigError(
                "the model has no name to load its tokenizer by. Pass pruning_tokenizer= beside pruning_config=."
            )
        known = {key: kwargs[key] for key in _TOKENIZER_KEYWORDS if kwargs.get(key) is not None}
        tokenizer = AutoTokenizer.from_pretrained(name, **known)
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            # What AutoTokenizer makes of a folder without tokenizer files.
            raise ConfigError(f"{name} brings no tokenizer. Pass pruning_tokenizer= beside pruning_config=.")
    # Without the model: a value that held its own key would keep both alive for ever.
    found = prune(model, tokenizer, config, architecture=architecture)
    _results[model] = replace(found, model=None)
