"""The instrumented pass over calibration text, which fills the statistics."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from .backward import loss_gradient, narrow_saved_tensors
from .elements import Elements
from .errors import StatisticsError
from .experts import ExpertTap, tapped_experts
from .gram_sums import GramSums
from .quiet import quiet_model
from .site import Site
from .sites import ModelSites
from .statistics import SEGMENT, Needs, SiteStatistics, Statistics
from .sweeps import Sweep, spread_samples, sweeps_of
from .token_blocks import TokenBlocks
from .workers import Alone

__all__ = ["collect_statistics"]


def collect_statistics(
    sites: ModelSites,
    blocks: TokenBlocks,
    needs: Needs,
    *,
    gradient_samples: int = 0,
    gram_place: str = "cpu",
    folder: str | Path | None = None,
    description: str = "calibration",
    workers: Alone | None = None,
) -> Statistics:
    """Run the model over calibration windows and keep the statistics.

    A backward sweep over the samples that get gradients, then a forward sweep over all of them, without the head.

    Args:
        sites ([`ModelSites`]): the model. It is left as it was: mode, gradients and hooks.
        blocks ([`TokenBlocks`]): calibration windows.
        needs ([`Needs`]): what to keep.
        gradient_samples (`int`, *optional*, defaults to 0): how many windows get gradients, spread over the domains.
        gram_place (`str`, *optional*, defaults to `"cpu"`): `model`, `cpu` or `disk`.
        folder (`str`, *optional*): where Gram matrices on disk go; a temporary folder of the system where not given.
        description (`str`, *optional*, defaults to `"calibration"`): of the progress bar; none where empty.
        workers ([`Alone`], *optional*): processes that share the windows; see
            [`hf_adaprune.parallel.collect_together`].

    Raises:
        StatisticsError: activations, sums of their products, or gradients are not finite; with the name of the site
            or layer where it begins.
    """
    workers = workers or Alone()
    recorder = workers.each(lambda: _Recorder(sites, blocks, needs, gradient_samples, gram_place, folder))
    sweeps = [sweep for sweep in sweeps_of(blocks, recorder.gradient_index, workers) if sweep.everywhere]
    with quiet_model(sites.model), recorder.hooks():
        windows = sum(len(indices) for sweep in sweeps for indices in sweep.own)
        # Shares are alike, so the bar of the first process tells of all.
        silent = workers.rank > 0 or not description
        bar = transformers_logging.tqdm(total=windows, desc=description, unit="window", disable=silent)
        with contextlib.closing(bar):
            for sweep in sweeps:
                workers.each(partial(recorder.walk, sweep, bar.update))
                if recorder.elements is not None and sweep.domain is not None:
                    recorder.elements.close_domain(sweep.domain, workers)
    workers.each(recorder.make_whole)
    recorder.add_up(workers)
    workers.each(recorder.round_sums)
    return recorder.statistics()


class _Recorder:
    """Accumulators and the hooks that fill them, for the time of one pass."""

    def __init__(
        self,
        sites: ModelSites,
        blocks: TokenBlocks,
        needs: Needs,
        gradient_samples: int,
        gram_place: str,
        folder: str | Path | None,
    ) -> None:
        self.sites, self.blocks, self.needs = sites, blocks, needs
        backward = needs.gradients or needs.elements
        self.gradient_index = spread_samples(blocks.domain, gradient_samples if backward else 0)
        self.position = {int(sample): number for number, sample in enumerate(self.gradient_index)}
        # A folder of its own per pass: a later pass must not write into what an earlier one still reads. Without a
        # place to be, it lives as long as the statistics do.
        self.gram_place, self.storage, self.folder = gram_place, None, folder
        if gram_place == "disk" and folder is None:
            self.storage = tempfile.TemporaryDirectory(prefix="hf_adaprune_")
            self.folder = self.storage.name
        elif gram_place == "disk":
            Path(folder or "").mkdir(parents=True, exist_ok=True)
            self.folder = tempfile.mkdtemp(prefix="pass_", dir=folder)
        samples = len(blocks)
        self.keep: dict[str, dict[str, torch.Tensor]] = {}
        self.grams: dict[str, GramSums] = {}
        for site in sites:
            shape = (samples, site.groups) if site.kind == "experts" else (samples,)
            kept = {
                "sums": torch.zeros(samples, site.columns),
                "counts": torch.zeros(shape),
            }
            if needs.squares:
                kept["squares"] = torch.zeros(samples, site.columns)
            if needs.gradients:
                segments = math.ceil(blocks.input_ids.shape[1] / SEGMENT)
                kept["first_order"] = torch.zeros(len(self.gradient_index), segments, site.columns)
                kept["output_gradients"] = torch.zeros(len(self.gradient_index), site.outputs)
            self.keep[site.name] = kept
        self.cosine = torch.zeros(samples, len(sites.layers)) if needs.cosine else None
        self.broken = torch.zeros(samples)  # numbers behind the layers that are not finite, which no reader shows
        self.elements = Elements(sites, len(blocks.domains)) if needs.elements else None
        self.samples = torch.empty(0, dtype=torch.long)
        self.mask: torch.Tensor | None = None
        self.backward = False

    def walk(self, sweep: Sweep, tell: Callable[[int], Any]) -> None:
        """Run the windows of a sweep."""
        for indices in sweep.own:
            self.run(indices, backward=sweep.domain is not None)
            tell(len(indices))

    def make_whole(self) -> None:
        """A process that had no windows has zeros to add."""
        if self.needs.gram:
            for site in self.sites:
                self._gram(site)

    def add_up(self, workers: Alone) -> None:
        """Sums over samples become those of all processes; what one keeps per sample is zero on the others."""
        for site in self.sites:
            for _, tensor in sorted(self.keep[site.name].items()):
                workers.add_up(tensor)
            if site.name in self.grams:
                self.grams[site.name].add_up(workers)
        workers.add_up(self.broken)
        if self.cosine is not None:
            workers.add_up(self.cosine)

    def round_sums(self) -> None:
        """Gram matrices as they are kept, one site after the other, so that few are there twice."""
        for name in list(self.grams):
            self.keep[name]["gram"] = self.grams.pop(name).whole()

    def run(self, indices: torch.Tensor, backward: bool) -> None:
        model, device = self.sites.model, self.sites.device
        ids = self.blocks.input_ids[indices].to(device)
        mask = self.blocks.attention_mask[indices]
        self.samples, self.backward = indices, backward
        self.mask = None if bool(mask.all()) else mask.to(device)
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if self.mask is not None:
            inputs["attention_mask"] = self.mask.long()
        if not backward:
            with torch.no_grad():
                wrong = ~torch.isfinite(model.base_model(**inputs)[0])
            if self.mask is not None:
                wrong &= self.mask.to(wrong.device)[..., None]
            self.broken[indices] = wrong.flatten(1).sum(1).float().cpu()
            return
        with torch.enable_grad(), narrow_saved_tensors(next(model.parameters()).dtype):
            logits = model(**inputs).logits
        scored = mask[:, 1:].to(device)
        logits.backward(loss_gradient(logits.detach(), ids, scored))
        if self.elements is not None:
            self.elements.close_sample(int(scored.sum()))

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            taps: dict[nn.Module, ExpertTap] = {}
            for site in self.sites:
                if site.kind == "experts":
                    taps[site.reader.module] = self._expert_tap(site)
                else:
                    stack.callback(site.reader.module.register_forward_pre_hook(self._reads_input(site)).remove)
                if self.needs.gradients:
                    owner = site.sublayer if site.kind == "experts" else site.reader.module
                    stack.callback(owner.register_forward_hook(self._reads_output(site)).remove)
            if self.cosine is not None:
                for number, layer in enumerate(self.sites.layers):
                    hook = layer.register_forward_hook(self._reads_layer(number), with_kwargs=True)
                    stack.callback(hook.remove)
            if len(self.gradient_index):
                embedding = self.sites.model.get_input_embeddings()
                stack.callback(embedding.register_forward_hook(self._starts_graph).remove)
            if self.elements is not None:
                stack.enter_context(self.elements.recording())
            stack.enter_context(tapped_experts(self.sites.model.config, taps))
            yield

    def _starts_graph(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return output.detach().requires_grad_() if self.backward else None

    def _reads_input(self, site: Site) -> Any:
        kept = self.keep[site.name]

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if self.backward:
                if self.needs.gradients:
                    _on_gradient(args[0], self._keeps_first_order(site, args[0].detach()))
                return
            rows = args[0].reshape(len(self.samples), -1, site.columns)
            values = rows.detach().float()
            if self.mask is not None:
                values = values * self.mask.to(values.device)[..., None]
            kept["sums"][self.samples] = values.sum(1).cpu()
            if self.needs.squares:
                kept["squares"][self.samples] = values.square().sum(1).cpu()
            kept["counts"][self.samples] = self.blocks.attention_mask[self.samples].sum(1).float()
            if self.needs.gram:
                self._gram(site).add((self._domain(),), values.flatten(0, 1), args[0].dtype)

        return hook

    def _domain(self) -> int:
        """Which Gram matrix the windows at hand add to."""
        return int(self.blocks.domain[self.samples[0]]) if self.needs.per_domain else 0

    def _gram(self, site: Site) -> GramSums:
        if site.name not in self.grams:
            domains = len(self.blocks.domains) if self.needs.per_domain else 1
            self.grams[site.name] = GramSums(site, domains, self.gram_place, self.folder)
        return self.grams[site.name]

    def _gradient_rows(self) -> list[int]:
        return [self.position[int(sample)] for sample in self.samples]

    def _keeps_first_order(self, site: Site, values: torch.Tensor) -> Callable[[torch.Tensor], None]:
        rows, target = self._gradient_rows(), self.keep[site.name]["first_order"]

        def hook(gradient: torch.Tensor) -> None:
            terms = (values.float() * gradient.float()).reshape(len(rows), -1, site.columns)
            if terms.shape[1] % SEGMENT:
                terms = nn.functional.pad(terms, (0, 0, 0, -terms.shape[1] % SEGMENT))
            target[rows] = terms.reshape(len(rows), -1, SEGMENT, site.columns).sum(2).cpu()

        return hook

    def _reads_output(self, site: Site) -> Any:
        target = self.keep[site.name]["output_gradients"]

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not self.backward:
                return
            rows = self._gradient_rows()
            tensor = output[0] if isinstance(output, tuple) else output

            def keep(gradient: torch.Tensor) -> None:
                target[rows] = gradient.float().square().reshape(len(rows), -1, site.outputs).sum(1).cpu()

            _on_gradient(tensor, keep)

        return hook

    def _reads_layer(self, number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.backward:
                return
            before = (args[0] if args else kwargs["hidden_states"]).detach().float()
            after = (output[0] if isinstance(output, tuple) else output).detach().float()
            cosine = nn.functional.cosine_similarity(before.to(after.device), after, dim=-1)
            if self.mask is not None:
                cosine = cosine * self.mask.to(cosine.device)
            assert self.cosine is not None
            self.cosine[self.samples, number] = cosine.sum(1).cpu()

        return hook

    def _expert_tap(self, site: Site) -> ExpertTap:
        kept = self.keep[site.name]
        length = self.blocks.input_ids.shape[1]

        def tap(
            expert: int, tokens: torch.Tensor, channels: torch.Tensor, gates: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            width = site.group_size
            columns = slice(expert * width, (expert + 1) * width)
            sample = tokens // length
            if self.backward:
                if self.needs.gradients:
                    position = tokens % length // SEGMENT
                    keeps = self._keeps_expert_terms(site, columns, sample, position, channels.detach())
                    _on_gradient(channels, keeps)
                return channels, None
            values = channels.detach().float() * gates.detach().float()[:, None]
            seen = torch.ones_like(tokens) if self.mask is None else self.mask.to(tokens.device).flatten()[tokens]
            values = values * seen[:, None]
            empty = values.new_zeros(len(self.samples), width)
            kept["sums"][self.samples, columns] = empty.index_add(0, sample, values).cpu()
            if self.needs.squares:
                kept["squares"][self.samples, columns] = empty.index_add(0, sample, values.square()).cpu()
            served = values.new_zeros(len(self.samples)).index_add(0, sample, seen.float())
            kept["counts"][self.samples, expert] = served.cpu()
            if self.needs.gram:
                # Channels times gates are no bfloat16 numbers, so these products are taken in full float32.
                self._gram(site).add((self._domain(), expert), values, torch.float32)
            return channels, None

        return tap

    def _keeps_expert_terms(
        self, site: Site, columns: slice, sample: torch.Tensor, segment: torch.Tensor, channels: torch.Tensor
    ) -> Callable[[torch.Tensor], None]:
        rows, target = self._gradient_rows(), self.keep[site.name]["first_order"]
        segments = target.shape[1]

        def keep(gradient: torch.Tensor) -> None:
            none = torch.zeros(len(rows) * segments, site.group_size, device=channels.device)
            terms = none.index_add(0, sample * segments + segment, channels.float() * gradient.float())
            target[rows, :, columns] = terms.reshape(len(rows), segments, site.group_size).cpu()

        return keep

    def check(self) -> None:
        """Refuse numbers that are not finite, and name where they begin.

        Activations spread upwards, gradients downwards. Products are finite where the squares on the diagonal of a Gram
        matrix are.
        """
        for site in self.sites:
            kept = self.keep[site.name]
            for name in ("sums", "squares", "gram"):
                if name in kept:
                    values = kept[name].diagonal(dim1=-2, dim2=-1) if name == "gram" else kept[name]
                    _refuse(site.name, {"gram": "Gram matrices"}.get(name, name), values)
        if bool(self.broken.any()):
            raise _not_finite(self._last_layer(), "outputs")
        for site in reversed(self.sites.sites):
            kept = self.keep[site.name]
            elements = self.elements.of(site) if self.elements is not None else {}
            for name in ("output_gradients", "first_order"):
                if name in kept:
                    _refuse(site.name, name.replace("_", " "), kept[name])
            for path, terms in elements.items():
                _refuse(site.name, f"element terms of {path}", terms)
        for number, values in enumerate([] if self.cosine is None else self.cosine.T):
            _refuse(f"layers.{number}", "cosines of input and output", values)

    def _last_layer(self) -> str:
        # One layer of a model is no longer counted from its first one.
        if len(self.sites.layers) > 1:
            return f"layers.{len(self.sites.layers) - 1}"
        return f"layers.{max((site.layer for site in self.sites), default=0)}"

    def statistics(self) -> Statistics:
        """What was kept, checked to be finite."""
        self.check()
        found = {}
        for site in self.sites:
            elements = self.elements.of(site) if self.elements is not None else {}
            found[site.name] = SiteStatistics(**self.keep[site.name], elements=elements)
        return Statistics(
            found,
            self.blocks.attention_mask.sum(1).float(),
            self.blocks.domain,
            self.blocks.domains,
            self.blocks.domains if self.needs.per_domain else ("all",),
            self.gradient_index,
            self.cosine,
            self.blocks.digest,
            self.storage,
        )


def _refuse(place: str, what: str, values: torch.Tensor) -> None:
    if not torch.isfinite(values).all():
        raise _not_finite(place, what)


def _not_finite(place: str, what: str) -> StatisticsError:
    return StatisticsError(
        f"{place}: {what} are not finite. Weights or activations overflow; load the model in bfloat16 or float32 "
        "(float16 overflows on massive activations) and check its weights."
    )


def _on_gradient(tensor: torch.Tensor, keep: Callable[[torch.Tensor], None]) -> None:
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: keep(gradient.detach()))
