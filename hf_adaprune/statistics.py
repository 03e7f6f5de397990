"""The one instrumented pass over calibration text: the only hooks that read.

What is kept is a sum over tokens, per sample where that is small and per domain where it is not, so a weighting of
samples is a matrix-vector product later and never another pass:

- per sample and reader column: sums, sums of squares, and by segments of 64 tokens the signed first-order term
  (activation times its gradient, which summed over a sample equals the gradient-weight product of the reading matrix
  summed over the column);
- per sample and reader output: the squared gradient, which puts errors of different layers into loss units;
- per domain: Gram matrices of the reader's inputs;
- per domain and matrix row: element-wise Taylor terms, where a metric asks for them (they need weight gradients).

Everything is float32, whatever the model's dtype.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from .calibration import TokenBlocks
from .documents import eval_mode
from .elements import Elements
from .errors import StatisticsError
from .experts import ExpertTap, tapped_experts
from .sites import ModelSites, Site

__all__ = ["Needs", "SiteStatistics", "Statistics", "collect_statistics"]

_FORWARD_TOKENS = 2048  # per batch: large enough for efficient products, small beside the Gram matrices
SEGMENT = 64  # tokens; first-order terms are summed over segments, which measure scatter better than whole windows
_LOGIT_ROWS = 64  # positions whose float32 logits exist at the same time


@dataclass(frozen=True)
class Needs:
    """What a pass has to keep.

    Args:
        gram (`bool`): Gram matrices.
        gradients (`bool`): first-order terms and squared output gradients, on the first `gradient_samples` samples.
        elements (`bool`): element-wise Taylor terms, on the same samples.
        cosine (`bool`): cosine between input and output of every decoder layer.
        per_domain (`bool`): one Gram matrix per domain instead of one in all.
        squares (`bool`): sums of squares per sample.
    """

    gram: bool = False
    gradients: bool = False
    elements: bool = False
    cosine: bool = False
    per_domain: bool = False
    squares: bool = False

    def __or__(self, other: Needs) -> Needs:
        """Both together."""
        return Needs(*(getattr(self, name) or getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True, eq=False)
class SiteStatistics:
    """Statistics of one site. Columns are the reader's, in its own order; for experts those of all experts in a row.

    Args:
        sums (`torch.Tensor`): activations summed over tokens, `[samples, columns]`; for experts weighted by the gate.
        counts (`torch.Tensor`): tokens, `[samples]`; for experts the tokens each expert served, `[samples, experts]`.
        squares (`torch.Tensor`, *optional*): their squares, `[samples, columns]`.
        gram (`torch.Tensor`, *optional*): sums of products, `[domains, columns, columns]`; for experts
            `[domains, experts, channels, channels]`.
        first_order (`torch.Tensor`, *optional*): activation times gradient of the summed loss,
            `[gradient samples, segments, columns]`.
        output_gradients (`torch.Tensor`, *optional*): squared gradient at the reader's outputs,
            `[gradient samples, outputs]`.
        elements (`dict[str, torch.Tensor]`, *optional*): by matrix path, `[domains, 4, rows]` (for the reader:
            columns) of `elements.ELEMENT_TERMS`, of the mean gradient over the domain's samples.
    """

    sums: torch.Tensor
    counts: torch.Tensor
    squares: torch.Tensor | None = None
    gram: torch.Tensor | None = None
    first_order: torch.Tensor | None = None
    output_gradients: torch.Tensor | None = None
    elements: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of a model over a calibration pool.

    Args:
        sites (`dict[str, SiteStatistics]`): by site name.
        tokens (`torch.Tensor`): unpadded tokens per sample, `[samples]`.
        domain (`torch.Tensor`): domain of each sample, `[samples]`.
        domains (`tuple[str, ...]`): their names.
        gram_domains (`tuple[str, ...]`): what the first dimension of Gram matrices counts: the domains, or `("all",)`.
        gradient_index (`torch.Tensor`): samples that had a backward pass, `[gradient samples]`.
        cosine (`torch.Tensor`, *optional*): summed cosine of input and output per decoder layer, `[samples, layers]`.
        digest (`str`): digest of the token blocks.
    """

    sites: Mapping[str, SiteStatistics]
    tokens: torch.Tensor
    domain: torch.Tensor
    domains: tuple[str, ...]
    gram_domains: tuple[str, ...]
    gradient_index: torch.Tensor
    cosine: torch.Tensor | None
    digest: str

    def sample_weights(self, domain_weights: tuple[float, ...] = ()) -> torch.Tensor:
        """One weight per sample, `[samples]`: a domain's weight shared by its samples, with mean 1 over the pool."""
        if not domain_weights:
            return torch.ones(len(self.tokens))
        counts = torch.bincount(self.domain, minlength=len(self.domains)).clamp(min=1)
        share = torch.tensor(domain_weights) / sum(domain_weights)
        return (share / counts)[self.domain] * len(self.tokens)


def collect_statistics(
    sites: ModelSites,
    blocks: TokenBlocks,
    needs: Needs,
    *,
    gradient_samples: int = 0,
    gram_place: str = "cpu",
    folder: str | Path | None = None,
) -> Statistics:
    """Run the model once over calibration windows and keep the statistics.

    Samples that get gradients are run forward and backward, the others forward only, without the head.

    Args:
        sites ([`ModelSites`]): the model. It is left as it was: mode, gradients and hooks.
        blocks ([`TokenBlocks`]): calibration windows.
        needs ([`Needs`]): what to keep.
        gradient_samples (`int`, *optional*, defaults to 0): how many windows get gradients, spread over the domains.
        gram_place (`str`, *optional*, defaults to `"cpu"`): `model`, `cpu` or `disk`.
        folder (`str`, *optional*): where Gram matrices on disk go; a temporary folder of the system where not given.

    Raises:
        StatisticsError: activations or gradients are not finite.
    """
    recorder = _Recorder(sites, blocks, needs, gradient_samples, gram_place, folder)
    with _quiet_model(sites.model), recorder.hooks():
        bar = transformers_logging.tqdm(total=len(blocks), desc="calibration", unit="window")
        with contextlib.closing(bar):
            for indices, backward in recorder.batches():
                recorder.run(indices, backward)
                bar.update(len(indices))
    return recorder.statistics()


@contextlib.contextmanager
def _quiet_model(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no parameter asks for gradients; restored at the end."""
    asks = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with eval_mode(model):
        model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, ask in asks.items():
                parameter.requires_grad_(ask)


@contextlib.contextmanager
def exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Let float32 products of values that came from bfloat16 use bfloat16 units: the products are exact either way.

    Products of other values are taken in full float32, whatever the caller (or an outer context) allows. To be opened
    around products only, never around a model: a rotary embedding needs all bits of its positions.
    """
    modules: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cuda)
    backends = [module.matmul for module in modules]
    before = [backend.fp32_precision for backend in backends]
    fast = dtype == torch.bfloat16
    backends[0].fp32_precision = "bf16" if fast else "ieee"
    backends[1].fp32_precision = "tf32" if fast else "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


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
        self.gradient_index = _spread(blocks.domain, gradient_samples if backward else 0)
        self.position = {int(sample): number for number, sample in enumerate(self.gradient_index)}
        domains = len(blocks.domains) if needs.per_domain else 1
        samples = len(blocks)
        self.keep: dict[str, dict[str, torch.Tensor]] = {}
        for site in sites:
            shape = (samples, site.groups) if site.kind == "experts" else (samples,)
            kept = {
                "sums": torch.zeros(samples, site.columns),
                "counts": torch.zeros(shape),
            }
            if needs.squares:
                kept["squares"] = torch.zeros(samples, site.columns)
            if needs.gram:
                matrices = (site.groups, site.group_size) if site.kind == "experts" else (site.columns,)
                kept["gram"] = _allocate((domains, *matrices, matrices[-1]), gram_place, folder, site)
            if needs.gradients:
                segments = math.ceil(blocks.input_ids.shape[1] / SEGMENT)
                kept["first_order"] = torch.zeros(len(self.gradient_index), segments, site.columns)
                kept["output_gradients"] = torch.zeros(len(self.gradient_index), site.outputs)
            self.keep[site.name] = kept
        self.cosine = torch.zeros(samples, len(sites.layers)) if needs.cosine else None
        self.elements = Elements(sites, len(blocks.domains)) if needs.elements else None
        self.samples = torch.empty(0, dtype=torch.long)
        self.mask: torch.Tensor | None = None
        self.backward = False

    def batches(self) -> Iterator[tuple[torch.Tensor, bool]]:
        """Indices of windows of one domain, those with gradients first."""
        length = self.blocks.input_ids.shape[1]
        with_gradients = torch.zeros(len(self.blocks), dtype=torch.bool)
        with_gradients[self.gradient_index] = True
        for backward in (True, False):
            # One window at a time keeps the logits of a backward pass small, and samples apart for weight gradients.
            size = 1 if backward else max(1, _FORWARD_TOKENS // length)
            for domain in range(len(self.blocks.domains)):
                chosen = torch.where((self.blocks.domain == domain) & (with_gradients == backward))[0]
                for start in range(0, len(chosen), size):
                    yield chosen[start : start + size], backward
                if backward and self.elements is not None and len(chosen):
                    self.elements.close_domain(domain)

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
                model.base_model(**inputs)
            return
        with torch.enable_grad(), _narrow_saved_tensors(next(model.parameters()).dtype):
            logits = model(**inputs).logits
        scored = mask[:, 1:].to(device)
        logits.backward(_loss_gradient(logits.detach(), ids, scored))
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
            rows = args[0].reshape(len(self.samples), -1, site.columns)
            values = rows.detach().float()
            if self.mask is not None:
                values = values * self.mask[..., None]
            kept["sums"][self.samples] = values.sum(1).cpu()
            if self.needs.squares:
                kept["squares"][self.samples] = values.square().sum(1).cpu()
            kept["counts"][self.samples] = self.blocks.attention_mask[self.samples].sum(1).float()
            if self.needs.gram:
                _add_product(kept["gram"][self._gram_slot()], values.flatten(0, 1), args[0].dtype)
            if self.backward and self.needs.gradients:
                _on_gradient(args[0], self._keeps_first_order(site, args[0].detach()))

        return hook

    def _gram_slot(self) -> int:
        return int(self.blocks.domain[self.samples[0]]) if self.needs.per_domain else 0

    def _gradient_rows(self) -> list[int]:
        return [self.position[int(sample)] for sample in self.samples]

    def _keeps_first_order(self, site: Site, values: torch.Tensor) -> Callable[[torch.Tensor], None]:
        rows, target = self._gradient_rows(), self.keep[site.name]["first_order"]

        def hook(gradient: torch.Tensor) -> None:
            terms = (values.float() * gradient.float()).reshape(len(rows), -1, site.columns)
            target[rows] = torch.stack([part.sum(1) for part in terms.split(SEGMENT, dim=1)], dim=1).cpu()

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
            before = (args[0] if args else kwargs["hidden_states"]).detach().float()
            after = (output[0] if isinstance(output, tuple) else output).detach().float()
            cosine = nn.functional.cosine_similarity(before, after, dim=-1)
            if self.mask is not None:
                cosine = cosine * self.mask
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
            values = channels.detach().float() * gates.detach().float()[:, None]
            if self.mask is not None:
                seen = self.mask.flatten()[tokens]
                values = values * seen[:, None]
            else:
                seen = torch.ones_like(tokens)
            empty = values.new_zeros(len(self.samples), width)
            kept["sums"][self.samples, columns] = empty.index_add(0, sample, values).cpu()
            if self.needs.squares:
                kept["squares"][self.samples, columns] = empty.index_add(0, sample, values.square()).cpu()
            served = values.new_zeros(len(self.samples)).index_add(0, sample, seen.float())
            kept["counts"][self.samples, expert] = served.cpu()
            if self.needs.gram:
                # Channels times gates are no bfloat16 numbers, so these products are taken in full float32.
                _add_product(kept["gram"][self._gram_slot(), expert], values, torch.float32)
            if self.backward and self.needs.gradients:
                rows, target, own = self._gradient_rows(), kept["first_order"], channels.detach()
                segments = target.shape[1]
                place = sample * segments + tokens % length // SEGMENT

                def keep(gradient: torch.Tensor) -> None:
                    none = values.new_zeros(len(rows) * segments, width)
                    terms = none.index_add(0, place, own.float() * gradient.float())
                    target[rows, :, columns] = terms.reshape(len(rows), segments, width).cpu()

                _on_gradient(channels, keep)
            return channels, None

        return tap

    def statistics(self) -> Statistics:
        """What was kept, checked to be finite."""
        found = {}
        for site in self.sites:
            kept = self.keep[site.name]
            elements = self.elements.of(site) if self.elements is not None else {}
            names = ("sums", "squares", "first_order", "output_gradients")
            checked = {name.replace("_", " "): kept[name] for name in names if name in kept}
            checked.update({f"element terms of {path}": terms for path, terms in elements.items()})
            for name, values in checked.items():
                if not torch.isfinite(values).all():
                    raise StatisticsError(
                        f"{site.name}: {name} are not finite. Weights or activations overflow; load "
                        "the model in bfloat16 or float32 (float16 overflows on massive activations) and check its "
                        "weights."
                    )
            found[site.name] = SiteStatistics(**kept, elements=elements)
        return Statistics(
            found,
            self.blocks.attention_mask.sum(1).float(),
            self.blocks.domain,
            self.blocks.domains,
            self.blocks.domains if self.needs.per_domain else ("all",),
            self.gradient_index,
            self.cosine,
            self.blocks.digest,
        )


def _spread(domain: torch.Tensor, count: int) -> torch.Tensor:
    """The first samples of every domain in turn, `count` in all, ascending."""
    turns = [(int((domain[:sample] == own).sum()), int(own), sample) for sample, own in enumerate(domain)]
    return torch.tensor(sorted(sample for _, _, sample in sorted(turns)[:count]), dtype=torch.long)


def _on_gradient(tensor: torch.Tensor, keep: Callable[[torch.Tensor], None]) -> None:
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: keep(gradient.detach()))


def _add_product(gram: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> None:
    with exact_products(dtype):
        product = rows.T @ rows
    gram += product.to(gram.device)


def _narrow_saved_tensors(dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """In a half-precision model, keep what backward needs of float32 (norms compute in it) in bfloat16.

    Half of the memory of a backward pass goes there; the activations these tensors came from were no wider.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return contextlib.nullcontext()

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, bool]:
        narrow = tensor.dtype == torch.float32 and tensor.dim() > 2
        return (tensor.to(torch.bfloat16) if narrow else tensor), narrow

    def unpack(packed: tuple[torch.Tensor, bool]) -> torch.Tensor:
        return packed[0].float() if packed[1] else packed[0]

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _loss_gradient(logits: torch.Tensor, ids: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
    """Gradient of the summed next-token loss at the logits `[batch, tokens, vocabulary]`, a few positions at a time."""
    gradient = torch.zeros_like(logits)
    for sample in range(len(ids)):
        for start in range(0, ids.shape[1] - 1, _LOGIT_ROWS):
            stop = min(start + _LOGIT_ROWS, ids.shape[1] - 1)
            part = torch.softmax(logits[sample, start:stop].float(), dim=-1)
            part[torch.arange(stop - start), ids[sample, start + 1 : stop + 1]] -= 1
            gradient[sample, start:stop] = part * scored[sample, start:stop, None]
    return gradient


def _allocate(shape: tuple[int, ...], place: str, folder: str | Path | None, site: Site) -> torch.Tensor:
    if place == "disk":
        return _on_disk(shape, Path(folder or tempfile.mkdtemp(prefix="hf_adaprune_")), site.name)
    return torch.zeros(shape, device=site.reader.parameter.device if place == "model" else "cpu")


def _on_disk(shape: tuple[int, ...], folder: Path, name: str) -> torch.Tensor:
    """A float32 tensor of zeros that is the body of a safetensors file, mapped into memory page by page."""
    folder.mkdir(parents=True, exist_ok=True)
    size = int(np.prod(shape)) * 4
    header = json.dumps({"gram": {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    path = folder / f"{name}.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    mapped = np.memmap(path, dtype=np.float32, mode="r+", offset=8 + len(header), shape=shape)
    return torch.from_numpy(mapped)


# -- one layer at a time ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LayerCalls:
    """What the decoder layers are called with, so that they can be run one by one.

    Args:
        hidden (`torch.Tensor`): input of the first layer, `[windows, tokens, hidden]`, on the CPU.
        arguments (`tuple`): for every layer the positional and keyword arguments beside the hidden states, for a batch
            of one window.
    """

    hidden: torch.Tensor
    arguments: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


class _Enough(Exception):
    """Stops a forward pass once the first layer was reached."""


@torch.no_grad()
def layer_calls(sites: ModelSites, blocks: TokenBlocks) -> LayerCalls:
    """Record the input of the first layer and the arguments of all layers. Windows must be unpadded.

    Args:
        sites ([`ModelSites`]): the model.
        blocks ([`TokenBlocks`]): windows.
    """
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    first: list[torch.Tensor] = []

    def reads(number: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(kwargs)
            hidden = args[0] if args else given.pop("hidden_states")
            arguments.setdefault(number, (tuple(args[1:]), given))
            if number == 0:
                first.append(hidden.detach().cpu())
                if len(first) > 1:
                    raise _Enough

        return hook

    with _quiet_model(sites.model), contextlib.ExitStack() as stack:
        for number, layer in enumerate(sites.layers):
            stack.callback(layer.register_forward_pre_hook(reads(number), with_kwargs=True).remove)
        for window in blocks.input_ids:
            with contextlib.suppress(_Enough):
                sites.model.base_model(input_ids=window[None].to(sites.device), use_cache=False)
    return LayerCalls(torch.cat(first), tuple(arguments[number] for number in range(len(sites.layers))))


@contextlib.contextmanager
def watched_inputs(sites: ModelSites, site: Site, sink: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Hand the rows that a reader reads to a sink while the context is open.

    Args:
        sites ([`ModelSites`]): the model.
        site ([`Site`]): whose reader.
        sink (`Callable`): gets the expert's number (0 elsewhere) and rows `[tokens, columns]`; those of experts are
            weighted by the gate.
    """

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        sink(0, args[0].detach().reshape(-1, site.columns))

    def tap(
        expert: int, tokens: torch.Tensor, channels: torch.Tensor, gates: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        sink(expert, channels.detach() * gates.detach()[:, None])
        return channels, None

    if site.kind == "experts":
        with tapped_experts(sites.model.config, {site.reader.module: tap}):
            yield
        return
    handle = site.reader.module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
