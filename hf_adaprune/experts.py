"""Fused experts with a tap: a way to see and change what each expert's down projection reads.

transformers 5 keeps all experts of a layer in two three-dimensional parameters and computes them in one function, so no
module hook reaches the channels. Its registry of experts implementations does: while a tap is open, the tapped modules
run the eager computation below, which hands the channels of every expert to the tap.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["ExpertTap", "balance_by_layer", "tapped_experts"]

# (expert, tokens it serves [tokens], channels [tokens, channels], gates [tokens])
# -> channels to go on with, and the down projection [hidden, channels] to use instead of the expert's own
ExpertTap = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]

_IMPLEMENTATION = "adaprune_tapped"
_LOSS = "load_balancing_loss_func"
_open_taps: dict[int, list[ExpertTap]] = {}


def _tapped_forward(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    output = torch.zeros_like(hidden_states)
    gate_up, down = module.gate_up_proj, module.down_proj
    for expert in torch.unique(top_k_index).tolist():
        if expert >= module.num_experts:
            continue
        tokens, position = torch.where(top_k_index == expert)
        gate, up = nn.functional.linear(hidden_states[tokens], gate_up[expert]).chunk(2, dim=-1)
        channels = module.act_fn(gate) * up
        gates = top_k_weights[tokens, position]
        reader = down[expert]
        for tap in _open_taps.get(id(module), ()):
            channels, other = tap(expert, tokens, channels, gates)
            reader = reader if other is None else other
        contribution = nn.functional.linear(channels, reader) * gates[:, None]
        output = output.index_add(0, tokens, contribution.to(output.dtype))
    return output


@contextlib.contextmanager
def tapped_experts(config: Any, taps: Mapping[nn.Module, ExpertTap]) -> Iterator[None]:
    """Run the experts modules of `taps` through their taps while the context is open.

    Args:
        config (`PreTrainedConfig`): the model's config; its experts implementation is switched and restored.
        taps (`dict[nn.Module, ExpertTap]`): experts modules and what sees their channels. Taps nest: an inner one sees
            what an outer one returned.
    """
    if not taps:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(_IMPLEMENTATION, _tapped_forward)
    before = config._experts_implementation
    for module, tap in taps.items():
        _open_taps.setdefault(id(module), []).append(tap)
    config._experts_implementation = _IMPLEMENTATION
    try:
        yield
    finally:
        config._experts_implementation = before
        for module, tap in taps.items():
            _open_taps[id(module)].remove(tap)
            if not _open_taps[id(module)]:
                del _open_taps[id(module)]


def balance_by_layer(model: nn.Module) -> None:
    """Let the router's loss of a model's family count every layer with its own number of experts.

    transformers adds up the layers expert by expert, with one number of experts for all. Its function, wrapped once,
    is called for the layers of each number in turn; the loss is their mean, weighted by how many layers there are.
    Where all layers have as many experts as the model states, nothing changes.

    Args:
        model (`nn.Module`): a mixture of experts, whole or about to be built.
    """
    for cls in type(model).__mro__:
        module: Any = sys.modules.get(cls.__module__)
        original = vars(module).get(_LOSS) if module is not None else None
        if original is not None:
            if not hasattr(original, "_adaprune"):
                setattr(module, _LOSS, _by_layer(original))
            return


def _by_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def loss(gate_logits: Any, num_experts: int | None = None, *args: Any, **kwargs: Any) -> Any:
        counts = sorted({own.shape[-1] for own in gate_logits}) if isinstance(gate_logits, tuple) else []
        if not counts or counts == [num_experts]:
            return original(gate_logits, num_experts, *args, **kwargs)
        total: Any = 0.0
        for count in counts:
            layers = tuple(own for own in gate_logits if own.shape[-1] == count)
            found = original(layers, count, *args, **kwargs)
            total = total + found.to(gate_logits[0].device) * (len(layers) / len(gate_logits))
        return total

    loss._adaprune = True  # type: ignore[attr-defined]
    return loss
