"""Statistics and scores with one decoder layer in memory at a time: the same numbers as from a pass over all layers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from .activations import ActivationStore
from .config import RECIPES, PruningConfig
from .errors import ConfigError
from .importance import Scores, mix_scores, needs_of, raw_scores, scored_kinds
from .layerwise import Kept, part_of_plan
from .masking import masked
from .metrics import METRICS, Context, block_influence
from .offloading import check_layer, layer_weights
from .plan import PruningPlan
from .quiet import quiet_bars, quiet_model
from .recording import collect_statistics
from .run_facts import bind_layer
from .run_folder import once
from .search_config import SPEEDS
from .sites import ModelSites
from .statistics import Needs, SiteStatistics, Statistics, mean_cosine
from .streaming import HiddenStream
from .token_blocks import TokenBlocks

__all__ = ["forward_only_config", "layer_part", "score_layers", "statistics_by_layer"]

logger = logging.getLogger(__name__)


def forward_only_config(config: PruningConfig) -> PruningConfig:
    """The config that a model in pieces can be pruned by: metrics that need a backward pass are left out.

    The scores of the recipe `default` all need one; those of `flap` stand in for them, with the repair of `default`.

    Raises:
        ConfigError: no other metric is left, or a field asks for what needs the whole model at once.
    """
    needs_of(config.importance)
    own = config.calibration
    refused = {
        "search": config.search is not None,
        "repair.regional_steps": config.repair.regional_steps > 0,
        "calibration.clusters": own.clusters > 0,
        "calibration.sources": any(source == "self" for source in (*own.sources, *own.report)),
        "budgets": bool(set(config.budgets) & set(SPEEDS)),
    }
    for name, asks in refused.items():
        if asks:
            what = {"calibration.sources": "the source `self`", "budgets": "a speed"}.get(name, f"`{name}`")
            raise ConfigError(
                f"{what} needs the whole model in memory, and prune_to_disk holds one layer. Leave it out, or call "
                "prune() on a model in memory."
            )
    config = config.with_changes(layer_by_layer=True)
    metrics = config.importance.metrics
    left = {name: weight for name, weight in metrics.items() if not _goes_back(METRICS[name].needs)}
    if left == metrics:
        return config
    gone = ", ".join(sorted(set(metrics) - set(left)))
    if any(left.values()):
        logger.warning("layer by layer there is no backward pass: scored by %s, without %s.", ", ".join(left), gone)
        return config.with_changes(importance={"metrics": left})
    if config.importance != RECIPES["default"].importance:
        raise ConfigError(
            f"layer by layer there is no backward pass, and every metric of `importance.metrics` needs one ({gone}). "
            "Score by wifv (recipe flap), wanda_sp or obs_greedy."
        )
    flap = RECIPES["flap"]
    logger.warning(
        "layer by layer there is no backward pass: scored as the recipe flap does, by wifv, not by %s.", gone
    )
    allocation = replace(config.allocation, method=flap.allocation.method, structure=flap.allocation.structure)
    return config.with_changes(importance=flap.importance, allocation=allocation)


def _goes_back(needs: Needs) -> bool:
    return needs.gradients or needs.elements


def layer_part(sites: ModelSites, number: int) -> ModelSites:
    """One layer of a model, and its sites."""
    own = tuple(site for site in sites if site.layer == number)
    return replace(sites, layers=nn.ModuleList([sites.layers[number]]), sites=own)


@torch.no_grad()
def statistics_by_layer(
    sites: ModelSites,
    blocks: TokenBlocks | None,
    needs: Needs | None,
    config: PruningConfig,
    current: PruningPlan | None = None,
    store: ActivationStore | None = None,
    done: frozenset[int] = frozenset(),
) -> Generator[tuple[ModelSites, Statistics | None], None, None]:
    """Statistics of one layer after the other.

    Args:
        sites ([`ModelSites`]): the model. Offloaded layers are in memory one at a time.
        blocks ([`TokenBlocks`], *optional*): calibration windows.
        needs ([`Needs`], *optional*): what to keep; without it layers are brought into memory and nothing is run.
        config ([`PruningConfig`]): where Gram matrices are held.
        current ([`PruningPlan`], *optional*): the model computes as if pruned so.
        store ([`ActivationStore`], *optional*): whose memory activations take.
        done (`frozenset[int]`, *optional*): layers that are run for the ones after them alone: sums, and nothing else.

    Yields:
        `tuple`: the layer, in memory until the next one is asked for, and its statistics, with one column of cosines.

    Raises:
        UnsupportedModelError: weights that are not finite.
    """
    stream = HiddenStream(sites, store)
    gone = () if current is None else current.dropped_layers
    asked = needs or Needs()
    if blocks is not None and config.calibration.domain_weights and len(blocks.domains) > 1:
        asked = replace(asked, per_domain=True)
    with quiet_model(sites.model), contextlib.closing(stream):
        for number in range(len(sites.layers)):
            part = layer_part(sites, number)
            with layer_weights(sites, number):
                check_layer(sites, number)
                statistics = None
                if needs is not None and blocks is not None:
                    own = PruningPlan(sites.architecture.model_type, len(sites.layers))
                    if current is not None:
                        dropped = tuple(layer for layer in gone if layer == number)
                        own = replace(part_of_plan(current, number), dropped_layers=dropped)
                    with stream.at(number, "input" if number in gone else "output"), masked(sites, own):
                        statistics = collect_statistics(
                            part,
                            blocks,
                            Needs() if number in done else asked,
                            gram_place="model" if config.gram_place == "model" else "cpu",
                            description="",
                        )
                yield part, statistics
                del statistics


def score_layers(
    sites: ModelSites,
    blocks: TokenBlocks | None,
    needs: Needs | None,
    config: PruningConfig,
    current: PruningPlan | None = None,
    store: ActivationStore | None = None,
    kept: Kept | None = None,
) -> tuple[Scores, torch.Tensor | None, Statistics | None]:
    """Score every unit of a model, layer after layer; moments of one layer exist at a time.

    Args:
        sites ([`ModelSites`]): the model.
        blocks ([`TokenBlocks`], *optional*): calibration windows.
        needs ([`Needs`], *optional*): what to keep.
        config ([`PruningConfig`]): metrics without backward passes; see [`forward_only_config`].
        current ([`PruningPlan`], *optional*): what an earlier round decided.
        store ([`ActivationStore`], *optional*): whose memory activations take.
        kept ([`Kept`], *optional*): where the scores of every layer are kept; its activations are not.

    Returns:
        `tuple`: scores, mean cosine of every layer's input and output `[layers]` where it was asked for, and, where
        text was read, the weighted sums of every site's inputs as statistics of one sample.
    """
    asked = config.importance
    kinds = scored_kinds(sites, config.units)
    names = [name for name, weight in asked.metrics.items() if weight > 0]
    raw: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    cosines, means = [], {}
    whole = _nothing()
    own_names = [name for name in names if not METRICS[name].needs.cosine]
    kept = kept or Kept()
    run, every = kept.run, range(len(sites.layers))
    done = frozenset(number for number in every if run is not None and run.read(kept.name(number)) is not None)
    layers = statistics_by_layer(sites, blocks, needs, config, current, store, done)
    bar = transformers_logging.tqdm(layers, total=len(sites.layers), desc="statistics", unit="layer")
    with contextlib.closing(layers), quiet_bars():
        for number, (part, found) in enumerate(bar):
            bind_layer(run, number, part.layers[0])
            make = partial(_layer_scores, part, found, own_names, kinds, config)
            measured = once(run, kept.name(number), make, lambda tensors: (tensors, None), lambda own, _: {**own})
            for name in own_names:
                raw[name].update({site.name: measured[f"{name} {site.name}"] for site in part})
            if found is None:
                continue
            whole = replace(found, sites={}, cosine=None)
            if "cosine" in measured:
                cosines.append(measured["cosine"])
            for site in part:
                means[site.name] = SiteStatistics(measured[f"mean {site.name}"], torch.zeros(1))
            del found, make
    whole = replace(whole, cosine=torch.cat(cosines, dim=1) if cosines else None)
    context = _context(whole, config)
    for name in names:
        if METRICS[name].needs.cosine:
            raw[name] = raw_scores(sites, kinds, name, context)
    influence = block_influence(context) if asked.metrics.get("block_influence") else None
    # In the order of the config, in which they are mixed.
    scores = mix_scores(sites, kinds, raw, asked, influence)
    mean = mean_cosine(whole, context.weights) if cosines else None
    tokens = (whole.tokens * context.weights).sum()[None]
    summed = replace(_nothing(), sites=means, tokens=tokens) if means else None
    return scores, mean, summed


def _layer_scores(
    part: ModelSites,
    found: Statistics | None,
    names: Sequence[str],
    kinds: Mapping[str, str],
    config: PruningConfig,
) -> dict[str, torch.Tensor]:
    """What is left of a layer's statistics: raw scores by metric and site, cosines, weighted sums of inputs."""
    context = _context(_nothing() if found is None else found, config)
    tensors = {}
    for name in names:
        tensors.update({f"{name} {site}": own for site, own in raw_scores(part, kinds, name, context).items()})
    if found is None:
        return tensors
    if found.cosine is not None:
        tensors["cosine"] = found.cosine
    for site in part:
        sums = found.sites[site.name].sums * context.weights[:, None]
        tensors[f"mean {site.name}"] = sums.sum(0, keepdim=True)
    return tensors


def _context(statistics: Statistics, config: PruningConfig) -> Context:
    asked = config.importance
    weights = statistics.sample_weights(config.calibration.domain_weights if len(statistics.domains) > 1 else ())
    return Context(statistics, weights, asked.reduction, asked.damping, asked.damping_scale, config.seed)


def _nothing() -> Statistics:
    none = torch.zeros(1)
    return Statistics({}, none, none.long(), ("none",), ("all",), none[:0].long(), None, "")
