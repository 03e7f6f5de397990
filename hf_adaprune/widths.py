"""What a plan keeps of every layer, as numbers: heads, channels, experts and parameters.

No weights, no heavy library.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .plan import PruningPlan

if TYPE_CHECKING:
    from .sites import ModelSites

__all__ = ["LayerWidths", "Pair", "layer_widths"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class LayerWidths:
    """What stays of one decoder layer. Pairs are (kept, dense); `None` where there are no such units, or nobody knows.

    Args:
        layer (`int`): its number before pruning.
        heads, groups (`tuple[int, int]`, *optional*): query heads and KV heads; nothing kept is a removed attention.
        channels (`tuple[int, int]`, *optional*): MLP channels, in a mixture of experts those of one expert.
        experts (`tuple[int, int]`, *optional*): experts.
        dropped (`bool`, *optional*): the whole layer goes.
        before, after (`int`, *optional*): parameters.
    """

    layer: int
    heads: Pair | None = None
    groups: Pair | None = None
    channels: Pair | None = None
    experts: Pair | None = None
    dropped: bool = False
    before: int | None = None
    after: int | None = None


def layer_widths(
    plan: PruningPlan, sites: ModelSites | None = None, after: Sequence[int] | None = None
) -> tuple[LayerWidths, ...]:
    """What a plan keeps of every layer, as numbers.

    A plan alone does not name what stays whole: such a site is taken to be as wide as the others of its kind were.

    Args:
        plan ([`PruningPlan`]): the plan.
        sites ([`ModelSites`], *optional*): the dense model, on the meta device too, for widths of what stays whole and
            for parameters.
        after (sequence of `int`, *optional*): parameters of the layers that stay, as they are after the cut, where a
            repair has added biases.

    Returns:
        `tuple[LayerWidths, ...]`: one per layer of the dense model.
    """
    dense: dict[str, Pair] = {name: (site.groups, site.group_size) for name, site in plan.sites.items()}
    if sites is not None:
        dense.update({site.name: (site.groups, site.group_size) for site in sites})
    kinds = ("attention", "mlp")
    usual = {kind: Counter(size for name, size in dense.items() if name.endswith(kind)) for kind in kinds}
    mixture = any(name.endswith("experts") for name in dense)
    positions = {old: new for new, old in enumerate(plan.kept_layers())}
    rows = []
    for layer in range(plan.num_layers):
        pairs: dict[str, Pair] = {}
        for kind in ("attention", "mlp", "experts"):
            name = f"layers.{layer}.{kind}"
            size = dense.get(name)
            if size is None and sites is None and usual.get(kind) and not (kind == "mlp" and mixture):
                size = usual[kind].most_common(1)[0][0]
            if size is None:
                continue
            kept = plan.sites.get(name)
            groups, per_group = (len(kept.kept_groups), kept.kept_per_group) if kept is not None else size
            if kind == "attention":
                pairs |= {"heads": (groups * per_group, size[0] * size[1]), "groups": (groups, size[0])}
            elif kind == "mlp":
                pairs["channels"] = (per_group, size[1])
            else:
                pairs |= {"experts": (groups, size[0]), "channels": (per_group, size[1])}
        before = own = None
        if sites is not None:
            named = [n for n in plan.sites if n.startswith(f"layers.{layer}.")]
            before = sites.layer_parameters[layer]
            own = before - sum(sites.by_name[name].removed_parameters(plan.sites[name]) for name in named)
        if after is not None and layer in positions:
            own = after[positions[layer]]
        dropped = layer in plan.dropped_layers
        sizes = LayerWidths(layer, dropped=dropped, before=before, after=0 if dropped and sites is not None else own)
        rows.append(replace(sizes, **pairs))  # type: ignore[arg-type]
    return tuple(rows)
