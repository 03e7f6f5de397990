"""Laws of the instrumented pass: statistics are what torch computes on the concatenated activations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, MIXTURES, logits_of, tiny_model, tokens
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from texts import random_blocks
from torch import nn
from transformers import PreTrainedModel

from hf_adaprune import gram_sums, recording, sweeps
from hf_adaprune.errors import StatisticsError
from hf_adaprune.experts import tapped_experts
from hf_adaprune.gram_sums import GramSums, exact_products
from hf_adaprune.metrics import Context, block_influence
from hf_adaprune.recording import collect_statistics
from hf_adaprune.site import Site
from hf_adaprune.sites import ModelSites, find_sites
from hf_adaprune.statistics import Needs, Statistics, mean_cosine
from hf_adaprune.token_blocks import TokenBlocks
from hf_adaprune.tracing import watched_inputs

EVERYTHING = Needs(gram=True, gradients=True, elements=True, cosine=True, squares=True)


def window_loss(model: PreTrainedModel, blocks: TokenBlocks, window: int) -> torch.Tensor:
    """Summed next-token loss of one window, the padding cut off."""
    ids = blocks.input_ids[window][blocks.attention_mask[window]][None]
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")


@contextlib.contextmanager
def inputs_of(site: Site, rows: list[torch.Tensor]) -> Iterator[None]:
    """Collect what an attention's or MLP's reader reads, `[tokens, columns]` per call."""
    hook = site.reader.module.register_forward_pre_hook(lambda _, args: rows.append(args[0].reshape(-1, site.columns)))
    try:
        yield
    finally:
        hook.remove()


def expert_rows(layer: nn.Module, site: Site, hidden: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Gate-weighted channels of every expert, from the sparse block's input `[tokens, hidden]` alone."""
    router, experts = site.router.module, site.reader.module
    gates, chosen = router(hidden)[1:]
    found = []
    for expert in range(site.groups):
        token, place = torch.where(chosen == expert)
        gate, up = (hidden[token] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        found.append((token, experts.act_fn(gate) * up * gates[token, place][:, None]))
    return found


def activations(sites: ModelSites, blocks: TokenBlocks, window: int) -> dict[str, torch.Tensor]:
    """Reader inputs of one window by site, `[tokens, columns]`; zero where an expert does not serve a token."""
    found: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    ids = blocks.input_ids[window][blocks.attention_mask[window]][None]
    with contextlib.ExitStack() as stack, torch.no_grad():
        for site in sites:
            if site.kind == "experts":
                block = site.sublayer

                def reads(module: nn.Module, args: tuple[torch.Tensor, ...], site: Site = site) -> None:
                    hidden = args[0].reshape(-1, args[0].shape[-1])
                    wide = torch.zeros(len(hidden), site.groups, site.group_size)
                    for expert, (token, values) in enumerate(expert_rows(module, site, hidden)):
                        wide[token, expert] = values
                    found[site.name].append(wide.flatten(1))

                stack.callback(block.register_forward_pre_hook(reads).remove)
            else:
                stack.enter_context(inputs_of(site, found[site.name]))
        sites.model(input_ids=ids, use_cache=False)
    return {name: rows[0] for name, rows in found.items()}


@pytest.mark.parametrize("batch", [11, 33])
def test_sums_equal_torch_on_the_activations(sites: ModelSites, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps, "FORWARD_TOKENS", batch)
    blocks = random_blocks(5, padding=(0, 4, 1))
    found = collect_statistics(sites, blocks, Needs(gram=True, cosine=True, squares=True))
    rows = [activations(sites, blocks, window) for window in range(5)]
    for site in sites:
        kept = found.sites[site.name]
        torch.testing.assert_close(kept.sums, torch.stack([r[site.name].sum(0) for r in rows]), atol=1e-4, rtol=1e-4)
        squares = torch.stack([r[site.name].square().sum(0) for r in rows])
        torch.testing.assert_close(kept.squares, squares, atol=1e-4, rtol=1e-4)
        together = torch.cat([r[site.name] for r in rows])
        gram = together.T @ together
        if site.kind == "experts":
            width = (site.groups, site.group_size)
            gram = gram.reshape(*width, *width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            served = torch.stack([(r[site.name].reshape(-1, *width).abs().sum(-1) > 0).sum(0) for r in rows])
            assert torch.equal(kept.counts, served.float())
        else:
            assert torch.equal(kept.counts, blocks.attention_mask.sum(1).float())
        torch.testing.assert_close(kept.gram[0], gram, atol=1e-3, rtol=1e-4)
    assert torch.equal(found.tokens, blocks.attention_mask.sum(1).float())


def test_cosine_equals_torch(sites: ModelSites) -> None:
    blocks = random_blocks(3, padding=(5,))
    found = collect_statistics(sites, blocks, Needs(cosine=True)).cosine
    for window in range(3):
        streams: list[tuple[torch.Tensor, torch.Tensor]] = []

        def reads(module: nn.Module, args: tuple, kwargs: dict, output: object, streams: list = streams) -> None:
            after = output[0] if isinstance(output, tuple) else output
            streams.append((args[0] if args else kwargs["hidden_states"], after))

        ids = blocks.input_ids[window][blocks.attention_mask[window]][None]
        with contextlib.ExitStack() as stack, torch.no_grad():
            for layer in sites.layers:
                stack.callback(layer.register_forward_hook(reads, with_kwargs=True).remove)
            sites.model(input_ids=ids, use_cache=False)
        expected = [float((a * b).sum(-1).div(a.norm(dim=-1) * b.norm(dim=-1)).sum()) for a, b in streams]
        torch.testing.assert_close(found[window], torch.tensor(expected), atol=1e-4, rtol=1e-4)


def stored(matrix_path: str, site: Site, value: torch.Tensor) -> torch.Tensor:
    """A stored weight (or its gradient) as `[..., outputs, inputs]`."""
    matrix = next(m for m in (*site.writers, site.reader) if m.path == matrix_path)
    return value.transpose(-1, -2) if matrix.transposed else value


def weight_gradients(sites: ModelSites, blocks: TokenBlocks, window: int) -> dict[tuple[str, str], torch.Tensor]:
    """Gradients of a window's summed loss by site and matrix path, `[..., outputs, inputs]`."""
    owners = {(site.name, m.path): (site, m) for site in sites for m in (*site.writers, site.reader)}
    parameters = {key: matrix.parameter for key, (_, matrix) in owners.items()}
    unique = list({id(p): p for p in parameters.values()}.values())
    sites.model.zero_grad()
    gradients = torch.autograd.grad(window_loss(sites.model, blocks, window), unique)
    by_id = {id(p): g for p, g in zip(unique, gradients, strict=True)}
    return {key: stored(key[1], owners[key][0], by_id[id(p)]) for key, p in parameters.items()}


def test_gradient_terms_equal_explicit_weight_gradients(sites: ModelSites, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SEGMENT", 4)
    blocks = random_blocks(4, domains=2, padding=(3,))
    found = collect_statistics(sites, blocks, Needs(gradients=True, elements=True), gradient_samples=3)
    assert found.gradient_index.tolist() == [0, 1, 2]  # domains a, b, a
    explicit = [weight_gradients(sites, blocks, window) for window in range(3)]
    for site in sites:
        first_order = found.sites[site.name].first_order
        assert first_order.shape == (3, 3, site.columns)
        for window in range(3):
            product = site.reader.weight * explicit[window][site.name, site.reader.path]
            torch.testing.assert_close(
                first_order[window].sum(0), product.sum(-2).flatten(), atol=1e-4, rtol=1e-3, msg=site.name
            )
        for matrix in (*site.writers, site.reader):
            over = -2 if matrix is site.reader else -1
            weight = matrix.weight
            for domain, windows in enumerate(((0, 2), (1,))):
                scored = [int(blocks.attention_mask[w].sum()) - 1 for w in windows]
                mine = [explicit[w][site.name, matrix.path] / n for w, n in zip(windows, scored, strict=True)]
                first = weight * sum(mine) / len(mine)
                second = weight.square() * sum(g.square() for g in mine) / len(mine)
                expected = torch.stack(
                    [
                        first.abs().sum(over),
                        second.abs().sum(over),
                        (first - second / 2).abs().sum(over),
                        first.sum(over).abs(),
                    ]
                )
                kept = found.sites[site.name].elements[matrix.path][domain]
                torch.testing.assert_close(kept, expected, atol=1e-5, rtol=2e-3, msg=f"{site.name} {matrix.path}")


def test_output_gradients_and_segments_equal_autograd(sites: ModelSites, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "SEGMENT", 4)
    blocks = random_blocks(2, padding=(2,))
    found = collect_statistics(sites, blocks, Needs(gradients=True), gradient_samples=2)
    for window in range(2):
        seen: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
        with contextlib.ExitStack() as stack:
            for site in sites:
                owner = site.sublayer if site.kind == "experts" else site.reader.module

                def reads(module: nn.Module, args: tuple, output: object, own: list = seen[site.name]) -> None:
                    own += [args[0], output[0] if isinstance(output, tuple) else output]

                stack.callback(owner.register_forward_hook(reads).remove)
            loss = window_loss(sites.model, blocks, window)
        for site in sites:
            inputs, outputs = seen[site.name]
            at_inputs, at_outputs = torch.autograd.grad(loss, [inputs, outputs], retain_graph=True)
            squares = at_outputs.reshape(-1, site.outputs).square().sum(0)
            kept = found.sites[site.name]
            torch.testing.assert_close(kept.output_gradients[window], squares, atol=1e-4, rtol=2e-3, msg=site.name)
            if site.kind != "experts":
                terms = (inputs * at_inputs).detach().reshape(-1, site.columns)
                expected = torch.zeros(3, site.columns).index_add(0, torch.arange(len(terms)) // 4, terms)
                torch.testing.assert_close(kept.first_order[window], expected, atol=1e-4, rtol=2e-3, msg=site.name)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_domains_add_up_and_disk_equals_cpu(family: str, tmp_path: Path) -> None:
    sites = find_sites(tiny_model(family))
    blocks = random_blocks(5, domains=2, padding=(2,))
    whole = collect_statistics(sites, blocks, Needs(gram=True))
    parts = collect_statistics(sites, blocks, Needs(gram=True, per_domain=True))
    disk = collect_statistics(sites, blocks, Needs(gram=True, per_domain=True), gram_place="disk", folder=tmp_path)
    assert (whole.gram_domains, parts.gram_domains) == (("all",), ("a", "b"))
    for site in sites:
        pooled, split = whole.sites[site.name].gram, parts.sites[site.name].gram
        torch.testing.assert_close(split.sum(0), pooled[0], atol=1e-3, rtol=1e-5)
        assert torch.equal(split, split.mT)
        assert torch.equal(disk.sites[site.name].gram, split)
        written = next(tmp_path.glob(f"pass_*/{site.name}.safetensors"))
        assert torch.equal(load_file(written)["gram"], split)
    assert not list(tmp_path.glob("pass_*/*.sums.*")), "what matrices were summed in is left on the disk"
    alone = collect_statistics(sites, blocks.select(torch.where(blocks.domain == 1)[0]), Needs(gram=True))
    name = sites.sites[-1].name
    torch.testing.assert_close(parts.sites[name].gram[1], alone.sites[name].gram[0], atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("strip", [3, 16, 192])
@given(seed=st.integers(0, 10**6), processes=st.integers(1, 4), spread=st.floats(0, 3))
def test_sums_are_equal_in_any_order_and_split_in_any_way(
    family: str, strip: int, seed: int, processes: int, spread: float
) -> None:
    """To the last bit: Gram matrices decide plans, and no plan may hang on the number of processes."""
    site = find_sites(tiny_model(family)).sites[-1]
    random = torch.Generator().manual_seed(seed)
    columns = site.group_size if site.kind == "experts" else site.columns
    scales = 10 ** (spread * torch.randn(columns, generator=random))
    batches = [torch.randn(7, columns, generator=random) * scales for _ in range(6)]
    at = (1, 0) if site.kind == "experts" else (1,)

    def summed(order: Sequence[int]) -> GramSums:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gram_sums, "STRIP", strip)
            sums = GramSums(site, 2, "cpu")
        for number in order:
            sums.add(at, batches[number], torch.float32)
        return sums

    one = summed(range(6)).whole()
    order = torch.randperm(6, generator=random).tolist()
    parts = [summed(order[rank::processes]) for rank in range(processes)]
    for part in parts[1:]:
        for total, own in zip(parts[0].strips, part.strips, strict=True):
            total += own
    assert torch.equal(parts[0].whole(), one)
    assert torch.equal(one, one.mT) and not one[0].any()
    exact = sum(batch.double().T @ batch.double() for batch in batches)
    error = (one[at].double() - exact).abs()
    assert bool((error <= 1e-5 * (exact.diag().sqrt()[:, None] * exact.diag().sqrt())).all())


def state_of(model: PreTrainedModel) -> tuple:
    """Everything about a model that a pass could leave changed."""
    hooks = [
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]
    flags = [module.training for module in model.modules()]
    asks = [parameter.requires_grad for parameter in model.parameters()]
    return hooks, flags, asks, getattr(model.config, "_experts_implementation", None)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_the_model_is_untouched(family: str, fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(family).train()
    model.lm_head.eval()
    sites = find_sites(model)
    next(model.parameters()).requires_grad_(False)
    reader = sites.sites[0].reader.parameter
    reader.grad = torch.full_like(reader, 2.0)  # of a training step that is under way
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before, precision = state_of(model), torch.backends.mkldnn.matmul.fp32_precision
    if fails:
        calls = iter(range(100))
        own = recording.loss_gradient

        def fail(*args: torch.Tensor) -> torch.Tensor:
            if next(calls) == 1:
                raise KeyboardInterrupt
            return own(*args)

        monkeypatch.setattr(recording, "loss_gradient", fail)
        with pytest.raises(KeyboardInterrupt):
            collect_statistics(sites, random_blocks(3), EVERYTHING, gradient_samples=2)
    else:
        collect_statistics(sites, random_blocks(3), EVERYTHING, gradient_samples=2)
    assert state_of(model) == before
    assert torch.backends.mkldnn.matmul.fp32_precision == precision
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(reader.grad, torch.full_like(reader, 2.0))
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not reader)


def test_gradients_of_a_training_step_do_not_count() -> None:
    sites = find_sites(tiny_model("llama"))
    blocks = random_blocks(2)
    clean = collect_statistics(sites, blocks, Needs(elements=True), gradient_samples=2)
    for parameter in sites.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    dirty = collect_statistics(sites, blocks, Needs(elements=True), gradient_samples=2)
    for site in sites:
        for path, terms in clean.sites[site.name].elements.items():
            assert torch.equal(terms, dirty.sites[site.name].elements[path])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_statistics_are_float32_whatever_the_model_is(family: str, dtype: torch.dtype) -> None:
    sites = find_sites(tiny_model(family).to(dtype))
    blocks = random_blocks(3, padding=(2,))
    found = collect_statistics(sites, blocks, EVERYTHING, gradient_samples=2)
    for site in sites:
        kept = found.sites[site.name]
        sums = (kept.sums, kept.squares, kept.gram, kept.first_order, kept.output_gradients)
        assert {value.dtype for value in (*sums, *kept.elements.values())} == {torch.float32}
        diagonal = kept.gram[0].diagonal(dim1=-2, dim2=-1).flatten()
        torch.testing.assert_close(diagonal, kept.squares.sum(0), atol=1e-4, rtol=1e-4)
    assert found.cosine.dtype == torch.float32


def test_activations_that_are_not_finite_name_the_site() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("inf")
    with pytest.raises(StatisticsError, match=r"layers\.1\.mlp: sums are not finite"):
        collect_statistics(find_sites(model), random_blocks(2), Needs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_products_are_exact_and_leave_the_flags(dtype: torch.dtype) -> None:
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)
    before = [backend.fp32_precision for backend in backends]
    rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    with exact_products(torch.bfloat16), exact_products(dtype):
        product = rows.T @ rows
    exact = rows.double().T @ rows.double()
    torch.testing.assert_close(product.double(), exact, atol=2e-4, rtol=1e-5)
    with contextlib.suppress(KeyError), exact_products(dtype):
        raise KeyError
    assert [backend.fp32_precision for backend in backends] == before


def test_the_pass_computes_what_the_model_computes() -> None:
    """Fast products are for Gram matrices only: positions in a rotary embedding need all their bits."""
    model = tiny_model("llama").to(torch.bfloat16)
    sites = find_sites(model)
    seen: list[str] = []
    hook = model.model.rotary_emb.register_forward_pre_hook(
        lambda *_: seen.append(torch.backends.mkldnn.matmul.fp32_precision)
    )
    before = torch.backends.mkldnn.matmul.fp32_precision
    collect_statistics(sites, random_blocks(2), Needs(gram=True))
    hook.remove()
    assert set(seen) == {before}


def test_gradient_samples_are_spread_over_the_domains() -> None:
    sites = find_sites(tiny_model("llama", num_hidden_layers=1))
    blocks = random_blocks(7, domains=3)
    found = collect_statistics(sites, blocks, Needs(gradients=True), gradient_samples=4)
    assert torch.bincount(blocks.domain[found.gradient_index]).tolist() == [2, 1, 1]
    assert len(collect_statistics(sites, blocks, Needs(gradients=True), gradient_samples=99).gradient_index) == 7
    assert len(collect_statistics(sites, blocks, Needs(), gradient_samples=4).gradient_index) == 0


def test_sample_weights_share_a_domains_weight() -> None:
    sites = find_sites(tiny_model("llama", num_hidden_layers=1))
    found: Statistics = collect_statistics(sites, random_blocks(5, domains=2), Needs())
    assert torch.equal(found.sample_weights(), torch.ones(5))
    weights = found.sample_weights((3.0, 1.0))
    assert float(weights.mean()) == pytest.approx(1)
    assert float(weights[0] * 3) == pytest.approx(3 * float(weights[1] * 2))  # three samples of a, two of b
    for other in ((1.0,), (1.0, 1.0, 1.0)):
        with pytest.raises(StatisticsError, match="one domain weight for each of the 2 domains"):
            found.sample_weights(other)


def test_cosines_of_no_window_that_counts_are_refused() -> None:
    sites = find_sites(tiny_model("llama", num_hidden_layers=1))
    found = collect_statistics(sites, random_blocks(3), Needs(cosine=True))
    for weights in (torch.zeros(3), torch.full((3,), torch.nan)):
        with pytest.raises(StatisticsError, match="not finite"):
            mean_cosine(found, weights)
        with pytest.raises(StatisticsError, match="not finite"):
            block_influence(Context(found, weights))


@pytest.mark.parametrize("family", MIXTURES)
def test_taps_change_nothing_and_close(family: str) -> None:
    model = tiny_model(family)
    sites = find_sites(model)
    site = next(site for site in sites if site.kind == "experts")
    ids, before = tokens(), model.config._experts_implementation
    expected = logits_of(model, ids)
    rows: dict[int, torch.Tensor] = {}
    with watched_inputs(sites, site, rows.__setitem__):
        torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-5, rtol=1e-4)
    assert sum(map(len, rows.values())) == ids.numel() * FAMILIES[family]["num_experts_per_tok"]
    with pytest.raises(KeyError), tapped_experts(model.config, {site.reader.module: rows.pop}):
        raise KeyError
    assert model.config._experts_implementation == before
