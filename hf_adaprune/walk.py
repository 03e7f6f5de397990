"""Two streams of activations on their way through the layers: the dense model's, and the pruned and repaired one's.

What a repair of one site needs to know is summed here: moments of what its reader reads on the pruned stream, and how
far that stream is behind the dense one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .activations import Activations, ActivationStore
from .compensation import Moments, Repair
from .errors import CalibrationError, StatisticsError
from .gram_sums import exact_products
from .masking import masked, other_forward
from .plan import PruningPlan, SitePlan
from .site import Site
from .sites import ModelSites
from .statistics import spread_weights, standing_weights
from .streaming import layer_calls
from .token_blocks import TokenBlocks
from .tracing import Enough, watched_inputs

__all__ = ["Walk"]


class Walk:
    """The two streams and how to push them through a layer.

    Args:
        sites ([`ModelSites`]): the dense model; untouched.
        blocks ([`TokenBlocks`]): calibration windows; those with padding are left out.
        domain_weights (`tuple[float, ...]`, *optional*): one weight per domain of the windows.
        store ([`ActivationStore`], *optional*): whose memory the activations take.
        with_dense (`bool`, *optional*, defaults to `True`): without it there is only the pruned model's stream.

    Raises:
        CalibrationError: no window is without padding.
    """

    def __init__(
        self,
        sites: ModelSites,
        blocks: TokenBlocks,
        domain_weights: tuple[float, ...] = (),
        store: ActivationStore | None = None,
        with_dense: bool = True,
    ) -> None:
        whole = torch.where(blocks.attention_mask.all(1))[0]
        weights = spread_weights(blocks.domain, len(blocks.domains), domain_weights)
        self.weights = standing_weights(weights, blocks.domain, whole).tolist()
        if not len(whole):
            raise CalibrationError(
                "a repair that walks layer after layer needs calibration windows without padding, and there is none. "
                "Give more text, lower calibration.sequence_length, or set repair.schedule='cached'."
            )
        self.sites = sites
        self.pruned, self.dense = Activations(store), Activations(store)
        self.passed = 0  # layers behind which the dense stream stands
        self._adds: dict[int, bool] = {}

        def sink(hidden: torch.Tensor) -> None:
            self.dtype = hidden.dtype
            for stream in (self.pruned, self.dense) if with_dense else (self.pruned,):
                stream.append(hidden[0])

        self.arguments = layer_calls(sites, blocks.select(whole), sink)
        self.length = blocks.input_ids.shape[1]
        self.tokens = len(whole) * self.length

    def close(self) -> None:
        """Let go of the activations."""
        self.pruned.close()
        self.dense.close()

    def call(self, number: int, hidden: torch.Tensor, layer: nn.Module | None = None) -> torch.Tensor:
        """Output of a layer for one window `[1, tokens, hidden]`."""
        args, kwargs = self.arguments[number]
        output = (self.sites.layers[number] if layer is None else layer)(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def run(self, number: int, hidden: Iterable[torch.Tensor], layer: nn.Module | None = None) -> torch.Tensor:
        """Outputs of a layer for all windows, `[windows, tokens, hidden]` on the CPU."""
        device = next(self.sites.layers[number].parameters()).device
        return torch.cat([self.call(number, window[None].to(device), layer).cpu() for window in hidden])

    @torch.no_grad()
    def advance(self, number: int, hidden: Activations) -> None:
        """Put the outputs of a layer in the place of its inputs.

        Raises:
            StatisticsError: the outputs are not finite.
        """
        device = next(self.sites.layers[number].parameters()).device
        for index, window in enumerate(hidden):
            hidden[index] = _finite(number, self.call(number, window[None].to(device))[0])

    def pass_dense(self, number: int) -> None:
        """Put the dense model's outputs of a layer in the place of its inputs, unless they are there."""
        if self.passed <= number:
            self.advance(number, self.dense)
            self.passed = number + 1

    @torch.no_grad()
    def moments(
        self, site: Site, kept: SitePlan, before: PruningPlan, repairs: Mapping[str, Repair], mix: float
    ) -> Moments:
        """Moments of a reader's inputs on the pruned stream; with `mix`, those of what the target has beside, too.

        With `mix` the dense stream passes the layer on the way, where the layer adds what its readers give; so the
        sites of a layer are asked for once, attention first.

        Args:
            site ([`Site`]): whose reader, still dense.
            kept ([`SitePlan`]): which inputs stay; moments with the others alone are not summed.
            before ([`PruningPlan`]): what the layer has lost already.
            repairs (`dict[str, Repair]`): of those sites.
            mix (`float`): share of the lag in the target.
        """
        device = site.reader.parameter.device
        experts = site.kind == "experts"
        width = site.group_size if experts else site.columns
        columns = torch.arange(width) if experts else site.column_index(kept)
        columns = columns.to(device)
        mixes = mix > 0 and not experts
        gram = torch.zeros(site.groups if experts else 1, width, len(columns), device=device)
        shift = torch.zeros(site.outputs if mixes else 0, len(columns), device=device)
        total, shift_total, tokens = torch.zeros(width, device=device), torch.zeros(len(shift), device=device), 0.0
        adds = mixes and self.adds(site.layer)
        assert not adds or site.kind == "mlp" or self.passed == site.layer
        if adds and site.kind == "mlp":
            self.pass_dense(site.layer)
        for window, weight in enumerate(self.weights):
            seen: dict[int, torch.Tensor] = {}
            hidden = self.pruned[window][None].to(device)
            with masked(self.sites, before, repairs):
                output = self._shown(site, hidden, seen, whole=adds and site.kind == "mlp")
            lag = self._lag(site, window, hidden, seen[0], output, adds) if mixes else None
            for expert, rows in seen.items():
                inner = rows if experts else rows.index_select(1, columns)
                with exact_products(torch.float32 if experts else self.dtype):
                    gram[expert if experts else 0] += weight * (rows.T @ inner)
                if not experts:
                    total, tokens = total + weight * rows.sum(0), tokens + weight * len(rows)
                if lag is not None:
                    with exact_products(torch.float32):
                        shift += weight * mix * (lag.T @ inner)
                    shift_total += weight * mix * lag.sum(0)
        if adds:
            self.passed = site.layer + 1
        if experts:
            count = max(1.0, sum(self.weights) * self.length)
            return Moments(gram.cpu().double() / count, torch.zeros(site.columns, dtype=torch.float64))
        mean = total.cpu().double() / tokens
        # In place: these are the largest matrices of the walk.
        centred = gram[0].cpu().double().div_(tokens).sub_(torch.outer(mean, mean[columns.cpu()]))
        if not mixes:
            return Moments(centred, mean)
        return Moments(centred, mean, shift.cpu().double().div_(tokens), shift_total.cpu().double() / tokens)

    def _shown(
        self, site: Site, hidden: torch.Tensor, seen: dict[int, torch.Tensor], whole: bool
    ) -> torch.Tensor | None:
        """Let a layer show what the site's reader reads, and its output where the whole of it has to run."""
        with _until_seen(site), _collects(self.sites, site, seen, whole):
            return self.call(site.layer, hidden)
        return None

    def _lag(
        self, site: Site, window: int, hidden: torch.Tensor, rows: torch.Tensor, output: torch.Tensor | None, adds: bool
    ) -> torch.Tensor:
        """How far the pruned model's residual stream is behind the dense model's after a sublayer, `[tokens, hidden]`.

        Where the layer does not add the reader's output as it is, how far that output alone is behind. Puts the dense
        window behind the layer where attention has made it run.
        """
        dense = self.dense[window].to(hidden.device)
        if output is not None:  # the MLP is the last to add, and the dense stream stands behind the layer
            return dense.float() - output[0].float()
        seen: dict[int, torch.Tensor] = {}
        after = self._shown(site, dense[None], seen, whole=adds)
        if after is not None:
            self.dense[window] = _finite(site.layer, after[0])
        with exact_products(torch.float32):
            lag = (seen[0] - rows) @ site.reader.weight.float().T
        return lag + dense.float() - hidden[0].float() if adds else lag

    @torch.no_grad()
    def adds(self, number: int) -> bool:
        """Whether a layer adds what its MLP's reader gives to the residual stream, without a norm in between.

        Tried on a window, because a layer's code may do anything: the reader's output is made as large as the stream,
        and the layer's output has to change by just that. At the reader's own size the change may drown in what a half
        precision stream is rounded by. Where an earlier run removed the MLP, attention's reader is tried: nothing
        behind it answers. Mixtures of experts (all that are built in) do.
        """
        if number not in self._adds:
            own = {site.kind: site for site in self.sites if site.layer == number}
            site = own.get("mlp", own.get("attention"))
            self._adds[number] = site is None or "experts" in own or self._adds_reader(site)
        return self._adds[number]

    def _adds_reader(self, site: Site) -> bool:
        """Whether a layer's output changes by what a reader's output changes by, where nothing else reads it."""
        hidden = self.pruned[0][None].to(site.reader.parameter.device)
        reads, factor, given = site.reader.module.forward, 1.0, torch.zeros(())

        def louder(*args: Any) -> torch.Tensor:
            nonlocal given
            given = reads(*args) * factor
            return given

        with other_forward(site.reader.module, louder):
            whole = self.call(site.layer, hidden).float()
            own = given.float().reshape(whole.shape)
            factor += float(whole.norm() / own.norm().clamp(min=1e-30))
            change = self.call(site.layer, hidden).float() - whole
        # As given: what a half precision product was rounded by is no fault of the layer. A norm lets nothing through.
        wanted = given.float().reshape(whole.shape) - own
        return float((change - wanted).norm()) <= 0.1 * float(wanted.norm())


def _finite(number: int, hidden: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(hidden).all():
        raise StatisticsError(
            f"layers.{number}: outputs are not finite while the layers are repaired one after the other. Load "
            "the model in bfloat16 or float32 and check its weights, or set repair.schedule='cached'."
        )
    return hidden


def _collects(sites: ModelSites, site: Site, seen: dict[int, torch.Tensor], whole: bool) -> Any:
    def sink(expert: int, rows: torch.Tensor) -> None:
        seen[expert] = rows.float()
        if site.kind != "experts" and not whole:
            raise Enough  # what follows the reader is of no use here

    return watched_inputs(sites, site, sink)


def _until_seen(site: Site) -> contextlib.AbstractContextManager[None]:
    return contextlib.suppress(*([] if site.kind == "experts" else [Enough]))
