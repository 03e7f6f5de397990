"""What a run is about, as digests: with any of it changed, nothing that an earlier run kept is of use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .calibration import begin_token
from .config import PruningConfig, Source
from .documents import PYTHON_SOURCES
from .errors import RunError
from .plan import PruningPlan
from .run_folder import RunFolder, digest_of_file, once_noted
from .sites import ModelSites

__all__ = [
    "bind_layer",
    "bytes_digest",
    "config_facts",
    "model_bytes_digest",
    "run_facts",
    "source_digests",
    "text_digests",
    "tokenizer_digest",
]

# Fields of a model's config that change no logits, or that the weights tell: names, versions, labels, forms of output.
_NO_OUTPUTS = {
    "_name_or_path", "name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits", "id2label",
    "label2id", "problem_type",
}  # fmt: skip


def run_facts(
    sites: ModelSites, tokenizer: Any, config: PruningConfig, plan: PruningPlan | None, **more: Any
) -> dict[str, Any]:
    """What a run is about: with any of it changed, nothing that an earlier run kept is of use.

    Args:
        sites ([`ModelSites`]): the model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): its tokenizer.
        config ([`PruningConfig`]): how. More trials or minutes go on with a search.
        plan ([`PruningPlan`], *optional*): a plan that was given.
        **more: further facts by name, as JSON types.
    """
    from . import __version__

    asked = config.to_dict()
    asked.pop("version")
    for name in ("trials", "minutes", "redraw"):
        (asked["search"] or {}).pop(name, None)
    return {
        "version of hf_adaprune": __version__,
        "config": asked,
        "plan": None if plan is None else plan.digest,
        "tokenizer": None if tokenizer is None else tokenizer_digest(tokenizer),
        "texts": text_digests(config),
        "architecture": hashlib.sha256(repr(sites.architecture).encode()).hexdigest(),
        "model": config_facts(sites.model),
        **more,
    }


def text_digests(config: PruningConfig) -> dict[str, str]:
    """Digests of the files that a config reads, by role and name.

    Texts in memory have their digest in the config; a data set goes by its name, and `python` by the interpreter's
    version. A file that is not there has none: reading it tells.
    """
    own = config.calibration
    tasks = () if config.search is None else config.search.tasks
    roles = {"calibration text": own.sources, "selection text": own.selection, "report text": own.report}
    return source_digests({**roles, "task": tuple(tasks)})


def source_digests(roles: Mapping[str, tuple[Source, ...]]) -> dict[str, str]:
    """Digests of the files among some sources, by role and name.

    Args:
        roles (`dict[str, tuple]`): sources by what they are for.
    """
    import platform

    found = {}
    for role, sources in roles.items():
        for source in sources:
            if source in PYTHON_SOURCES:
                found[f"{role} {source}"] = platform.python_version()
            elif isinstance(source, str) and Path(source).expanduser().is_file():
                found[f"{role} {source}"] = digest_of_file(Path(source).expanduser())
    return found


def config_facts(model: Any) -> dict[str, Any]:
    """What a model's config says about its outputs, as JSON types: equal weights compute others with another one.

    Args:
        model (`PreTrainedModel`): the model.
    """
    said = {name: value for name, value in model.config.to_dict().items() if name not in _NO_OUTPUTS}
    # Implementations differ in more than the last bits where one leaves something out, such as Gemma 2's soft caps.
    said["attention implementation"] = getattr(model.config, "_attn_implementation", None)
    return json.loads(json.dumps(said, default=str))


def tokenizer_digest(tokenizer: Any) -> str:
    """A sha256 of everything that a tokenizer turns text into tokens by."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = sorted(tokenizer.get_vocab().items()) if backend is None else backend.to_str()
    said = [type(tokenizer).__name__, rules, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template]
    first = begin_token(tokenizer)
    said += [] if first is None else [first]  # windows begin with it
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def bytes_digest(named: Mapping[str, torch.Tensor]) -> str:
    """The sha256 of tensors: names, shapes, dtypes and all bytes.

    Args:
        named (`dict[str, torch.Tensor]`): in memory, on any device.
    """
    digest = hashlib.sha256()
    for name, tensor in named.items():
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_bytes_digest(sites: ModelSites) -> str:
    """The sha256 of all weights of a model in memory."""
    return bytes_digest(dict(sites.model.named_parameters()))


def bind_layer(run: RunFolder | None, number: int, layer: torch.nn.Module) -> None:
    """Write down what a layer's weights are, or compare them with what an earlier run found.

    For models whose layers are in memory one at a time.

    Args:
        run ([`RunFolder`], *optional*): the run.
        number (`int`): of the layer.
        layer (`nn.Module`): in memory.

    Raises:
        RunError: they are others.
    """
    if run is None:
        return
    digest = bytes_digest(layer.state_dict())
    if once_noted(run, f"weights/{number:04d}", lambda: digest) != digest:
        raise RunError(
            f"{run.place} is of a run that began with something else: weights of layer {number}. Give the same model "
            "to go on with it; to begin again, remove the folder (--fresh does), or choose another output."
        )
