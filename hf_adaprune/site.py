"""One site: the matrices that write and read its units, which rows and columns are a unit's, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .plan import SitePlan, site_name

__all__ = ["GROUP_UNITS", "WIDTH_UNITS", "Matrix", "Site"]

WIDTH_UNITS = {
    "channel": "mlp",
    "kv_group": "attention",
    "query_head": "attention",
    "expert": "experts",
    "expert_channel": "experts",
}
GROUP_UNITS = frozenset({"kv_group", "expert"})


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight of a layer, seen as `[outputs, inputs]` whatever the module stores.

    Args:
        path (`str`): path in the layer.
        module (`nn.Module`): the owner.
        name (`str`): the parameter's name in its owner.
        transposed (`bool`): stored as `[inputs, outputs]` (transformers' `Conv1D`).
    """

    path: str
    module: Any
    name: str = "weight"
    transposed: bool = False

    @property
    def parameter(self) -> nn.Parameter:
        """The stored parameter."""
        return getattr(self.module, self.name)

    @property
    def weight(self) -> torch.Tensor:
        """The weight as `[outputs, inputs]` (experts: `[experts, outputs, inputs]`); a view, detached."""
        weight = self.parameter.detach()
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias `[outputs]`, if the module has one."""
        return getattr(self.module, "bias", None)

    @property
    def outputs(self) -> int:
        """Number of outputs."""
        return self.weight.shape[-2]

    @property
    def inputs(self) -> int:
        """Number of inputs."""
        return self.weight.shape[-1]


@dataclass(frozen=True, eq=False)
class Site:
    """One kind of unit in one layer.

    Args:
        layer (`int`): layer number.
        kind (`str`): `attention`, `mlp` or `experts`.
        sublayer (`nn.Module`): its (first) output is what the sublayer adds to the residual stream.
        reader (`Matrix`): reads the units; `[outputs, columns]`, for experts `[experts, outputs, columns per expert]`.
        writers (`tuple[Matrix, ...]`): write the units, each once in the order query, key, value or gate, up.
        groups, group_size (`int`): see [`SitePlan`].
        columns_per_unit (`int`): reader columns of a unit: the head size, or 1.
        copies (`int`): how often a fused MLP or expert writer holds the units (`[gate | up]`: 2).
        fused (`bool`): query, key and value are one matrix `[query | key | value]`.
        router (`Matrix`, *optional*): the matrix that chooses experts, `[experts, hidden]`.
        refusal (`str`): why the width of the site cannot change; empty where it can.
    """

    layer: int
    kind: str
    sublayer: nn.Module
    reader: Matrix
    writers: tuple[Matrix, ...]
    groups: int
    group_size: int
    columns_per_unit: int
    copies: int = 1
    fused: bool = False
    router: Matrix | None = None
    refusal: str = ""

    @property
    def name(self) -> str:
        """`layers.3.mlp`."""
        return site_name(self.layer, self.kind)

    @property
    def columns(self) -> int:
        """Reader columns in all: heads times head size, channels, or channels of all experts."""
        return self.groups * self.group_size * self.columns_per_unit

    @property
    def outputs(self) -> int:
        """Outputs of the reader: the hidden size."""
        return self.reader.outputs

    @property
    def whole(self) -> SitePlan:
        """The plan that keeps everything."""
        return SitePlan.whole(self.groups, self.group_size)

    def units(self, kind: str) -> int:
        """How many units of a width kind the site has; group kinds count groups."""
        return self.groups if kind in GROUP_UNITS else self.groups * self.group_size

    def fold(self, columns: torch.Tensor, kind: str) -> torch.Tensor:
        """Reader columns by unit: `[..., columns]` to `[..., units, columns per unit]`.

        Query heads of one KV head are neighbours (`repeat_kv`), so grouped-query columns fold as
        `[kv_groups, queries, head_dim]`.
        """
        units = self.units(kind)
        return columns.reshape(*columns.shape[:-1], units, columns.shape[-1] // units)

    def column_index(self, kept: SitePlan) -> torch.Tensor:
        """Reader columns that stay, `[columns kept]`. For experts they count through all experts."""
        units = torch.tensor(kept.kept, dtype=torch.long)
        offsets = torch.arange(self.columns_per_unit)
        return (units[:, None] * self.columns_per_unit + offsets).flatten()

    def row_index(self, writer: int, kept: SitePlan) -> torch.Tensor:
        """Rows of a writer that stay, `[rows kept]` (attention and MLP)."""
        units = self.column_index(kept)
        if self.kind == "mlp":
            width = self.columns
            return torch.cat([units + copy * width for copy in range(self.copies)])
        groups = torch.tensor(kept.kept_groups, dtype=torch.long)
        heads = (groups[:, None] * self.columns_per_unit + torch.arange(self.columns_per_unit)).flatten()
        if self.fused:
            query = self.columns
            key = self.groups * self.columns_per_unit
            return torch.cat([units, query + heads, query + key + heads])
        return units if writer == 0 else heads

    def writer_units(self, writer: int, kind: str, rows: torch.Tensor) -> torch.Tensor | None:
        """Rows of a writer by unit: `[rows, ...]` to `[units, ...]`, summed; `None` where the rows are no unit's own.

        Key and value rows belong to a KV group; a single query head has none.

        Args:
            writer (`int`): which writer.
            kind (`str`): the width unit.
            rows (`torch.Tensor`): one number per row, `[rows]` (experts: `[experts, rows]`).
        """
        units = self.units(kind)
        if self.kind == "experts":
            per_channel = rows.reshape(self.groups, self.copies, self.group_size).sum(1)
            return per_channel.reshape(units, -1).sum(1)
        if self.kind == "mlp":
            return rows.reshape(self.copies, units).sum(0)
        if self.fused:
            query, key = self.columns, self.groups * self.columns_per_unit
            total = rows[:query].reshape(units, -1).sum(1)
            if kind == "kv_group":
                total = total + rows[query : query + key].reshape(units, -1).sum(1)
                total = total + rows[query + key :].reshape(units, -1).sum(1)
            return total
        if writer > 0 and kind == "query_head":
            return None
        return rows.reshape(units, -1).sum(1)

    def unit_parameters(self, kind: str) -> int:
        """Parameters that go with one unit of a width kind (biases of writers included).

        For units that leave in equal numbers from every group this is the share of one unit.
        """
        hidden = self.reader.outputs
        inputs = self.writers[0].inputs
        if self.kind == "experts":
            per_channel = hidden + self.copies * inputs
            if kind == "expert_channel":
                return per_channel
            return per_channel * self.group_size + (self.router.inputs if self.router else 0)
        biases = tuple(writer.bias is not None for writer in self.writers)
        if self.kind == "mlp":
            return hidden + sum(self.copies * (inputs + bias) for bias in biases)
        query, key, value = biases if len(biases) == 3 else biases * 3
        head = self.columns_per_unit
        per_query = head * (hidden + inputs + query)
        if kind == "query_head":
            return per_query
        return per_query * self.group_size + head * (2 * inputs + key + value)

    def owned_parameters(self) -> Iterator[nn.Parameter]:
        """What goes when the whole sublayer is removed, each once."""
        owners: list[nn.Module] = [self.sublayer, self.reader.module, *(writer.module for writer in self.writers)]
        yield from {id(p): p for owner in owners for p in owner.parameters()}.values()

    @property
    def sublayer_parameters(self) -> int:
        """Parameters that go when the whole sublayer is removed."""
        return sum(p.numel() for p in self.owned_parameters())

    def removed_parameters(self, kept: SitePlan) -> int:
        """Parameters that a plan for this site removes."""
        if kept.is_whole:
            return 0
        if kept.is_empty:
            return self.sublayer_parameters
        group_kind, single_kind = {
            "attention": ("kv_group", "query_head"),
            "experts": ("expert", "expert_channel"),
            "mlp": ("channel", "channel"),
        }[self.kind]
        if self.kind == "mlp":
            return (kept.units - len(kept.kept)) * self.unit_parameters("channel")
        groups = len(kept.kept_groups)
        whole_groups = (self.groups - groups) * self.unit_parameters(group_kind)
        singles = groups * (self.group_size - kept.kept_per_group) * self.unit_parameters(single_kind)
        return whole_groups + singles
