"""What of a run is worth keeping, and how it is written as tensors and JSON and read back."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .compensation import Repair
from .config import PruningConfig
from .elements import ELEMENT_TERMS
from .gram_sums import summing_bytes
from .importance import Scores
from .plan import PruningPlan
from .run_folder import RunFolder, digest_of_file, once
from .sites import ModelSites
from .statistics import SEGMENT, Needs, SiteStatistics, Statistics
from .token_blocks import TokenBlocks
from .workers import Alone

__all__ = [
    "kept_blocks",
    "kept_layer_scores",
    "kept_repair",
    "kept_scores",
    "kept_statistics",
    "read_repair",
    "repair_name",
    "statistics_bytes",
]

logger = logging.getLogger(__name__)

_WIDE = 4  # bytes of a float32
_FIELDS = ("sums", "counts", "squares", "gram", "first_order", "output_gradients")
_ELEMENTS = "elements "
_HEADER = 8  # bytes of the length that a safetensors file begins with

Texts = tuple[TokenBlocks | None, TokenBlocks | None, dict[str, TokenBlocks]]


# -- texts ------------------------------------------------------------------------------------------------------------


def kept_blocks(run: RunFolder | None, workers: Alone, make: Callable[[], Texts]) -> Texts:
    """Calibration, held-out and report windows: those of an earlier run, or those that are made now.

    Args:
        run ([`RunFolder`], *optional*): the run.
        workers ([`Alone`]): the processes; all have to call this.
        make (`Callable`): reads the texts.
    """
    found = None if run is None else run.read("pool")
    if not all(workers.gather([found is not None])):
        made = workers.each(make)
        if run is not None:
            workers.lead(lambda: run.keep("pool", *_packed_texts(made)))
        return made
    assert found is not None
    tensors, data = found
    blocks, held_out = (_unpacked_blocks(tensors, data, name) for name in ("blocks", "held_out"))
    reports = {name: _unpacked_blocks(tensors, data, f"report {name}") for name in data["reports"]}
    return blocks, held_out, {name: own for name, own in reports.items() if own is not None}


def _packed_texts(texts: Texts) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    blocks, held_out, reports = texts
    named = {"blocks": blocks, "held_out": held_out, **{f"report {name}": own for name, own in reports.items()}}
    tensors: dict[str, torch.Tensor] = {}
    domains: dict[str, list[str]] = {}
    for name, own in named.items():
        if own is not None:
            domains[name] = list(own.domains)
            parts = {"ids": own.input_ids, "mask": own.attention_mask, "domain": own.domain}
            tensors.update({f"{name} {part}": tensor for part, tensor in parts.items()})
    return tensors, {"domains": domains, "reports": list(reports)}


def _unpacked_blocks(tensors: Mapping[str, torch.Tensor], data: Any, name: str) -> TokenBlocks | None:
    if name not in data["domains"]:
        return None
    ids, mask, domain = (tensors[f"{name} {part}"] for part in ("ids", "mask", "domain"))
    return TokenBlocks(ids, mask, domain, tuple(data["domains"][name]))


# -- statistics -------------------------------------------------------------------------------------------------------


def statistics_bytes(
    sites: ModelSites, samples: int, sequence_length: int, domains: int, needs: Needs, gradient_samples: int
) -> int:
    """Bytes of the statistics of a pass.

    Args:
        sites ([`ModelSites`]): the model, on the meta device too.
        samples (`int`): windows.
        sequence_length (`int`): tokens of a window.
        domains (`int`): of the windows.
        needs ([`Needs`]): what is kept.
        gradient_samples (`int`): windows with gradients.
    """
    grams = (domains if needs.per_domain else 1) * needs.gram
    terms = domains * len(ELEMENT_TERMS) * needs.elements
    segments = -(-sequence_length // SEGMENT)
    graded = min(gradient_samples, samples) if needs.gradients else 0
    total = 0
    for site in sites:
        matrix = site.groups * site.group_size**2 if site.kind == "experts" else site.columns**2
        total += samples * site.columns * (1 + needs.squares) + grams * matrix
        total += graded * (segments * site.columns + site.outputs)
        total += terms * (site.columns + sum(own.weight.numel() // own.weight.shape[-1] for own in site.writers))
    return total * _WIDE


def kept_statistics(
    run: RunFolder | None,
    sites: ModelSites,
    blocks: TokenBlocks,
    needs: Needs,
    workers: Alone,
    collect: Callable[[str | None], Statistics],
    *,
    gradient_samples: int,
    gram_place: str,
    folder: str | None,
) -> Statistics:
    """Statistics of the dense model: those of an earlier run, or those that are collected now.

    Sites are kept one by one, so that no second copy of all is in memory; Gram matrices on disk are in the run's folder
    from the start, and stay mapped.

    Args:
        run ([`RunFolder`], *optional*): the run.
        sites ([`ModelSites`]): the dense model.
        blocks ([`TokenBlocks`]): the windows.
        needs ([`Needs`]): what the pass keeps.
        workers ([`Alone`]): the processes; all have to call this.
        collect (`Callable`): the pass, given a folder for Gram matrices on disk.
        gradient_samples (`int`): windows with gradients.
        gram_place (`str`): `model`, `cpu` or `disk`.
        folder (`str`, *optional*): for Gram matrices on disk where nothing is kept.

    Raises:
        CheckpointError: the disk lacks room.
    """
    if run is None:
        return collect(folder)
    found = _read_statistics(run, sites, blocks, needs, gram_place)
    if all(workers.gather([found is not None])):
        assert found is not None
        return found
    del found
    own = run
    samples, length = blocks.input_ids.shape
    size = statistics_bytes(sites, samples, length, len(blocks.domains), needs, gradient_samples)
    if gram_place == "disk" and needs.gram:  # what is summed lies there first, and takes a little more
        size = max(size, summing_bytes(sites, len(blocks.domains) if needs.per_domain else 1))
    workers.lead(lambda: own.check_space(size, "the statistics"))
    # Of several processes the first one keeps; the others' matrices on disk are of no further use.
    moments = str(run.folder("moments")) if gram_place == "disk" and run.writes else folder
    made = collect(moments)
    workers.lead(lambda: _keep_statistics(own, sites, made, needs, None if gram_place != "disk" else moments))
    return made


def _keep_statistics(
    run: RunFolder, sites: ModelSites, statistics: Statistics, needs: Needs, moments: str | None
) -> None:
    for name, own in statistics.sites.items():
        tensors = {field: getattr(own, field) for field in _FIELDS if getattr(own, field) is not None}
        tensors.update({f"{_ELEMENTS}{path}": terms for path, terms in own.elements.items()})
        data: dict[str, Any] = {"elements": list(own.elements)}  # files do not keep the order
        if moments is not None and "gram" in tensors:
            file = next(Path(moments).rglob(f"{name}.safetensors"))
            place = file.relative_to(run.place).as_posix()
            data |= {"file": place, "sha256": digest_of_file(file), "shape": list(tensors.pop("gram").shape)}
        run.keep(f"statistics/{name}", tensors, data)
    whole = {"tokens": statistics.tokens, "domain": statistics.domain, "gradient_index": statistics.gradient_index}
    if statistics.cosine is not None:
        whole["cosine"] = statistics.cosine
    said = {
        "sites": list(statistics.sites),
        "domains": list(statistics.domains),
        "gram_domains": list(statistics.gram_domains),
        "digest": statistics.digest,
        "needs": repr(needs),
    }
    run.keep("statistics", whole, said)


def _read_statistics(
    run: RunFolder, sites: ModelSites, blocks: TokenBlocks, needs: Needs, gram_place: str
) -> Statistics | None:
    found = run.read("statistics")
    if found is None or found[1]["digest"] != blocks.digest or found[1]["needs"] != repr(needs):
        return None
    whole, said = found
    kept: dict[str, SiteStatistics] = {}
    for name in said["sites"]:
        own = run.read(f"statistics/{name}")
        if own is None:
            return None
        tensors, data = own
        elements = {path: tensors[f"{_ELEMENTS}{path}"] for path in data["elements"]}
        fields = {key: tensor for key, tensor in tensors.items() if key in _FIELDS}
        if "file" in data:
            gram = _mapped(run.place / data["file"], data)
            if gram is None:
                run.damaged(f"statistics/{name}")
                return None
            fields["gram"] = gram
        elif gram_place == "model" and "gram" in fields:
            fields["gram"] = fields["gram"].to(sites.by_name[name].reader.parameter.device)
        kept[name] = SiteStatistics(**fields, elements=elements)
    logger.info("the statistics of an earlier run are used again.")
    return Statistics(
        kept,
        whole["tokens"],
        whole["domain"],
        tuple(said["domains"]),
        tuple(said["gram_domains"]),
        whole["gradient_index"],
        whole.get("cosine"),
        said["digest"],
    )


def _mapped(file: Path, data: Mapping[str, Any]) -> torch.Tensor | None:
    """The Gram matrices of a file, mapped into memory page by page as they were when they were filled."""
    try:
        if digest_of_file(file) != data["sha256"]:
            return None
        with file.open("rb") as opened:
            start = _HEADER + int.from_bytes(opened.read(_HEADER), "little")
    except OSError:
        return None
    # Copy-on-write: what a caller changes is not changed in the file.
    return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="c", offset=start, shape=tuple(data["shape"])))


def kept_scores(
    run: RunFolder | None, name: str, make: Callable[[], tuple[Scores, torch.Tensor | None]]
) -> tuple[Scores, torch.Tensor | None]:
    """Scores and mean cosines `[layers]` of a round: those of an earlier run, or those that are measured now.

    Args:
        run ([`RunFolder`], *optional*): the run.
        name (`str`): of the artefact.
        make (`Callable`): measures.
    """
    return once(run, name, make, _packed_scores, _unpacked_scores)


def kept_layer_scores(
    run: RunFolder | None, name: str, make: Callable[[], tuple[Scores, torch.Tensor | None, Statistics | None]]
) -> tuple[Scores, torch.Tensor | None, Statistics | None]:
    """[`kept_scores`] with the summed inputs of every site, which are statistics of one sample.

    Args:
        run ([`RunFolder`], *optional*): the run.
        name (`str`): of the artefact.
        make (`Callable`): measures.
    """

    def pack(measured: tuple[Scores, torch.Tensor | None, Statistics | None]) -> tuple[dict[str, torch.Tensor], Any]:
        tensors, data = _packed_scores(measured[:2])
        means = measured[2]
        if means is not None:
            tensors |= {f"sums {site}": own.sums for site, own in means.sites.items()} | {"tokens": means.tokens}
        return tensors, {**data, "sums": None if means is None else list(means.sites)}

    def unpack(tensors: Mapping[str, torch.Tensor], data: Any) -> tuple[Scores, torch.Tensor | None, Statistics | None]:
        scores, cosine = _unpacked_scores(tensors, data)
        if data["sums"] is None:
            return scores, cosine, None
        none = torch.zeros(1)
        sites = {site: SiteStatistics(tensors[f"sums {site}"], none) for site in data["sums"]}
        return (
            scores,
            cosine,
            Statistics(sites, tensors["tokens"], none.long(), ("none",), ("all",), none[:0].long(), None, ""),
        )

    return once(run, name, make, pack, unpack)


def _packed_scores(measured: tuple[Scores, torch.Tensor | None]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    scores, cosine = measured
    tensors = {f"units {name}": values for name, values in scores.units.items()}
    tensors["layers"] = scores.layers
    if cosine is not None:
        tensors["cosine"] = cosine
    return tensors, {"kinds": dict(scores.kinds), "sublayers": dict(scores.sublayers), "units": list(scores.units)}


def _unpacked_scores(tensors: Mapping[str, torch.Tensor], data: Any) -> tuple[Scores, torch.Tensor | None]:
    units = {name: tensors[f"units {name}"] for name in data["units"]}
    return Scores(units, data["kinds"], data["sublayers"], tensors["layers"]), tensors.get("cosine")


# -- repairs ----------------------------------------------------------------------------------------------------------


def repair_name(kind: str, config: PruningConfig, plan: PruningPlan) -> str:
    """Where the repairs of a plan are kept; those of another plan, or by another config, are elsewhere.

    Args:
        kind (`str`): of repair, such as `cached`.
        config ([`PruningConfig`]): whose `repair`, and domain weights.
        plan ([`PruningPlan`]): what is repaired.
    """
    said = json.dumps([plan.digest, replace(config, search=None).to_dict()], sort_keys=True)
    return f"repairs/{hashlib.sha256(said.encode()).hexdigest()[:12]}-{kind}"


def kept_repair(run: RunFolder | None, name: str, make: Callable[[], dict[str, Repair]]) -> dict[str, Repair]:
    """Repairs of a site or a layer: those of an earlier run, or those that are made now.

    Args:
        run ([`RunFolder`], *optional*): the run.
        name (`str`): of the artefact.
        make (`Callable`): makes repairs by site name.
    """

    def made() -> dict[str, Repair]:
        # As they come back from a file: products with a transposed view of the same numbers may differ in bits.
        return {
            site: Repair(repair.weight.contiguous(), None if repair.bias is None else repair.bias.contiguous())
            for site, repair in make().items()
        }

    return once(run, name, made, _packed_repairs, _unpacked_repairs)


def read_repair(run: RunFolder | None, name: str) -> dict[str, Repair] | None:
    """Repairs that an earlier run kept; `None` where it did not.

    Args:
        run ([`RunFolder`], *optional*): the run.
        name (`str`): of the artefact.
    """
    found = None if run is None else run.read(name)
    return None if found is None else _unpacked_repairs(*found)


def _packed_repairs(repairs: Mapping[str, Repair]) -> tuple[dict[str, torch.Tensor], list[str]]:
    tensors = {f"{site} weight": repair.weight for site, repair in repairs.items()}
    tensors.update({f"{site} bias": repair.bias for site, repair in repairs.items() if repair.bias is not None})
    return tensors, list(repairs)


def _unpacked_repairs(tensors: Mapping[str, torch.Tensor], sites: Any) -> dict[str, Repair]:
    return {site: Repair(tensors[f"{site} weight"], tensors.get(f"{site} bias")) for site in sites}
