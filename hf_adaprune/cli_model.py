"""The model that a command line names: looked at without its weights first, then loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import AdaPruneError, ConfigError, MissingDependencyError, UnsupportedModelError
from .whole_files import place_of, room_for, scratch_folder

if TYPE_CHECKING:
    from .config import PruningConfig
    from .sites import ModelSites

__all__ = ["Loader", "layers_of"]


@dataclass(frozen=True)
class Loader:
    """Where a model comes from, and how it is opened.

    Args:
        name (`str`): folder or id on the Hub.
        dtype (`torch.dtype`): of the weights, or `"auto"`.
        device (`str`, *optional*): where it goes.
        options (`dict[str, Any]`): of `from_pretrained`.
    """

    name: str
    dtype: Any
    device: str | None
    options: Mapping[str, Any]

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Loader:
        """The loader that a command line names.

        Raises:
            ConfigError: no such dtype.
        """
        import torch

        dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype, None)
        if dtype not in ("auto", torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ConfigError(f"`--dtype` should be auto, bfloat16, float16 or float32. Found {arguments.dtype!r}.")
        options = {"revision": arguments.revision, "gguf_file": arguments.gguf_file}
        options["trust_remote_code"] = arguments.trust_remote_code or None
        return cls(arguments.model, dtype, arguments.device, {k: v for k, v in options.items() if v is not None})

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except AdaPruneError:
            raise
        except ImportError as error:
            raise MissingDependencyError(f"{what} of {self.name} needs a library that is missing: {error}") from error
        except (OSError, ValueError, KeyError, RuntimeError, AssertionError) as error:  # the last: torch without CUDA
            raise UnsupportedModelError(f"{what} of {self.name} could not be loaded: {error}") from error

    def skeleton(self) -> Any:
        """The model's sites, without weights; refused where no pruning could follow."""
        from transformers import AutoConfig
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        from .skeleton import bound_skeleton

        with self._told("the config"):
            config = AutoConfig.from_pretrained(self.name, **self.options)
        if getattr(config, "quantization_config", None) and "gguf_file" not in self.options:
            raise UnsupportedModelError(
                f"{self.name} holds quantised weights. Prune first and quantise the result: name the "
                "checkpoint with the original weights, or a GGUF file with --gguf-file."
            )
        named = list(getattr(config, "architectures", None) or ())
        known: set[str] = set()
        for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            known.update([entry] if isinstance(entry, str) else entry)
        if named and not known & set(named) and "auto_map" not in config.__dict__:
            raise UnsupportedModelError(
                f"{self.name} is a {named[0]}, which is no causal language model (an encoder, or a decoder without its "
                "head). Name a decoder that AutoModelForCausalLM loads."
            )
        remote = {"trust_remote_code": True} if self.options.get("trust_remote_code") else {}
        with self._told("the model"):
            return bound_skeleton(config, None if self.dtype == "auto" else self.dtype, **remote)

    def model(self) -> Any:
        """The model with its weights."""
        from transformers import AutoModelForCausalLM, GgufConfig

        options = dict(self.options)
        if "gguf_file" in options:
            options["quantization_config"] = GgufConfig(dequantize=True)
        with self._told("the model"):
            model: Any = AutoModelForCausalLM.from_pretrained(self.name, dtype=self.dtype, **options)
            return model if self.device is None else model.to(self.device)

    def prune_to_disk(
        self, sites: ModelSites, tokenizer: Any, config: PruningConfig, output: Path, **options: Any
    ) -> Any:
        """Prune the model with its layers left on disk; see [`hf_adaprune.prune_to_disk`].

        Args:
            sites ([`ModelSites`]): the skeleton.
            tokenizer (`PreTrainedTokenizerBase`, *optional*): the model's.
            config ([`PruningConfig`]): what to do.
            output (`Path`): folder of the pruned model.
            **options: of [`hf_adaprune.prune_to_disk`].
        """
        from .offloading import load_offloaded
        from .streamed import prune_to_disk

        if "gguf_file" in self.options:
            raise ConfigError(
                "`--layer-by-layer` reads layers out of safetensors files, and a GGUF file has to be dequantised "
                "whole. Leave out --layer-by-layer, or save the dequantised model first."
            )
        # Beside the output, where there is room for a model: transformers writes the experts of most mixtures there.
        with scratch_folder(room_for(output), f".{place_of(output).name}.loaded") as folder:
            with self._told("the model"):
                model = load_offloaded(self.name, sites, folder, self.device, dtype=self.dtype, **self.options)
            return prune_to_disk(model, tokenizer, config, output, **options)

    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        from transformers import AutoTokenizer

        with self._told("the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(self.name, **self.options)
            # Without its files some classes make an empty tokenizer, which turns every text into nothing.
            if len(tokenizer) <= len(tokenizer.all_special_ids):
                raise UnsupportedModelError(f"the tokenizer of {self.name} could not be loaded: its files are missing.")
            return tokenizer


def layers_of(model: Any, folder: Path) -> tuple[int, ...]:
    """Parameters of every layer of a pruned model: in memory, or in the folder that it was saved to."""
    from transformers import AutoConfig

    from .sites import find_sites
    from .skeleton import bound_skeleton

    sites = bound_skeleton(AutoConfig.from_pretrained(folder)) if model is None else find_sites(model)
    return sites.layer_parameters
