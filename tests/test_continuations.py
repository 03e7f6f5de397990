"""Laws of continuations: shared contexts change the work, never the numbers."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from conftest import HEADLESS, VOCABULARY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import plan_of_kind
from transformers import PreTrainedModel

from hf_adaprune.continuations import log_likelihoods
from hf_adaprune.errors import CalibrationError
from hf_adaprune.masking import masked
from hf_adaprune.sites import find_sites
from hf_adaprune.surgery import apply_plan

Pair = tuple[list[int], list[int]]


def drawn(contexts: list[int], continuations: list[int], seed: int = 0) -> list[Pair]:
    """Every context, by length, with continuations of the given lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [(context, ids(length)) for context in map(ids, contexts) for length in continuations]


# A context that is shared in one forward with another one of its length, one with a single continuation, a short one.
PAIRS = [*drawn([20, 20, 9], [1, 3, 1, 2]), *drawn([15], [4], 1), *drawn([1], [5, 6], 2)]


def alone(model: PreTrainedModel, pairs: list[Pair], positions: int | None = None) -> list[float]:
    """One forward a pair, without a cache."""
    found = []
    for context, continuation in pairs:
        ids = torch.tensor([context + continuation])[:, -(positions + 1 if positions else 0) :]
        with torch.no_grad():
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0].double().log_softmax(-1)
        scored = min(len(continuation), ids.shape[1] - 1)
        found.append(float(logits[-scored:].gather(1, ids[0, -scored:, None]).sum()))
    return found


def assert_equal(model: PreTrainedModel, pairs: list[Pair] = PAIRS, **options: Any) -> None:
    """Scores are those of pairs by themselves."""
    found, tokens = log_likelihoods(model, pairs, **options)
    assert found == pytest.approx(alone(model, pairs), abs=2e-4)
    assert tokens == sum(len(continuation) for _, continuation in pairs)


@pytest.mark.parametrize("batch_size", [1, 5, 50])
def test_shared_contexts_score_as_pairs_by_themselves(family: str, batch_size: int) -> None:
    assert_equal(tiny_model(family), batch_size=batch_size)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("window", [4, 12])
def test_windows_of_attention_slide_over_a_shared_context(family: str, window: int) -> None:
    assert_equal(tiny_model(family, sliding_window=window))


@pytest.mark.parametrize("kind", ["channel", "kv_group", "attention", "mlp", "layer"])
def test_pruned_and_masked_models_share_contexts(family: str, kind: str) -> None:
    if kind == "kv_group" and family in HEADLESS:
        pytest.skip("heads of this family stay")
    model = tiny_model(family)
    sites = find_sites(model)
    plan = plan_of_kind(sites, kind)
    if plan is None:
        pytest.skip("nothing of this kind")
    with masked(sites, plan):
        assert_equal(model)
        found, _ = log_likelihoods(model, PAIRS)
    apply_plan(sites, plan)
    assert_equal(model)
    assert log_likelihoods(model, PAIRS)[0] == pytest.approx(found, abs=2e-4)


def test_a_model_without_a_cache_reads_whole_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    forward = model.forward

    @functools.wraps(forward)
    def without(*args: Any, use_cache: bool = False, **kwargs: Any) -> Any:
        assert kwargs.get("past_key_values") is None
        return forward(*args, use_cache=False, **kwargs)

    monkeypatch.setattr(model, "forward", without)
    assert_equal(model)


@pytest.mark.parametrize(
    ("contexts", "length", "share"),
    [([60], 4, 0.3), ([60, 60, 60], 4, 0.3), ([1], 4, 1.0), ([4], 4, 1.0), ([2], 1, 0.25)],
)
def test_a_long_context_is_read_once(contexts: list[int], length: int, share: float) -> None:
    model, read = tiny_model("llama"), 0

    def count(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal read
        read += args[0].numel()

    pairs = drawn(contexts, [length] * 4)
    with_contexts = sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
    handle = model.get_input_embeddings().register_forward_pre_hook(count)
    log_likelihoods(model, pairs)
    handle.remove()
    assert read <= share * with_contexts


@pytest.mark.parametrize("positions", [8, 21, 24])
def test_what_does_not_fit_loses_its_first_tokens(positions: int) -> None:
    model = tiny_model("llama", max_position_embeddings=positions)
    pairs = [*PAIRS, *drawn([2], [40, 3, 2])]
    found, _ = log_likelihoods(model, pairs)
    assert found == pytest.approx(alone(model, pairs, positions), abs=2e-4)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(3, 5), min_size=1, max_size=12), st.lists(st.integers(3, 5), min_size=1, max_size=5)
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 9),
)
def test_any_pairs_keep_their_order(pairs: list[Pair], batch_size: int) -> None:
    assert_equal(LLAMA, pairs, batch_size=batch_size)


LLAMA = tiny_model("llama", num_hidden_layers=1)


@pytest.mark.parametrize("pair", [([], [3]), ([3], [])])
def test_what_has_no_tokens_is_refused(pair: Pair) -> None:
    with pytest.raises(CalibrationError, match="one token each"):
        log_likelihoods(LLAMA, [pair])
