"""A live model takes the structure of a checkpoint that is about to be loaded into it, narrower or wider.

`Trainer` loads checkpoints with `model.load_state_dict`, which refuses other shapes. A hook before it reads the shapes
that come and rebuilds the model's modules to fit: a run can resume after a cut, and go back to a denser best model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .architectures import Architecture
from .errors import AdaPruneError, CheckpointError
from .model_config import update_config
from .plan import PruningPlan, SitePlan
from .sites import ModelSites, Site, find_sites
from .surgery import add_bias, apply_plan, take_structure

__all__ = ["Restorer"]

logger = logging.getLogger(__name__)


class Restorer:
    """Lets `load_state_dict` of a model take checkpoints that its plans describe.

    Widths are read off the shapes. Which layers and sublayers went, shapes alone do not say: that is looked up among
    `known` plans.

    Args:
        model (`PreTrainedModel`): the model as training begins.
        architecture ([`Architecture`], *optional*): of a family that is not built in.
        known (`Callable`): plans of checkpoints there are, relative to this model.
    """

    def __init__(
        self, model: Any, architecture: Architecture | None, known: Callable[[], Iterable[PruningPlan]]
    ) -> None:
        self.architecture, self.known = architecture, known
        self.config = copy.deepcopy(model.config)
        self.handle = model.register_load_state_dict_pre_hook(self._before_load)

    def close(self) -> None:
        """Take the hook away."""
        self.handle.remove()

    def dense(self, model: Any) -> ModelSites:
        """The structure that training began with, on the meta device."""
        with torch.device("meta"):
            return find_sites(type(model)(copy.deepcopy(self.config)), self.architecture)

    def _before_load(self, model: Any, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        incoming = {name.removeprefix(prefix): value.shape for name, value in state_dict.items()}
        adapters = [name for name in incoming if ".lora_" in name]
        own = dict(model.named_parameters())
        if adapters:
            if any(name in own and own[name].shape != incoming[name] for name in adapters):
                raise CheckpointError(
                    "these LoRA factors belong to a model of another size. Build the Trainer with the checkpoint's own "
                    "model: AutoModelForCausalLM.from_pretrained('CHECKPOINT/base'), then PeftModel.from_pretrained on "
                    "the checkpoint with is_trainable=True."
                )
            return
        sites = find_sites(model, self.architecture)
        if _fits(own, incoming, sites.architecture.layers + "."):
            return
        like = self.dense(model)
        plan = self._plan_of(like, incoming)
        biases = _added_biases(like, incoming)
        cut = apply_plan(like, plan)
        if biases:
            _give_biases(cut, biases)
        logger.info("the checkpoint has other sizes than the model, which takes them on.")
        take_structure(sites, cut)

    def _plan_of(self, dense: ModelSites, incoming: Mapping[str, torch.Size]) -> PruningPlan:
        for plan in self.known():
            try:
                trial = apply_plan(self.dense(dense.model), plan)
            except AdaPruneError:  # a plan of another model lies in the folder
                continue
            if _fits(dict(trial.model.named_parameters()), incoming, dense.architecture.layers + "."):
                return plan
        names = {id(parameter): name for name, parameter in dense.model.named_parameters()}
        sites = {}
        for site in dense:
            found = _site_of(site, names, incoming)
            if found is not None:
                sites[site.name] = found
        return PruningPlan(dense.architecture.model_type, len(dense.layers), sites)


def _fits(own: Mapping[str, torch.Tensor], incoming: Mapping[str, torch.Size], layers: str) -> bool:
    """Whether a state dict, or one shard of it, goes into parameters as they are."""
    if any(own[name].shape != shape for name, shape in incoming.items() if name in own):
        return False
    if any(name not in own for name in incoming if name.startswith(layers)):
        return False
    # Only a whole state dict can show what is missing: it brings embeddings and final norm.
    whole = all(name in incoming for name in own if not name.startswith(layers))
    return not whole or all(name in incoming for name in own if name.startswith(layers))


def _site_of(site: Site, names: Mapping[int, str], incoming: Mapping[str, torch.Size]) -> SitePlan | None:
    """What the shapes say of a site: how many units, numbered from the first; values come with the checkpoint."""
    shape = incoming.get(names[id(site.reader.parameter)])
    if shape is None:
        return None
    if site.kind == "experts":
        groups, per_group = shape[0], shape[2]
    else:
        columns = shape[0] if site.reader.transposed else shape[1]
        units = columns // site.columns_per_unit
        groups = 1
        if site.kind == "attention" and not site.refusal:
            writer = site.writers[0 if site.fused else 1]
            there = incoming.get(names[id(writer.parameter)])
            if there is None:
                return None
            rows = there[1] if writer.transposed else there[0]
            heads = rows // site.columns_per_unit
            groups = (heads - units) // 2 if site.fused else heads
        elif site.kind == "attention":
            return None
        per_group = units // groups
    if groups > site.groups or per_group > site.group_size:
        raise CheckpointError(
            f"the checkpoint has {groups} x {per_group} units at {site.name}, the model that training began with only "
            f"{site.groups} x {site.group_size}. Build the Trainer with the model that the first run began with."
        )
    kept = tuple(group * site.group_size + unit for group in range(groups) for unit in range(per_group))
    return SitePlan(site.groups, site.group_size, kept)


def _added_biases(dense: ModelSites, incoming: Mapping[str, torch.Size]) -> dict[int, list[str]]:
    """Biases that the checkpoint has at readers and the model has not, by layer."""
    names = {id(parameter): name for name, parameter in dense.model.named_parameters()}
    found: dict[int, list[str]] = {}
    for site in dense:
        name = names[id(site.reader.parameter)].removesuffix("weight") + "bias"
        if site.kind != "experts" and site.reader.bias is None and name in incoming:
            found.setdefault(site.layer, []).append(site.reader.path)
    return found


def _give_biases(sites: ModelSites, biases: Mapping[int, list[str]]) -> None:
    for site in sites:
        if site.reader.path in biases.get(site.layer, ()):
            add_bias(site.reader.module, site.reader.outputs)
    update_config(sites, biases)
