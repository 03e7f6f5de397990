"""Clusters of calibration windows as domains: they find kinds of text, and weights on them reach the statistics."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import FAMILIES, tiny_model
from test_trials import SELECTION, UNITS, config_of, tokenizer
from test_trials import tiny_model as text_model

from hf_adaprune import TextSource, clustering, find_sites, prune, search_plan, tracing
from hf_adaprune.clustering import cluster_domains
from hf_adaprune.config import ImportanceConfig
from hf_adaprune.errors import CalibrationError, ConfigError
from hf_adaprune.importance import score_units
from hf_adaprune.recording import collect_statistics
from hf_adaprune.stages import gather_texts
from hf_adaprune.statistics import Needs
from hf_adaprune.token_blocks import TokenBlocks
from hf_adaprune.tracing import mean_hidden_states

KINDS = ((3, 6), (40, 43), (80, 83))  # tokens of three kinds of text


def mixed_blocks(counts: tuple[int, ...] = (9, 6, 3), length: int = 60, seed: int = 0) -> tuple[TokenBlocks, list[int]]:
    """Windows of three kinds in random order, from two sources that have nothing to do with them."""
    kinds = [kind for kind, count in enumerate(counts) for _ in range(count)]
    random.Random(seed).shuffle(kinds)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(*KINDS[kind], (length,), generator=generator) for kind in kinds])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, length // 2 :] = False
    return TokenBlocks(ids, mask, torch.arange(len(kinds)) % 2, ("a", "b")), kinds


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_separable_texts_fall_into_separate_clusters(family: str) -> None:
    blocks, kinds = mixed_blocks()
    found = cluster_domains(find_sites(tiny_model(family)), blocks, 3, 0)
    # By size: the three kinds have 9, 6 and 3 windows.
    assert found.domain.tolist() == kinds
    assert torch.equal(found.input_ids, blocks.input_ids) and torch.equal(found.attention_mask, blocks.attention_mask)
    assert len(found.domains) == 3


def test_names_tell_the_dominant_source_and_order_the_size() -> None:
    blocks, kinds = mixed_blocks((4, 10, 4))
    source = torch.tensor([int(kind != 1) for kind in kinds])
    source[kinds.index(1)] = 1  # one window of ten is from elsewhere
    named = TokenBlocks(blocks.input_ids, blocks.attention_mask, source, ("c4", "code"))
    found = cluster_domains(find_sites(tiny_model("llama")), named, 3, 0)
    assert found.domains == ("cluster 1 (c4 90 %)", "cluster 2 (code 100 %)", "cluster 3 (code 100 %)")
    assert torch.bincount(found.domain).tolist() == [10, 4, 4]
    # Of equal ones the cluster of the earlier window comes first.
    assert found.domain.tolist().index(1) < found.domain.tolist().index(2)


def test_clusters_are_deterministic_and_hang_on_the_seed_alone() -> None:
    model = tiny_model("llama")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (24, 16), generator=generator)  # no clusters there: starts decide
    blocks = TokenBlocks(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(24), ("a",))
    state = torch.random.get_rng_state()
    first = cluster_domains(find_sites(model), blocks, 5, 3)
    torch.manual_seed(11)
    assert cluster_domains(find_sites(model), blocks, 5, 3).digest == first.digest
    assert torch.bincount(first.domain, minlength=5).min() >= 1
    sizes = torch.bincount(first.domain).tolist()
    assert sizes == sorted(sizes, reverse=True)
    assert len({cluster_domains(find_sites(model), blocks, 5, seed).digest for seed in range(6)}) > 1
    torch.random.set_rng_state(state)
    cluster_domains(find_sites(model), blocks, 5, 3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_features_are_means_of_the_middle_layer_without_padding() -> None:
    model = tiny_model("llama", num_hidden_layers=4)
    blocks, _ = mixed_blocks()
    features = mean_hidden_states(find_sites(model), blocks)
    seen: list[torch.Tensor] = []
    hook = model.model.layers[1].register_forward_hook(lambda *args: seen.append(args[2]))
    for ids, mask in zip(blocks.input_ids, blocks.attention_mask, strict=True):
        model(ids[mask][None])
    hook.remove()
    expected = torch.stack([(own[0] if isinstance(own, tuple) else own)[0].detach().double().mean(0) for own in seen])
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_batches_do_not_matter_and_the_model_is_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").train()
    model.lm_head.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    blocks, _ = mixed_blocks()
    whole = mean_hidden_states(find_sites(model), blocks)
    monkeypatch.setattr(tracing, "_BATCH_TOKENS", 180)
    torch.testing.assert_close(mean_hidden_states(find_sites(model), blocks), whole, rtol=1e-4, atol=1e-5)
    assert model.training and not model.lm_head.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_massive_dimension_does_not_decide_alone() -> None:
    blocks, kinds = mixed_blocks()
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 0.0
        for first, last in KINDS:  # large, and the same for all kinds
            model.model.embed_tokens.weight[first:last, 5] = torch.tensor([-1e3, 0.0, 1e3])
    assert cluster_domains(find_sites(model), blocks, 3, 0).domain.tolist() == kinds
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    features[:10, :7] += 6
    features[:, 7] *= 1e4
    labels = clustering._k_means(clustering._standardized(features).numpy(), 2, 0)
    assert len(set(labels[:10])) == len(set(labels[10:])) == 1 and labels[0] != labels[-1]
    constant = torch.cat([features, torch.full((30, 1), 7.0, dtype=torch.float64)], 1)
    assert not clustering._standardized(constant)[:, 8].any()


def test_hidden_states_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    blocks, _ = mixed_blocks()
    with torch.no_grad():
        model.model.embed_tokens.weight[4] = float("inf")
    with pytest.raises(CalibrationError, match="not finite"):
        cluster_domains(find_sites(model), blocks, 3, 0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_family_has_hidden_states(family: str) -> None:
    blocks, _ = mixed_blocks((2, 2, 2), 8)
    model = tiny_model(family)
    hidden = FAMILIES[family].get("hidden_size", 32)
    assert mean_hidden_states(find_sites(model), blocks.select([0, 2, 3])).shape == (3, hidden)


def test_too_few_windows_are_refused() -> None:
    model = tiny_model("llama")
    blocks, _ = mixed_blocks((2, 1, 1))
    for clusters in (4, 9):
        with pytest.raises(CalibrationError, match=r"4 calibration windows cannot form .* Lower calibration\.clusters"):
            cluster_domains(find_sites(model), blocks, clusters, 0)
    alike = blocks.select([0, 0, 0, 2, 2, 2])
    with pytest.raises(CalibrationError, match="only 2 of 6 calibration windows differ"):
        cluster_domains(find_sites(model), alike, 3, 0)
    assert cluster_domains(find_sites(model), alike, 2, 0).domain.tolist() == [0, 0, 0, 1, 1, 1]


# -- in a run ---------------------------------------------------------------------------------------------------------


def digits(seed: int) -> str:
    draw = random.Random(seed)
    return "\n".join(" ".join(str(draw.randrange(10**6)) for _ in range(20)) for _ in range(6))


# Two kinds of text, each in both sources.
BOTH = tuple(
    TextSource(name, [*SELECTION_LIKE, *(digits(seed + number) for number in range(10))])
    for name, seed, SELECTION_LIKE in (
        ("one", 1, tuple(f"{text}\n" for text in (SELECTION.texts[0], SELECTION.texts[1]))),
        ("two", 50, tuple(f"{text}\n" for text in (SELECTION.texts[2], SELECTION.texts[3]))),
    )
)
OTHER = TextSource("selection", SELECTION.texts[5:])
CALIBRATION = {"sources": BOTH, "selection": (OTHER,), "clusters": 3}


def test_weights_of_clusters_reach_the_statistics() -> None:
    model = text_model()
    sites = find_sites(model)
    config = config_of(calibration=CALIBRATION)
    blocks, held_out, _ = gather_texts(sites, tokenizer(), config, True)
    plain, _, _ = gather_texts(sites, tokenizer(), config_of(calibration={**CALIBRATION, "clusters": 0}), True)
    assert blocks is not None and plain is not None and held_out is None
    assert all(name.startswith("cluster ") for name in blocks.domains) and plain.domains == ("one", "two")
    assert torch.equal(blocks.input_ids, plain.input_ids)
    found = collect_statistics(sites, blocks, Needs(gram=True, per_domain=True))
    whole = collect_statistics(sites, plain, Needs(gram=True))
    alone = collect_statistics(sites, blocks.select(torch.where(blocks.domain == 1)[0]), Needs(gram=True))
    for name, own in found.sites.items():
        assert own.gram.shape[0] == 3
        torch.testing.assert_close(own.gram.sum(0), whole.sites[name].gram[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(own.gram[1], alone.sites[name].gram[0], rtol=1e-4, atol=1e-4)
    obs = ImportanceConfig({"obs": 1.0})
    weighted = score_units(sites, UNITS, obs, found, weights=found.sample_weights((0.0, 1.0, 0.0)))
    expected = score_units(sites, UNITS, obs, alone)
    scale = float(found.tokens.sum() / alone.tokens.sum())  # scores are sums over as many windows as there are
    for name, own in expected.units.items():
        torch.testing.assert_close(weighted.units[name], own * scale, rtol=1e-3, atol=1e-9)


def test_the_check_of_repairs_leaves_every_cluster_a_window() -> None:
    config = config_of(calibration={**CALIBRATION, "clusters": 12}, repair={"holdout": 0.3})
    sites = find_sites(text_model())
    blocks, held_out, _ = gather_texts(sites, tokenizer(), config, True)
    assert blocks is not None and held_out is not None
    assert len(held_out) == round(0.3 * (len(blocks) + len(held_out)))
    assert torch.bincount(blocks.domain, minlength=12).min() >= 1


def test_a_search_weights_clusters() -> None:
    config = config_of({"trials": 5}, calibration=CALIBRATION, repair={"holdout": 0.1})
    model = text_model()
    found = search_plan(model, tokenizer(), config)
    members = next(d for d in found.space.dimensions if d.path == "calibration.domain_weights").members
    assert len(members) == 3 and members[0].startswith("cluster 1 (")
    weights = [trial.point["calibration.domain_weights"] for trial in found.journal.trials]
    assert len(set(weights)) == 5 and not any(trial.error for trial in found.journal.trials)
    # Trial 0 weights windows alike, and so clusters by their size.
    sizes = torch.bincount(gather_texts(find_sites(text_model()), tokenizer(), config, True)[0].domain)
    assert weights[0] == pytest.approx((sizes / sizes.sum()).tolist(), abs=1e-6) and sizes[0] > 2 * sizes[2]
    result = prune(model, tokenizer(), found.config, plan=found.plan)
    assert result.plan == found.plan and list(result.calibration["domains"]) == list(members)


def test_fewer_gradients_than_clusters_are_refused_before_text_is_read() -> None:
    config = config_of(calibration={**CALIBRATION, "clusters": 9})
    with pytest.raises(ConfigError, match="each of the 9 sources or clusters"):
        search_plan(text_model(), None, config)
