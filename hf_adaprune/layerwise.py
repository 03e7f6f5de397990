"""Repairs that walk a model layer after layer, with one layer's moments in memory at a time.

Two streams of activations go through the layers: the dense model's, and the pruned and repaired model's. The model
itself stays dense: pruned layers are masked, or optimised as copies.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from .activations import Activations, ActivationStore
from .calibration import TokenBlocks
from .compensation import Moments, Repair, check_enough_tokens, repair_from_moments
from .config import RepairConfig
from .errors import CalibrationError, StatisticsError
from .gram_sums import exact_products
from .masking import masked
from .offloading import check_layer, layer_weights
from .plan import PruningPlan, SitePlan, split_site_name
from .run_artefacts import kept_repair, read_repair
from .run_folder import RunFolder
from .sites import ModelSites, Site
from .statistics import spread_weights
from .streaming import layer_calls
from .surgery import cut_layer
from .tracing import Enough, watched_inputs

__all__ = ["Kept", "part_of_plan", "regional_weights", "repairs_by_layer", "sequential_repairs"]

WINDOWS_PER_STEP = 4  # of an optimiser step of the regional repair


@dataclass(frozen=True)
class Kept:
    """Where a walk keeps what it made of every layer, so that a later one need not make it again.

    The activations are not kept: a later walk runs the layers, but computes no moments, solutions or optimiser steps
    for those that are done.

    Args:
        run ([`RunFolder`], *optional*): without one nothing is kept.
        place (`str`): name of the artefacts.
    """

    run: RunFolder | None = None
    place: str = ""

    def name(self, number: int) -> str:
        """The artefact of a layer."""
        return f"{self.place}/{number:04d}"

    def repair(self, number: int, make: Callable[[], dict[str, Repair]]) -> dict[str, Repair]:
        """A layer's repairs: the kept ones, or those that are made now."""
        return kept_repair(self.run, self.name(number), make)


def sequential_repairs(
    sites: ModelSites,
    plan: PruningPlan,
    blocks: TokenBlocks,
    config: RepairConfig,
    domain_weights: tuple[float, ...] = (),
    kept: Kept | None = None,
) -> dict[str, Repair]:
    """All repairs of [`repairs_by_layer`], by site name."""
    repairs: dict[str, Repair] = {}
    found = [] if kept is None else [read_repair(kept.run, kept.name(number)) for number in range(len(sites.layers))]
    if found and all(own is not None for own in found):  # nothing is left to walk for
        return {site: repair for own in found if own is not None for site, repair in own.items()}
    del found
    layers = repairs_by_layer(sites, plan, blocks, config, domain_weights, kept=kept)
    for _, own in transformers_logging.tqdm(layers, total=len(sites.layers), desc="sequential repair", unit="layer"):
        repairs.update(own)
    return repairs


@torch.no_grad()
def repairs_by_layer(
    sites: ModelSites,
    plan: PruningPlan,
    blocks: TokenBlocks,
    config: RepairConfig,
    domain_weights: tuple[float, ...] = (),
    store: ActivationStore | None = None,
    kept: Kept | None = None,
) -> Generator[tuple[int, dict[str, Repair]], None, None]:
    """Least squares on the activations that the pruned and repaired layers before really produce.

    Args:
        sites ([`ModelSites`]): the dense model; untouched. Offloaded layers are in memory one at a time.
        plan ([`PruningPlan`]): which units stay.
        blocks ([`TokenBlocks`]): calibration windows without padding.
        config ([`RepairConfig`]): `target_mix` 0 regresses on what the dense matrix makes of the pruned model's inputs,
            1 on what brings the residual stream behind the sublayer to where the dense model's is, so that a layer
            makes up for errors of those before it. Where a norm stands between reader and stream, on the dense model's
            own outputs (OSSCAR's full sequential target, 2403.12983).
        domain_weights (`tuple[float, ...]`, *optional*): one weight per domain of the windows.
        store ([`ActivationStore`], *optional*): whose memory the activations take.
        kept ([`Kept`], *optional*): where the repairs of every layer are kept.

    Yields:
        `tuple`: a layer's number and its repairs by site name. The layer is still dense and in memory, until the next
        one is asked for.

    Raises:
        CalibrationError: too few tokens, or no window without padding.
        StatisticsError: activations or a repair are not finite; with the name of the site or layer.
    """
    walk = _Walk(sites, blocks, domain_weights, store, with_dense=config.target_mix > 0)
    check_enough_tokens(sites, walk.tokens, config, dict(plan.changed()))
    with contextlib.closing(walk):
        for number in range(len(sites.layers)):
            with layer_weights(sites, number):
                check_layer(sites, number)
                own = part_of_plan(plan, number)
                repairs = (kept or Kept()).repair(number, partial(_repairs_of, walk, own, config))
                yield number, repairs
                if number not in plan.dropped_layers:
                    with masked(sites, own, repairs):
                        walk.advance(number, walk.pruned)
                if config.target_mix > 0:
                    walk.pass_dense(number)


def _repairs_of(walk: _Walk, own: PruningPlan, config: RepairConfig) -> dict[str, Repair]:
    """Repairs of a layer's sites, each on what the ones before it make of the inputs."""
    repairs: dict[str, Repair] = {}
    done: dict[str, SitePlan] = {}
    for name, kept in own.sites.items():
        site = walk.sites.by_name[name]
        if not kept.is_whole and not kept.is_empty:
            before = PruningPlan(own.model_type, own.num_layers, dict(done))
            moments = walk.moments(site, before, repairs, config.target_mix)
            repairs[name] = repair_from_moments(site, kept, moments, config)
            del moments
        done[name] = kept
    return repairs


def regional_weights(
    sites: ModelSites,
    plan: PruningPlan,
    repairs: Mapping[str, Repair],
    blocks: TokenBlocks,
    config: RepairConfig,
    seed: int,
    kept: Kept | None = None,
) -> tuple[dict[int, dict[str, torch.Tensor]], list[tuple[str, float, float]]]:
    """Optimise all matrices of each cut block against the dense block's output (regional optimisation).

    The idea of Wanda++ (2503.04992), for structured cuts: block after block, on the pruned model's inputs, a few Adam
    steps on the mean squared error to the dense block's output on the dense inputs.

    Args:
        sites ([`ModelSites`]): the dense model; untouched.
        plan ([`PruningPlan`]): which units stay.
        repairs (`dict[str, Repair]`): where the optimisation starts.
        blocks ([`TokenBlocks`]): calibration windows without padding; every eighth checks the result.
        config ([`RepairConfig`]): steps and learning rate.
        seed (`int`): of the order of windows.
        kept ([`Kept`], *optional*): where what was learned of every layer is kept.

    Returns:
        `tuple`: weights by layer (old numbers) and parameter name, for layers whose error on the checked windows fell;
        and for every cut layer its name, the error before and after.
    """
    walk = _Walk(sites, blocks)
    dense, pruned = (torch.stack(list(stream)) for stream in (walk.dense, walk.pruned))
    walk.close()
    check = torch.arange(0, len(dense), 8)
    learn = torch.tensor([window for window in range(len(dense)) if window % 8]) if len(dense) > 1 else check
    weights: dict[int, dict[str, torch.Tensor]] = {}
    report: list[tuple[str, float, float]] = []
    generator = torch.Generator().manual_seed(seed)
    for number in transformers_logging.tqdm(range(len(sites.layers)), desc="regional repair", unit="layer"):
        target = walk.run(number, dense)
        if number in plan.dropped_layers:
            dense = target
            continue
        student = copy.deepcopy(sites.layers[number]).float()
        # Cutting may put a repair's own tensors into the layer, and the optimiser writes into what is there.
        cut_layer(student, number, sites.architecture, plan, copy.deepcopy(_of_layer(repairs, number)))
        changed = any(split_site_name(name)[0] == number for name, _ in plan.changed())
        run, place = (None, "") if kept is None else (kept.run, kept.name(number))
        found = None if run is None or not changed else run.read(place)
        if changed:
            start = {name: value.detach().clone() for name, value in student.named_parameters()}
            if found is None:
                before = _block_error(walk, number, student, pruned, target, check)
                _optimise(walk, number, student, pruned, target, learn, config, generator)
                after = _block_error(walk, number, student, pruned, target, check)
                if run is not None:
                    learned = {f"weights {name}": value for name, value in student.named_parameters()}
                    run.keep(place, {**learned, "generator": generator.get_state()}, [before, after])
            else:
                tensors, (before, after) = found
                student.load_state_dict({name: tensors[f"weights {name}"] for name in start}, strict=False)
                generator.set_state(tensors["generator"])
            report.append((f"layers.{number}", before, after))
            if after < before:
                weights[number] = {n: p.detach().to(walk.dtype).clone() for n, p in student.named_parameters()}
            else:
                student.load_state_dict(start, strict=False)
        student.to(walk.dtype)
        pruned = walk.run(number, pruned, student)
        dense = target
    return weights, report


class _Walk:
    """The two streams and how to push them through a layer. Without `with_dense` there is only the pruned model's."""

    def __init__(
        self,
        sites: ModelSites,
        blocks: TokenBlocks,
        domain_weights: tuple[float, ...] = (),
        store: ActivationStore | None = None,
        with_dense: bool = True,
    ) -> None:
        whole = torch.where(blocks.attention_mask.all(1))[0]
        self.weights = spread_weights(blocks.domain, len(blocks.domains), domain_weights)[whole].tolist()
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
            StatisticsError: they are not finite.
        """
        device = next(self.sites.layers[number].parameters()).device
        for index, window in enumerate(hidden):
            after = self.call(number, window[None].to(device))[0]
            if not torch.isfinite(after).all():
                raise StatisticsError(
                    f"layers.{number}: outputs are not finite while the layers are repaired one after the other. Load "
                    "the model in bfloat16 or float32 and check its weights, or set repair.schedule='cached'."
                )
            hidden[index] = after

    def pass_dense(self, number: int) -> None:
        """Put the dense model's outputs of a layer in the place of its inputs, unless they are there."""
        if self.passed <= number:
            self.advance(number, self.dense)
            self.passed = number + 1

    @torch.no_grad()
    def moments(self, site: Site, before: PruningPlan, repairs: Mapping[str, Repair], mix: float) -> Moments:
        """Moments of a reader's inputs on the pruned stream; with `mix`, those of what the target has beside, too."""
        device = site.reader.parameter.device
        experts = site.kind == "experts"
        width = site.group_size if experts else site.columns
        mixes = mix > 0 and not experts
        gram = torch.zeros(site.groups if experts else 1, width, width, device=device)
        shift = torch.zeros(site.outputs if mixes else 0, width, device=device)
        total, shift_total, tokens = torch.zeros(width, device=device), torch.zeros(len(shift), device=device), 0.0
        adds = mixes and self.adds(site.layer)
        if adds and site.kind == "mlp":
            self.pass_dense(site.layer)
        for window, weight in enumerate(self.weights):
            seen: dict[int, torch.Tensor] = {}
            hidden = self.pruned[window][None].to(device)
            with masked(self.sites, before, repairs):
                output = self._shown(site, hidden, seen, whole=adds and site.kind == "mlp")
            lag = self._lag(site, window, hidden, seen[0], output, adds) if mixes else None
            for expert, rows in seen.items():
                with exact_products(torch.float32 if experts or mixes else self.dtype):
                    gram[expert if experts else 0] += weight * (rows.T @ rows)
                    if lag is not None:
                        shift += weight * mix * (lag.T @ rows)
                if not experts:
                    total, tokens = total + weight * rows.sum(0), tokens + weight * len(rows)
            if lag is not None:
                shift_total += weight * mix * lag.sum(0)
        if experts:
            count = max(1.0, sum(self.weights) * self.length)
            return Moments(gram.cpu().double() / count, torch.zeros(site.columns, dtype=torch.float64))
        mean = total.cpu().double() / tokens
        # In place: these are the largest matrices of the walk.
        centred = gram[0].cpu().double().div_(tokens).sub_(torch.outer(mean, mean))
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

        Where the layer does not add the reader's output as it is, how far that output alone is behind.
        """
        dense = self.dense[window].to(hidden.device)
        if output is not None:  # the MLP is the last to add, and the dense stream stands behind the layer
            return dense.float() - output[0].float()
        seen: dict[int, torch.Tensor] = {}
        self._shown(site, dense[None], seen, whole=False)
        lag = (seen[0] - rows) @ site.reader.weight.float().T
        return lag + dense.float() - hidden[0].float() if adds else lag

    @torch.no_grad()
    def adds(self, number: int) -> bool:
        """Whether a layer adds what its MLP's reader gives to the residual stream, without a norm in between.

        Tried on a window, because a layer's code may do anything. Mixtures of experts (all that are built in) do.
        """
        site = next((own for own in self.sites if own.layer == number and own.kind == "mlp"), None)
        if site is None:
            return True
        if number not in self._adds:
            hidden = self.pruned[0][None].to(site.reader.parameter.device)
            seen: dict[int, torch.Tensor] = {}
            whole = self._shown(site, hidden, seen, whole=True)
            assert whole is not None
            silent = SitePlan(site.groups, site.group_size, ())
            plan = PruningPlan(self.sites.architecture.model_type, len(self.sites.layers), {site.name: silent})
            with masked(self.sites, plan):
                without = self.call(number, hidden)
            own = seen[0] @ site.reader.weight.float().T
            if site.reader.bias is not None:
                own = own + site.reader.bias.float()
            parts = [part.reshape(own.shape).float() for part in (whole, without)]
            size = own.abs() + parts[0].abs() + parts[1].abs()
            error = (parts[0] - parts[1] - own).abs() / size.clamp(min=1e-30)
            self._adds[number] = float(error.median()) <= max(8 * torch.finfo(self.dtype).eps, 1e-5)
        return self._adds[number]


def _collects(sites: ModelSites, site: Site, seen: dict[int, torch.Tensor], whole: bool) -> Any:
    def sink(expert: int, rows: torch.Tensor) -> None:
        seen[expert] = rows.float()
        if site.kind != "experts" and not whole:
            raise Enough  # what follows the reader is of no use here

    return watched_inputs(sites, site, sink)


def _until_seen(site: Site) -> contextlib.AbstractContextManager[None]:
    return contextlib.suppress(*([] if site.kind == "experts" else [Enough]))


def _of_layer(repairs: Mapping[str, Repair], number: int) -> dict[str, Repair]:
    return {name: repair for name, repair in repairs.items() if split_site_name(name)[0] == number}


def part_of_plan(plan: PruningPlan, number: int) -> PruningPlan:
    """What a plan says of one layer's sites: nothing where the whole layer goes, which stays here."""
    stays = number not in plan.dropped_layers
    own = {name: kept for name, kept in plan.sites.items() if stays and split_site_name(name)[0] == number}
    return PruningPlan(plan.model_type, plan.num_layers, own)


def _block_error(
    walk: _Walk, number: int, student: nn.Module, hidden: torch.Tensor, target: torch.Tensor, windows: torch.Tensor
) -> float:
    call = _float_call(walk, number, student)
    with torch.no_grad():
        errors = [(call(hidden[w][None])[0].cpu() - target[w].float()).square().mean() for w in windows.tolist()]
    return float(sum(errors) / len(windows))


def _float_call(walk: _Walk, number: int, student: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    device = next(student.parameters()).device

    def call(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=walk.dtype == torch.bfloat16):
            return walk.call(number, hidden.to(device, torch.float32), student).float()

    return call


def _optimise(
    walk: _Walk,
    number: int,
    student: nn.Module,
    hidden: torch.Tensor,
    target: torch.Tensor,
    windows: torch.Tensor,
    config: RepairConfig,
    generator: torch.Generator,
) -> None:
    student.requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters(), lr=config.regional_learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, config.regional_steps))
    call = _float_call(walk, number, student)
    scale = target.float().square().mean().clamp(min=1e-12)
    with torch.enable_grad():
        for _ in range(config.regional_steps):
            chosen = windows[torch.randperm(len(windows), generator=generator)[:WINDOWS_PER_STEP]]
            optimizer.zero_grad(set_to_none=True)
            for window in chosen.tolist():
                wanted = target[window].float().to(next(student.parameters()).device)
                loss = (call(hidden[window][None])[0] - wanted).square().mean() / scale / len(chosen)
                loss.backward()
            optimizer.step()
            schedule.step()
    student.requires_grad_(False)
