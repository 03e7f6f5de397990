"""A live model takes the structure of a checkpoint that is about to be loaded into it, narrower or wider.

`Trainer` loads checkpoints with `model.load_state_dict`, which refuses other shapes. A hook before it reads the shapes
that come and rebuilds the model's modules to fit: a run can resume after a cut, and go back to a denser best model.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .architectures import Architecture
from .errors import AdaPruneError, CheckpointError
from .model_config import update_config
from .optimizer_state import OptimizerFollower
from .plan import PruningPlan, SitePlan
from .site import Matrix, Site
from .sites import ModelSites, find_sites
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
        optimizer (`Optimizer`, *optional*): made by the user before the model takes its new structure. What leaves the
            model leaves it, too, and what comes is added, so that it takes the checkpoint's state.
    """

    def __init__(
        self,
        model: Any,
        architecture: Architecture | None,
        known: Callable[[], Iterable[PruningPlan]],
        optimizer: Any = None,
    ) -> None:
        self.architecture, self.known, self.optimizer = architecture, known, optimizer
        self._model = weakref.ref(model)
        self.config = copy.deepcopy(model.config)
        self.handle = model.register_load_state_dict_pre_hook(self._before_load)

    def __deepcopy__(self, memo: dict[int, Any]) -> Restorer:
        """The same: a copy of the model must not copy the callback behind `known`, and the Trainer behind that."""
        return self

    def watches(self, model: Any) -> bool:
        """Whether it is this very model, and no copy of it.

        Args:
            model (`PreTrainedModel`): to compare.
        """
        return self._model() is model

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
        layers = sites.architecture.layers + "."
        if _fits(own, incoming, layers):
            return
        whole = _is_whole(own, incoming, layers)
        # A shard says nothing of the layers that are in others: what they hold by now has to stay.
        known = incoming if whole else {**{name: value.shape for name, value in own.items()}, **incoming}
        like = self.dense(model)
        plan = self._plan_of(like, known, incoming)
        biases = _added_biases(like, known)
        cut = apply_plan(like, plan)
        if biases:
            _give_biases(cut, biases)
        missing = [name for name, _ in cut.model.named_parameters() if name.startswith(layers) and name not in known]
        if whole and missing and (renamed := _unknown(incoming, like, layers)):
            raise CheckpointError(
                f"the checkpoint calls weights by other names than the model ({renamed[0]}, ...), as transformers does "
                "with mixtures of experts, whose checkpoints no Trainer resumes. Begin a new run from "
                "AutoModelForCausalLM.from_pretrained(CHECKPOINT), with the cuts that are left."
            )
        if whole and missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} weights of the layers ({missing[0]}, ...): whole layers or "
                "sublayers were removed, and no pruning_plan.json in output_dir says which. Resume in the folder of "
                "the first run, or build the Trainer with AutoModelForCausalLM.from_pretrained(CHECKPOINT)."
            )
        logger.info("the checkpoint has other sizes than the model, which takes them on.")
        follower = None
        if self.optimizer is not None and self.watches(model):
            follower = OptimizerFollower(self.optimizer, model)
        take_structure(sites, cut)
        if follower is not None:
            follower.finish()

    def _plan_of(
        self, dense: ModelSites, known: Mapping[str, torch.Size], incoming: Mapping[str, torch.Size]
    ) -> PruningPlan:
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
            found = _site_of(site, names, known, incoming)
            if found is not None:
                sites[site.name] = found
        return PruningPlan(dense.architecture.model_type, len(dense.layers), sites)


def _fits(own: Mapping[str, torch.Tensor], incoming: Mapping[str, torch.Size], layers: str) -> bool:
    """Whether a state dict, or one shard of it, goes into parameters as they are."""
    if any(own[name].shape != shape for name, shape in incoming.items() if name in own):
        return False
    if any(name not in own for name in incoming if name.startswith(layers)):
        return False
    # Only a whole state dict can show what is missing.
    return not _is_whole(own, incoming, layers) or all(name in incoming for name in own if name.startswith(layers))


def _is_whole(own: Mapping[str, torch.Tensor], incoming: Mapping[str, torch.Size], layers: str) -> bool:
    """Whether a state dict is no shard: it brings everything outside of the layers, embeddings and final norm."""
    return all(name in incoming for name in own if not name.startswith(layers))


def _site_of(
    site: Site, names: Mapping[int, str], known: Mapping[str, torch.Size], incoming: Mapping[str, torch.Size]
) -> SitePlan | None:
    """What the shapes say of a site: how many units, numbered from the first; values come with the checkpoint.

    A shard may hold some matrices of a site: what they say counts, and the others follow as little as they have to.
    """
    if site.kind == "attention" and site.refusal:
        return None

    def rows(writer: Matrix, shapes: Mapping[str, torch.Size]) -> int | None:
        shape = shapes.get(names[id(writer.parameter)])
        return None if shape is None else shape[-1 if writer.transposed else -2]

    def columns(shapes: Mapping[str, torch.Size]) -> int | None:
        shape = shapes.get(names[id(site.reader.parameter)])
        return None if shape is None else shape[-2 if site.reader.transposed else -1]

    here = names[id(site.reader.parameter)]
    first = site.writers[0]
    if site.kind == "experts":
        writer_name = names[id(first.parameter)]
        given = writer_name if writer_name in incoming and here not in incoming else here
        if given not in known:
            return None
        groups, per_group = known[given][0], known[given][-1 if given == here else -2]
        per_group = per_group if given == here else per_group // site.copies
        if given not in incoming and site.router is not None:
            groups = rows(site.router, incoming) or groups
    elif site.kind == "mlp":
        width, of_writer = columns(incoming), [rows(writer, incoming) for writer in site.writers]
        width = width or next((found // site.copies for found in of_writer if found), None) or columns(known)
        if width is None:
            return None
        groups, per_group = 1, width
    else:
        head = site.columns_per_unit
        now_columns, now_rows = columns(known), rows(site.writers[-1], known)
        if now_columns is None or now_rows is None:
            return None
        if site.fused:
            units = (columns(incoming) or now_columns) // head
            heads = (rows(first, incoming) or now_rows) // head
            groups = (heads - units) // 2
            if not 0 < groups <= site.groups or units % groups or units // groups > site.group_size:
                if columns(incoming):
                    groups = max(1, units // site.group_size)
                else:
                    groups = heads // (site.group_size + 2)
                    units = groups * site.group_size
        else:
            units = (columns(incoming) or rows(first, incoming) or now_columns) // head
            told = [found // head for writer in site.writers[1:] if (found := rows(writer, incoming))]
            groups = told[0] if told else now_rows // head
            if units % groups or units // groups > site.group_size:
                if columns(incoming) or rows(first, incoming):
                    groups = max(1, units // site.group_size)
                else:
                    units = groups * site.group_size
        per_group = units // max(groups, 1)
    if groups > site.groups or per_group > site.group_size:
        raise CheckpointError(
            f"the checkpoint has {groups} x {per_group} units at {site.name}, the model that training began with only "
            f"{site.groups} x {site.group_size}. Build the Trainer with the model that the first run began with."
        )
    kept = tuple(group * site.group_size + unit for group in range(groups) for unit in range(per_group))
    return SitePlan(site.groups, site.group_size, kept)


def _unknown(incoming: Iterable[str], dense: ModelSites, layers: str) -> list[str]:
    """Names in layers that are no weight of the dense model, nor a bias that a repair gives to one."""
    own = {name for name, _ in dense.model.named_parameters()} | {name for name, _ in dense.model.named_buffers()}
    named = [name for name in incoming if name.startswith(layers) and name not in own]
    return [name for name in named if name.removesuffix("bias") + "weight" not in own]


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
