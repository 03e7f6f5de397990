"""An optimizer goes on after a cut: moments are cut like parameters, what left is forgotten, what came is added."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

__all__ = ["OptimizerFollower"]


class OptimizerFollower:
    """Follows a cut: pass `follower.follow` to [`hf_adaprune.apply_plan`], and call `finish` afterwards.

    Moments of a parameter's own shape (Adam's, a momentum) are cut like the parameter: bit for bit what a new optimizer
    holds that is given the cut moments. State of another shape (Adafactor's factors, 8-bit blocks) is dropped, and
    starts anew. Learning rates, steps and hyperparameters stay.

    Args:
        optimizer (`torch.optim.Optimizer`): or accelerate's wrapper of one.
        model (`nn.Module`): the model before it is cut.
    """

    def __init__(self, optimizer: Any, model: nn.Module) -> None:
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.model = model
        order = {id(parameter): number for number, parameter in enumerate(model.parameters())}
        # Trainer fills its groups in the model's order, and a resumed run would again: additions have to keep to it.
        self.ordered = [
            _ascending([order[id(parameter)] for parameter in group["params"] if id(parameter) in order])
            for group in self.optimizer.param_groups
        ]
        self.before = set(order)

    def follow(self, parameter: nn.Parameter, select: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Cut the state of a parameter that is about to be cut.

        Args:
            parameter (`nn.Parameter`): still whole.
            select (`Callable`): cuts a tensor of its shape.
        """
        state = self.optimizer.state.get(parameter)
        if not state:
            return
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
        if any(value.shape != parameter.shape for value in tensors.values()):
            del self.optimizer.state[parameter]
            return
        for name, value in tensors.items():
            state[name] = select(value)

    def finish(self) -> None:
        """Forget parameters that left the model, and take in those that came (biases of a repair)."""
        present = {id(parameter): number for number, parameter in enumerate(self.model.parameters())}
        held: set[int] = set()
        for group in self.optimizer.param_groups:
            gone = [p for p in group["params"] if id(p) in self.before and id(p) not in present]
            for parameter in gone:
                self.optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if all(p is not other for other in gone)]
            held |= {id(p) for p in group["params"]}
        new = [p for p in self.model.parameters() if id(p) not in self.before and p.requires_grad and id(p) not in held]
        if not new:
            return
        groups = self.optimizer.param_groups
        # A bias decays nowhere in Trainer; a group of its own would be one more than the scheduler knows.
        number = max((n for n, group in enumerate(groups) if not group.get("weight_decay")), default=len(groups) - 1)
        merged = [*groups[number]["params"], *new]
        if self.ordered[number]:
            merged.sort(key=lambda p: present.get(id(p), -1))
        groups[number]["params"] = merged


def _ascending(numbers: Iterable[int]) -> bool:
    values = list(numbers)
    return values == sorted(values)
