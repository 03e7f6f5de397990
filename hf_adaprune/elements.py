"""Element-wise Taylor terms: the only statistics that need weight gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .site import Matrix, Site
from .sites import ModelSites
from .workers import Alone

__all__ = ["ELEMENT_TERMS", "Elements"]

ELEMENT_TERMS = ("first", "second", "mixed", "vector")


class Elements:
    """Weight gradients, sample by sample, reduced to element-wise Taylor terms at the end of each domain.

    LLM-Pruner (2305.11627): `first` is |w g| and `second` |w F w|, `mixed` |w g - w F w / 2|, summed over the row, with
    g the mean gradient of the samples' mean loss and F the mean of its squares; `vector` is |sum of w g|.
    """

    def __init__(self, sites: ModelSites, domains: int) -> None:
        self.matrices: dict[tuple[str, str], tuple[Matrix, bool]] = {}
        for site in sites:
            for writer in site.writers:
                self.matrices[site.name, writer.path] = (writer, False)
            self.matrices[site.name, site.reader.path] = (site.reader, True)
        self.terms = {
            key: torch.zeros(domains, len(ELEMENT_TERMS), *self._rows(matrix, reader))
            for key, (matrix, reader) in self.matrices.items()
        }
        self.total: dict[tuple[str, str], torch.Tensor] = {}
        self.square: dict[tuple[str, str], torch.Tensor] = {}
        self.samples = 0

    @staticmethod
    def _rows(matrix: Matrix, reader: bool) -> tuple[int, ...]:
        weight = matrix.weight
        lead = weight.shape[:-2]
        return (*lead, weight.shape[-1] if reader else weight.shape[-2])

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Let the matrices of all sites ask for gradients; afterwards each has its own back."""
        # A training step under way has gradients of its own; they neither count here nor get lost.
        own = [(matrix.parameter, matrix.parameter.grad) for matrix, _ in self.matrices.values()]
        for parameter, _ in own:
            parameter.grad = None
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, gradient in own:
                parameter.grad = gradient
                parameter.requires_grad_(False)

    def close_sample(self, scored: int) -> None:
        """Take the gradients of one sample, whose summed loss was over so many predicted tokens."""
        self.samples += 1
        for key, (matrix, _) in self.matrices.items():
            gradient = matrix.parameter.grad
            if gradient is None:
                continue
            value = gradient.float() / max(1, scored)
            matrix.parameter.grad = None
            if key in self.total:
                self.total[key] += value
                self.square[key] += value.square()
            else:
                self.total[key], self.square[key] = value, value.square()

    def close_domain(self, domain: int, workers: Alone) -> None:
        """Reduce what the samples of a domain amount to, over all processes, and start anew."""
        if workers.count > 1:
            self._add_up(workers)
        for key, total in self.total.items():
            matrix, reader = self.matrices[key]
            weight = matrix.parameter.detach().float()
            first = weight * total / self.samples
            second = weight.square() * self.square[key] / self.samples
            dimension = -1 if reader != matrix.transposed else -2
            # Rows of a writer are structures, so the terms are summed over its inputs; columns of a reader likewise.
            over = -2 if dimension == -1 else -1
            terms = (first.abs(), second.abs(), (first - second / 2).abs())
            for number, term in enumerate(terms):
                self.terms[key][domain, number] = term.sum(over).cpu()
            self.terms[key][domain, 3] = first.sum(over).abs().cpu()
        self.total, self.square, self.samples = {}, {}, 0

    def _add_up(self, workers: Alone) -> None:
        """Terms are absolute values of means, so it is gradients that add up over processes."""
        samples = torch.tensor([self.samples])
        workers.add_up(samples)
        self.samples = int(samples)
        seen = set(workers.gather(list(self.total)))
        for key, (matrix, _) in self.matrices.items():
            if key not in seen:
                continue
            for sums in (self.total, self.square):
                if key not in sums:
                    sums[key] = torch.zeros_like(matrix.parameter, dtype=torch.float32, requires_grad=False)
                sums[key] = sums[key].contiguous()
                workers.add_up(sums[key])

    def of(self, site: Site) -> dict[str, torch.Tensor]:
        """The terms of a site by matrix path, `[domains, terms, rows]`."""
        return {path: terms for (name, path), terms in self.terms.items() if name == site.name}
