"""Laws of token blocks: digests, splits and batches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import windows_of

from hf_adaprune.errors import CalibrationError
from hf_adaprune.token_blocks import TokenBlocks


def blocks_of(rows: list[list[int]], domain: list[int], domains: tuple[str, ...], length: int) -> TokenBlocks:
    """Blocks from ragged rows, padded with 0."""
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows]).reshape(len(rows), length)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]).reshape(len(rows), length).bool()
    return TokenBlocks(ids, mask, torch.tensor(domain, dtype=torch.long), domains)


ragged = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(ragged, ragged)
def test_digest_changes_if_and_only_if_content_does(one: list[list[int]], two: list[list[int]]) -> None:
    first, second = (blocks_of(rows, [0] * len(rows), ("a",), 4) for rows in (one, two))
    assert (first.digest == second.digest) == (one == two)
    garbage = torch.where(first.attention_mask, first.input_ids, 7)
    assert TokenBlocks(garbage, first.attention_mask, first.domain, ("a",)).digest == first.digest
    assert TokenBlocks(first.input_ids, first.attention_mask, first.domain, ("b",)).digest != first.digest


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.floats(0, 0.99), st.integers(0, 5))
def test_split_is_a_stratified_partition(domain: list[int], fraction: float, seed: int) -> None:
    blocks = blocks_of([[index] for index in range(len(domain))], domain, ("a", "b", "c"), 1)
    kept, held = blocks.split(fraction, seed)
    assert sorted(windows_of(kept) + windows_of(held)) == windows_of(blocks)
    assert windows_of(kept) == sorted(windows_of(kept)) and windows_of(held) == sorted(windows_of(held))
    assert len(kept) >= 1 and (len(held) > 0 or fraction == 0 or len(blocks) == 1)
    for index in range(3):
        share = domain.count(index) * len(held) / len(domain)
        assert abs(int((held.domain == index).sum()) - share) <= 1
    again = blocks.split(fraction, seed)
    assert (kept.digest, held.digest) == (again[0].digest, again[1].digest)


@pytest.mark.parametrize("domain", [[0] * 9 + [1], [1] + [0] * 9, [0, 1, 1, 2, 2, 2, 2], [2] * 20 + [0, 1]])
def test_split_leaves_every_domain_a_window_where_it_can(domain: list[int]) -> None:
    """A domain without windows could not be weighted."""
    blocks = blocks_of([[index] for index in range(len(domain))], domain, ("a", "b", "c"), 1)
    for fraction in (0.05, 0.2, 0.35, 0.5):
        kept, held = blocks.split(fraction, 0)
        assert set(kept.domain.tolist()) == set(domain)
        assert len(held) == max(1, int(fraction * len(domain) + 0.5))


def test_split_depends_on_its_seed_and_refuses_everything() -> None:
    blocks = blocks_of([[index] for index in range(40)], [0] * 40, ("a",), 1)
    assert blocks.split(0.5, 0)[1].digest != blocks.split(0.5, 1)[1].digest
    with pytest.raises(CalibrationError, match=r"`fraction` should be in \[0, 1\)"):
        blocks.split(1.0, 0)


def test_batches_are_the_windows_in_order() -> None:
    blocks = blocks_of([[1, 2], [3], [4, 5]], [0, 1, 0], ("a", "b"), 2)
    batches = list(blocks.batches(2))
    assert [len(batch) for batch in batches] == [2, 1]
    assert [window for batch in batches for window in windows_of(batch)] == windows_of(blocks)
    assert blocks.tokens == 5
    assert windows_of(blocks.select([2, 0])) == [(4, 5), (1, 2)]


@pytest.mark.parametrize(
    ("ids", "mask", "domain", "message"),
    [
        (torch.zeros(1, 2), torch.ones(1, 3), torch.zeros(1), "token blocks need ids and mask"),
        (torch.zeros(1, 3), torch.tensor([[0, 1, 1]]), torch.zeros(1), "on the right"),
        (torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1), "should index into the 1"),
    ],
)
def test_blocks_refuse_what_does_not_fit(
    ids: torch.Tensor, mask: torch.Tensor, domain: torch.Tensor, message: str
) -> None:
    with pytest.raises(CalibrationError, match=message):
        TokenBlocks(ids, mask, domain, ("a",))
