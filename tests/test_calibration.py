"""Laws of the windows that are made of text."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import TEMPLATE, begun_tokenizer, calibration_make_tokenizer, calibration_prose, windows_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_adaprune.calibration import begin_token, calibration_blocks, packed_blocks, report_blocks, window_counts
from hf_adaprune.config import TextSource
from hf_adaprune.documents import Documents, read_source
from hf_adaprune.errors import CalibrationError


@pytest.fixture(scope="module")
def calibration_tokenizer() -> PreTrainedTokenizerFast:
    """With an end-of-sequence token and neither padding token nor chat template."""
    return calibration_make_tokenizer(eos_token="<eos>")


def test_same_seed_same_windows_and_another_seed_others(calibration_tokenizer: PreTrainedTokenizerFast) -> None:
    sources = [
        TextSource("a", [calibration_prose(k, 60) for k in range(30)]),
        TextSource("b", [calibration_prose(99, 9000)]),
    ]
    blocks, same, other = (
        calibration_blocks(sources, calibration_tokenizer, samples=9, sequence_length=32, seed=seed)
        for seed in (3, 3, 4)
    )
    assert blocks.digest == same.digest != other.digest
    assert blocks.domains == ("a", "b") and torch.bincount(blocks.domain).tolist() == [5, 4]
    assert blocks.domain[:2].tolist() == [0, 1] and blocks.attention_mask.all()
    more = calibration_blocks(sources, calibration_tokenizer, samples=20, sequence_length=32, seed=3)
    assert windows_of(more)[:9] == windows_of(blocks)
    assert len(set(windows_of(more))) == 20


def test_windows_are_the_documents_end_to_end(calibration_tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [calibration_prose(k, 24) for k in range(12)]
    eos = calibration_tokenizer.eos_token_id
    whole = {tuple(calibration_tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts}
    total = sum(map(len, whole)) + len(whole)
    blocks = calibration_blocks(
        [TextSource("a", texts)], calibration_tokenizer, samples=total // 16, sequence_length=16
    )
    stream = [token for window in windows_of(blocks) for token in window]
    pieces, piece = [], []
    for token in stream:
        if token == eos:
            pieces.append(tuple(piece))
            piece = []
        else:
            piece.append(token)
    assert len(pieces) >= 11 and set(pieces) <= whole


def test_a_huge_document_is_not_tokenised_whole(
    calibration_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = 0
    encode = PreTrainedTokenizerFast.__call__

    def counting(self: PreTrainedTokenizerFast, texts: list[str], **options: object) -> object:
        nonlocal seen
        seen += sum(map(len, texts))
        return encode(self, texts, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counting)
    text = calibration_prose(1, 200_000)
    calibration_blocks([TextSource("a", [text])], calibration_tokenizer, samples=4, sequence_length=32)
    report_blocks(TextSource("a", [text]), calibration_tokenizer, tokens=64, sequence_length=32)
    assert seen < 60_000 < len(text)


def test_a_short_source_gives_its_windows_to_the_others(calibration_tokenizer: PreTrainedTokenizerFast) -> None:
    short, long = TextSource("s", [calibration_prose(1, 48)]), TextSource("l", [calibration_prose(2, 3000)])
    blocks = calibration_blocks([short, long, long], calibration_tokenizer, samples=40, sequence_length=32)
    assert len(blocks) == 40 and blocks.domains == ("s", "l", "l-2")
    counts = torch.bincount(blocks.domain).tolist()
    assert 1 <= counts[0] < 13 and abs(counts[1] - counts[2]) <= 1
    with pytest.raises(
        CalibrationError, match=r"has (\d+) windows of 32 tokens; 40 were asked for.*lower calibration.samples to \1"
    ):
        calibration_blocks([short, short], calibration_tokenizer, samples=40, sequence_length=32)


def test_less_than_a_window(calibration_tokenizer: PreTrainedTokenizerFast) -> None:
    text = calibration_prose(1, 12)
    ids = calibration_tokenizer(text, add_special_tokens=False)["input_ids"]
    blocks = calibration_blocks([TextSource("a", [text])], calibration_tokenizer, samples=1, sequence_length=128)
    assert windows_of(blocks) == [tuple(ids)] and blocks.input_ids.shape == (1, 128)
    long = TextSource("l", [calibration_prose(2, 3000)])
    for sources in ([TextSource("tiny", ["a b"])], [TextSource("tiny", [text]), long]):
        with pytest.raises(CalibrationError, match=r"'tiny' is too short: \d+ tokens, one window needs 128; give more"):
            calibration_blocks(sources, calibration_tokenizer, samples=2, sequence_length=128)
    with pytest.raises(CalibrationError, match="`samples` should give each"):
        calibration_blocks([long, long], calibration_tokenizer, samples=1, sequence_length=8)


def test_tokens_that_the_model_lacks_are_refused(calibration_tokenizer: PreTrainedTokenizerFast) -> None:
    source = TextSource("a", [calibration_prose(1, 600)])
    with pytest.raises(CalibrationError, match="tokenizer and model do not belong together"):
        calibration_blocks([source], calibration_tokenizer, samples=2, sequence_length=16, vocab_size=40)
    with pytest.raises(CalibrationError, match="tokenizer and model do not belong together"):
        report_blocks(source, calibration_tokenizer, tokens=64, sequence_length=16, vocab_size=40)


@settings(deadline=None, max_examples=25)
@given(st.lists(st.text("ab the\n ", max_size=400), min_size=1, max_size=4), st.integers(2, 90), st.integers(2, 40))
def test_report_blocks_equal_whole_tokenisation(texts: list[str], tokens: int, length: int) -> None:
    tokenizer = test_report_blocks_equal_whole_tokenisation.tokenizer  # type: ignore[attr-defined]
    long = texts * 12 + [calibration_prose(len(texts), 1500)]
    whole = tokenizer("\n\n".join(long), add_special_tokens=False)["input_ids"][:tokens]
    blocks = report_blocks(TextSource("a", long), tokenizer, tokens=tokens, sequence_length=length)
    rest = len(whole) % length
    expected = whole[: len(whole) - 1] if rest == 1 else whole
    assert [token for window in windows_of(blocks) for token in window] == expected
    assert all(len(window) == length for window in windows_of(blocks)[:-1])


test_report_blocks_equal_whole_tokenisation.tokenizer = calibration_make_tokenizer()  # type: ignore[attr-defined]


def test_report_blocks_do_not_depend_on_where_the_text_was_cut() -> None:
    # Words longer than the first guess of characters per token, of which a cut one would be unknown.
    words = {f"{'long' * 6}{index:04d}": index + 1 for index in range(3000)}
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    for tokens in (2, 50, 99, 1000, 2999, 3000):
        blocks = report_blocks(TextSource("a", [" ".join(words)]), fast, tokens=tokens, sequence_length=tokens)
        assert windows_of(blocks) == [tuple(range(1, tokens + 1))]


def test_report_takes_a_text_file_as_it_stands(calibration_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = " \n = Title = \n \n" + calibration_prose(1, 60) + "\n\n"
    path = tmp_path / "wiki.txt"
    path.write_text(text, encoding="utf-8")
    assert read_source(str(path)) == Documents("wiki", (text,), "")
    blocks = report_blocks(str(path), calibration_tokenizer, tokens=10**6, sequence_length=16)
    expected = calibration_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert blocks.tokens in (len(expected), len(expected) - 1)
    with pytest.raises(CalibrationError, match="predicting one takes 2"):
        report_blocks(TextSource("a", ["a"]), calibration_tokenizer, tokens=64, sequence_length=16)


def test_shares_say_how_much_of_a_source_is_read(calibration_tokenizer: PreTrainedTokenizerFast) -> None:
    sources = [TextSource(name, [calibration_prose(k, 9000)]) for k, name in enumerate("abc")]
    equal = calibration_blocks(sources, calibration_tokenizer, samples=24, sequence_length=32)
    drawn = calibration_blocks(sources, calibration_tokenizer, samples=24, sequence_length=32, shares=(15, 6.9, 0.1))
    assert torch.bincount(drawn.domain).tolist() == [16, 7, 1]
    for domain in range(3):
        own, other = (windows_of(b.select((b.domain == domain).nonzero().flatten())) for b in (drawn, equal))
        assert own[: len(other)] == other[: len(own)]  # a larger share goes on where a smaller one ends
    assert sorted(drawn.domain[:3].tolist()) == [0, 1, 2]
    for part in range(3, 25):  # such as the windows with gradients
        counts = torch.bincount(drawn.domain[:part], minlength=3)
        assert (counts - torch.tensor([16, 7, 1]) * part / 24).abs().max() < 1.5


@given(st.integers(1, 300), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_windows_by_shares_add_up(samples: int, shares: list[float]) -> None:
    samples += len(shares)
    counts = window_counts(samples, shares)
    assert sum(counts) == samples and min(counts) >= 1
    for own, share in zip(counts, shares, strict=True):
        assert own <= max(1, math.ceil(share / sum(shares) * samples))
    assert window_counts(samples, [1.0] * len(shares)) == [
        samples // len(shares) + (index < samples % len(shares)) for index in range(len(shares))
    ]


# -- windows that begin with BOS --------------------------------------------------------------------------------------

BEGUN, KNOWN = begun_tokenizer(), begun_tokenizer(adds=False)
BOS, EOS = BEGUN.bos_token_id, BEGUN.eos_token_id
# The second source is one document of one chunk, so its stream is known.
PROSE = (TextSource("a", [calibration_prose(k, 60) for k in range(30)]), TextSource("b", [calibration_prose(99, 3000)]))


def cut(ids: list[int], length: int, first: int | None = None) -> list[tuple[int, ...]]:
    """The reference: a stream in windows, each begun with `first` unless the stream has it there."""
    windows = []
    while ids:
        begin = () if first is None or ids[0] == first else (first,)
        taken = length - len(begin)
        windows.append((*begin, *ids[:taken]))
        ids = ids[taken:]
    return windows


def test_begin_token_is_what_the_tokenizer_does(calibration_tokenizer: PreTrainedTokenizerFast) -> None:
    assert begin_token(BEGUN) == BOS != begin_token(KNOWN)
    assert begin_token(KNOWN) is None
    # It puts its end of sequence before every text, and that is no BOS.
    assert calibration_tokenizer("rain")["input_ids"][0] == calibration_tokenizer.eos_token_id
    assert begin_token(calibration_tokenizer) is None


@pytest.mark.parametrize("length", [8, 33, 64])
def test_every_window_begins_with_bos_and_holds_the_same_text(length: int) -> None:
    options = {"samples": 9, "sequence_length": length, "seed": 3}
    begun, plain = (calibration_blocks(PROSE, tokenizer, **options) for tokenizer in (BEGUN, KNOWN))
    assert begun.input_ids.shape == plain.input_ids.shape and begun.attention_mask.all()
    assert begun.domains == plain.domains and torch.equal(begun.domain, plain.domain)
    assert begun.digest != plain.digest
    assert (begun.input_ids == BOS).sum(1).tolist() == [1] * 9 and (begun.input_ids[:, 0] == BOS).all()
    assert begun.facts()["begins_with"] == BOS and plain.facts()["begins_with"] is None
    for domain in range(2):
        own, other = (blocks.input_ids[blocks.domain == domain] for blocks in (begun, plain))
        stream = own[:, 1:].flatten()
        assert torch.equal(stream, other.flatten()[: len(stream)])
    more = calibration_blocks(PROSE, BEGUN, **{**options, "samples": 20})
    assert windows_of(more)[:9] == windows_of(begun)
    documents = Documents("b", PROSE[1].texts)
    packed = packed_blocks(documents, BEGUN, samples=4, sequence_length=length, seed=3)
    assert windows_of(packed) == windows_of(begun.select((begun.domain == 1).nonzero().flatten()))[:4]
    everything, whole = (packed_blocks(documents, own, sequence_length=length) for own in (BEGUN, KNOWN))
    tokens = len(KNOWN(documents.texts[0], add_special_tokens=False)["input_ids"]) + 1
    assert len(everything) == tokens // (length - 1) and len(whole) == tokens // length


def test_a_tokenizer_that_adds_no_bos_has_the_windows_it_had() -> None:
    """Bit for bit those of the plain cut, whether or not it knows a BOS."""
    documents = Documents("b", PROSE[1].texts)
    ids = KNOWN(documents.texts[0], add_special_tokens=False)["input_ids"]
    for length in (7, 16, 50):
        whole = [window for window in cut([*ids, EOS], length) if len(window) == length]
        assert windows_of(packed_blocks(documents, KNOWN, sequence_length=length)) == whole
        pool = calibration_blocks([documents], KNOWN, samples=5, sequence_length=length)
        assert windows_of(pool) == whole[:5]
        report = report_blocks(documents, KNOWN, tokens=101, sequence_length=length)
        assert windows_of(report) == [window for window in cut(ids[:101], length) if len(window) > 1]
        unknown = PreTrainedTokenizerFast(tokenizer_object=KNOWN.backend_tokenizer, eos_token="<eos>")
        assert report_blocks(documents, unknown, tokens=101, sequence_length=length).digest == report.digest


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 200), st.integers(2, 40))
def test_report_windows_with_bos_have_the_shapes_of_those_without(tokens: int, length: int) -> None:
    begun, plain = (report_blocks(PROSE[1], own, tokens=tokens, sequence_length=length) for own in (BEGUN, KNOWN))
    assert torch.equal(begun.attention_mask, plain.attention_mask) and begun.tokens == plain.tokens <= tokens
    text = [token for window in windows_of(begun) for token in window[1:]]
    assert all(window[0] == BOS for window in windows_of(begun))
    assert text == KNOWN(PROSE[1].texts[0], add_special_tokens=False)["input_ids"][: len(text)]


def test_bos_of_a_chat_template_is_not_doubled(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    rows = [[{"role": "user", "content": calibration_prose(seed, 24)}] for seed in range(40)]
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    tokenizer, plain = begun_tokenizer(), begun_tokenizer(adds=False)
    tokenizer.chat_template = plain.chat_template = "{{ bos_token }}" + TEMPLATE
    documents = read_source(str(path), tokenizer=tokenizer)
    assert all(text.startswith("<s><user>") for text in documents.texts)
    packed = packed_blocks(documents, plain, sequence_length=1500).input_ids[0].tolist()
    joined = plain("\n\n".join(documents.texts), add_special_tokens=False)["input_ids"]
    assert packed.count(BOS) > 20 < joined.count(BOS)
    for length in range(9, 120, 5):
        pool = packed_blocks(documents, tokenizer, sequence_length=length, samples=12)
        report = report_blocks(documents, tokenizer, tokens=12 * length, sequence_length=length)
        for blocks, stream in ((pool, packed), (report, joined)):
            windows = windows_of(blocks)
            assert windows == cut(stream, length, BOS)[:12]  # the conversations inside of it keep theirs
            assert all(window[0] == BOS != window[1] for window in windows)


def test_short_text_behind_bos(caplog: pytest.LogCaptureFixture) -> None:
    words = " ".join(calibration_prose(1, 12).split()[:9])
    ids = KNOWN(words, add_special_tokens=False)["input_ids"]
    assert 8 <= len(ids) < 63
    only = calibration_blocks([TextSource("a", [words])], BEGUN, samples=1, sequence_length=64)
    assert windows_of(only) == [(BOS, *ids)] and only.facts()["begins_with"] is None
    # The text and its end fill the window that BOS begins, so it is whole and the end stays.
    full = calibration_blocks([TextSource("a", [words])], BEGUN, samples=1, sequence_length=len(ids) + 2)
    assert windows_of(full) == [(BOS, *ids, EOS)]
    # One token is enough where BOS stands before it.
    one = TextSource("a", ["a"])
    with pytest.raises(CalibrationError, match="1 tokens, and predicting one takes 2"):
        report_blocks(one, KNOWN, tokens=64, sequence_length=16)
    with caplog.at_level(logging.WARNING):
        assert windows_of(report_blocks(one, BEGUN, tokens=64, sequence_length=16)) == [(BOS, *KNOWN("a")["input_ids"])]
    assert "has 2 tokens; 64 were asked for" in caplog.text
    with pytest.raises(CalibrationError, match=r"source 'a' is too short: 3 tokens, one window needs 16"):
        packed_blocks(Documents("a", ("a",)), BEGUN, sequence_length=16)
    with pytest.raises(CalibrationError, match=r"source 'a' is too short: 0 tokens, one window needs 16"):
        packed_blocks(Documents("a", (" ",)), BEGUN, sequence_length=16)
    for make in (calibration_blocks, report_blocks):
        sources, size = ([PROSE[1]], {"samples": 1}) if make is calibration_blocks else (PROSE[1], {"tokens": 4})
        with pytest.raises(CalibrationError, match=r"`sequence_length` should be at least 2\. Found 1"):
            make(sources, BEGUN, **size, sequence_length=1)
        with pytest.raises(CalibrationError, match=r"`sequence_length` should be at least 1\. Found 0"):
            make(sources, KNOWN, **size, sequence_length=0)


def test_a_bos_that_the_model_lacks_is_refused() -> None:
    tokenizer = begun_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<begin>"})
    rule = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = rule
    last = tokenizer.bos_token_id
    with pytest.raises(CalibrationError, match=f"the tokenizer made token {last}, the model knows {last} tokens"):
        report_blocks(PROSE[1], tokenizer, tokens=32, sequence_length=16, vocab_size=last)
