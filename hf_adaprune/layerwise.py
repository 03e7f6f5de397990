"""Repairs that walk a model layer after layer, with one layer's moments in memory at a time.

Two streams of activations go through the layers: the dense model's, and the pruned and repaired model's. The model
itself stays dense: pruned layers are masked, or optimised as copies.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from .activations import ActivationStore
from .compensation import Repair, check_enough_tokens, counted_windows, repair_from_moments
from .config import RepairConfig
from .masking import masked
from .offloading import check_layer, layer_weights
from .plan import PruningPlan, SitePlan, split_site_name
from .run_artefacts import kept_repair, read_repair
from .run_folder import RunFolder
from .sites import ModelSites
from .surgery import cut_layer
from .token_blocks import TokenBlocks
from .walk import Walk

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
    walk = Walk(sites, blocks, domain_weights, store, with_dense=config.target_mix > 0)
    counted = walk.length * sum(weight > 0 for weight in walk.weights)
    check_enough_tokens(sites, counted, config, dict(plan.changed()))
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


def _repairs_of(walk: Walk, own: PruningPlan, config: RepairConfig) -> dict[str, Repair]:
    """Repairs of a layer's sites, each on what the ones before it make of the inputs."""
    repairs: dict[str, Repair] = {}
    done: dict[str, SitePlan] = {}
    for name, kept in own.sites.items():
        site = walk.sites.by_name[name]
        if not kept.is_whole and not kept.is_empty:
            before = PruningPlan(own.model_type, own.num_layers, dict(done))
            moments = walk.moments(site, kept, before, repairs, config.target_mix)
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
    domain_weights: tuple[float, ...] = (),
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
        domain_weights (`tuple[float, ...]`, *optional*): one weight per domain of the windows; how often a window is
            learned from, and how much its error counts. Windows of weight 0 are left out.

    Returns:
        `tuple`: weights by layer (old numbers) and parameter name, for layers whose error on the checked windows fell;
        and for every cut layer its name, the error before and after.
    """
    walk = Walk(sites, counted_windows(blocks, domain_weights), domain_weights)
    # Equal weights become ones to the last bit, and a product with one changes nothing.
    shares = [weight / max(walk.weights) for weight in walk.weights]
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
                block = _Block(walk, number, student, pruned, target, shares)
                before = block.error(check)
                block.optimise(learn, config, generator)
                after = block.error(check)
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


def _of_layer(repairs: Mapping[str, Repair], number: int) -> dict[str, Repair]:
    return {name: repair for name, repair in repairs.items() if split_site_name(name)[0] == number}


def part_of_plan(plan: PruningPlan, number: int) -> PruningPlan:
    """What a plan says of one layer's sites: nothing where the whole layer goes, which stays here."""
    stays = number not in plan.dropped_layers
    own = {name: kept for name, kept in plan.sites.items() if stays and split_site_name(name)[0] == number}
    return PruningPlan(plan.model_type, plan.num_layers, own)


@dataclass(frozen=True)
class _Block:
    """A cut layer (the student), its inputs in the pruned model, and what the dense layer makes of its own inputs.

    Args:
        walk ([`Walk`]): how layers are called.
        number (`int`): of the layer.
        student (`nn.Module`): the cut layer, float32.
        hidden, target (`torch.Tensor` of shape `[windows, tokens, hidden]`): inputs, and outputs to come near to.
        shares (`tuple[float, ...]`): what a window's error counts, at most 1.
    """

    walk: Walk
    number: int
    student: nn.Module
    hidden: torch.Tensor
    target: torch.Tensor
    shares: Sequence[float]

    def difference(self, window: int) -> torch.Tensor:
        """Output less target of one window, `[tokens, hidden]`, float32 on the student's device."""
        device, half = next(self.student.parameters()).device, self.walk.dtype == torch.bfloat16
        hidden = self.hidden[window][None].to(device, torch.float32)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            output = self.walk.call(self.number, hidden, self.student)
        return output[0].float() - self.target[window].to(device).float()

    @torch.no_grad()
    def error(self, windows: torch.Tensor) -> float:
        """Mean squared difference over windows, each by its share."""
        own = windows.tolist()
        errors = sum(self.shares[window] * float(self.difference(window).square().mean()) for window in own)
        return errors / sum(self.shares[window] for window in own)

    def optimise(self, windows: torch.Tensor, config: RepairConfig, generator: torch.Generator) -> None:
        """Adam steps on the student's parameters, in place; `regional_steps` of them, of a few windows each."""
        self.student.requires_grad_(True)
        optimizer = torch.optim.Adam(self.student.parameters(), lr=config.regional_learning_rate, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, config.regional_steps))
        scale = self.target.float().square().mean().clamp(min=1e-12)
        with torch.enable_grad():
            for _ in range(config.regional_steps):
                chosen = _drawn(windows, self.shares, generator)
                optimizer.zero_grad(set_to_none=True)
                for window in chosen.tolist():
                    (self.difference(window).square().mean() / scale / len(chosen)).backward()
                optimizer.step()
                schedule.step()
        self.student.requires_grad_(False)


def _drawn(windows: torch.Tensor, shares: Sequence[float], generator: torch.Generator) -> torch.Tensor:
    """The windows of an optimiser step: each as often as its share says, in the mean over steps."""
    own = torch.tensor(shares, dtype=torch.float64)[windows]
    if bool((own == own[0]).all()):
        return windows[torch.randperm(len(windows), generator=generator)[:WINDOWS_PER_STEP]]
    # Only with replacement is a window drawn in proportion to its share, however few there are.
    many = min(WINDOWS_PER_STEP, len(windows))
    return windows[torch.multinomial(own, many, replacement=True, generator=generator)]
