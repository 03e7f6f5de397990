"""The model behaves as if pruned, inside a `with`: removed units contribute nothing, and no weight changes.

The only hooks that write. Law: masked equals cut.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .experts import ExpertTap, tapped_experts
from .plan import PruningPlan, SitePlan
from .site import Site
from .sites import ModelSites

if TYPE_CHECKING:
    from .compensation import Repair

__all__ = ["masked", "other_forward"]


@contextlib.contextmanager
def masked(
    sites: ModelSites, plan: PruningPlan, repairs: Mapping[str, Repair] | None = None, *, narrow: bool = False
) -> Iterator[None]:
    """Let a model compute what it will compute after the plan is carried out.

    Args:
        sites ([`ModelSites`]): the model.
        plan ([`PruningPlan`]): which units stay.
        repairs (`dict[str, Repair]`, *optional*): by site name; the reader then works with the repaired weights.
        narrow (`bool`, *optional*, defaults to `False`): MLPs made of plain linear layers compute the kept channels
            alone, from copies of their rows: as fast as the pruned model. Nothing may look at an MLP's inner
            activations meanwhile.

    Raises:
        PlanError: the plan is for another model.

    Example:

    ```python
    with masked(find_sites(model), plan):
        loss = model(input_ids, labels=input_ids).loss
    ```
    """
    sites.check(plan)
    repairs = repairs or {}
    with contextlib.ExitStack() as stack:
        taps: dict[nn.Module, ExpertTap] = {}
        for name, kept in plan.changed():
            site = sites.by_name[name]
            if kept.is_empty:
                stack.callback(site.sublayer.register_forward_hook(_silent).remove)
            elif site.kind == "experts":
                taps[site.reader.module] = _expert_mask(site, kept, repairs.get(name))
                if len(kept.kept_groups) < site.groups and site.router is not None:
                    stack.enter_context(_closed_router(site, kept))
            elif narrow and _can_be_narrow(site):
                stack.enter_context(_narrow_mlp(site, kept, repairs.get(name)))
            elif name in repairs:
                stack.enter_context(_repaired_reader(site, kept, repairs[name]))
            else:
                mask = _column_mask(site, kept)
                stack.callback(site.reader.module.register_forward_pre_hook(_masks_input(mask)).remove)
        for layer in plan.dropped_layers:
            hook = sites.layers[layer].register_forward_hook(_passes_through, with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(tapped_experts(sites.model.config, taps))
        yield


def _column_mask(site: Site, kept: SitePlan) -> torch.Tensor:
    mask = torch.zeros(site.columns, dtype=torch.bool)
    mask[site.column_index(kept)] = True
    return mask.to(site.reader.parameter.device)


def _masks_input(mask: torch.Tensor) -> Any:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0] * mask.to(args[0].dtype), *args[1:])

    return hook


def _silent(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def _passes_through(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


@contextlib.contextmanager
def _repaired_reader(site: Site, kept: SitePlan, repair: Repair) -> Iterator[None]:
    module = site.reader.module
    weight = site.reader.parameter
    columns = site.column_index(kept).to(weight.device)
    new_weight = repair.weight.to(weight.device, weight.dtype)
    bias = repair.bias
    new_bias = site.reader.bias if bias is None else bias.to(weight.device, weight.dtype)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden.index_select(-1, columns), new_weight, new_bias)

    with other_forward(module, forward):
        yield


@contextlib.contextmanager
def other_forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let a module run another forward while the context is open; its hooks stay."""
    before = module.__dict__.get("forward")  # accelerate puts its own there
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before  # type: ignore[method-assign]


def _can_be_narrow(site: Site) -> bool:
    modules = [site.reader.module, *(writer.module for writer in site.writers)]
    return site.kind == "mlp" and all(type(m) is nn.Linear and "forward" not in m.__dict__ for m in modules)


@contextlib.contextmanager
def _narrow_mlp(site: Site, kept: SitePlan, repair: Repair | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for writer in site.writers:
            index = torch.tensor(kept.kept, device=writer.parameter.device)
            rows = torch.cat([index + copy * site.columns for copy in range(site.copies)])
            bias = None if writer.bias is None else writer.bias.detach().index_select(0, rows)
            stack.enter_context(_with_weights(writer.module, writer.weight.index_select(0, rows), bias))
        weight, bias = site.reader.weight, site.reader.bias
        columns = site.column_index(kept).to(weight.device)
        own = weight.index_select(1, columns) if repair is None else repair.weight.to(weight.device, weight.dtype)
        if repair is not None and repair.bias is not None:
            bias = repair.bias.to(weight.device, weight.dtype)
        stack.enter_context(_with_weights(site.reader.module, own, bias))
        yield


def _with_weights(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, weight, bias)

    return other_forward(module, forward)


def _expert_mask(site: Site, kept: SitePlan, repair: Repair | None) -> ExpertTap:
    mask = _column_mask(site, kept).reshape(site.groups, site.group_size)
    position = {expert: number for number, expert in enumerate(kept.kept_groups)}

    def tap(
        expert: int, tokens: torch.Tensor, channels: torch.Tensor, gates: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if repair is None or expert not in position:
            return channels * mask[expert].to(channels.dtype), None
        weight = repair.weight[position[expert]].to(channels.device, channels.dtype)
        return channels[:, mask[expert]], weight

    return tap


class _ClosesExperts(TorchFunctionMode):
    """While a router runs, the logits of removed experts are minus infinity: softmax and top-k run over the rest."""

    def __init__(self, weight: nn.Parameter, removed: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.removed = weight, removed

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if function is nn.functional.linear and args[1] is self.weight:
            return output.masked_fill(self.removed, float("-inf"))
        return output


@contextlib.contextmanager
def _closed_router(site: Site, kept: SitePlan) -> Iterator[None]:
    assert site.router is not None
    router = site.router.module
    removed = torch.ones(site.groups, dtype=torch.bool)
    removed[list(kept.kept_groups)] = False
    mode = _ClosesExperts(site.router.parameter, removed.to(site.router.parameter.device))

    def enter(module: nn.Module, args: Any) -> None:
        mode.__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        mode.__exit__(None, None, None)

    hooks = (router.register_forward_pre_hook(enter), router.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
