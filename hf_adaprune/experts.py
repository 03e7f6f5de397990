"""Fused experts with a tap: a way to see and change what each expert's down projection reads.

transformers 5 keeps all experts of a layer in two three-dimensional parameters and computes them in one function, so no
module hook reaches the channels. Its registry of experts implementations does: while a tap is open, the tapped modules
run the eager computation below, which hands the channels of every expert to the tap.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["ExpertTap", "tapped_experts"]

# (expert, tokens it serves [tokens], channels [tokens, channels], gates [tokens])
# -> channels to go on with, and the down projection [hidden, channels] to use instead of the expert's own
ExpertTap = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]

_IMPLEMENTATION = "adaprune_tapped"
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
