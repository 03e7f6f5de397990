"""Laws of measurements."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model
from texts import begun_tokenizer, calibration_make_tokenizer, calibration_prose, random_blocks
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_adaprune import evaluation, harness
from hf_adaprune.calibration import report_blocks
from hf_adaprune.choices import ChoiceRow, _choice_scores, multiple_choice, per_row_errors, read_rows
from hf_adaprune.config import TextSource
from hf_adaprune.continuations import log_likelihoods
from hf_adaprune.errors import CalibrationError, ConfigError
from hf_adaprune.evaluation import (
    kl_divergence,
    mean_over_windows,
    per_window_kl,
    per_window_loss,
    per_window_top_kl,
    perplexity,
    top_tokens,
)
from hf_adaprune.throughput import throughput, throughputs
from hf_adaprune.token_blocks import TokenBlocks

VOCABULARY = 300


def evaluation_make_model(seed: int, **changes: int) -> LlamaForCausalLM:
    """A tiny Llama whose weights are large enough for predictions to differ."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 640, "initializer_range": 0.3,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


@pytest.fixture(scope="module")
def evaluation_model() -> LlamaForCausalLM:
    """The pruned model's part."""
    return evaluation_make_model(0)


@pytest.fixture(scope="module")
def evaluation_dense() -> LlamaForCausalLM:
    """The dense model's part."""
    return evaluation_make_model(1)


@pytest.fixture(scope="module")
def evaluation_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with multi-letter tokens, trained in memory."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(["the water in a river runs down to the sea and the rain fills it again"] * 3, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<eos> $A <eos>", special_tokens=[("<eos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


def make_blocks(lengths: list[int], length: int, pad: int = 0) -> TokenBlocks:
    """Random windows of the given unpadded lengths."""
    ids = torch.randint(VOCABULARY, (len(lengths), length), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    return TokenBlocks(ids.masked_fill(~mask, pad), mask, torch.zeros(len(lengths)), ("a",))


def naive_losses(model: LlamaForCausalLM, blocks: TokenBlocks) -> torch.Tensor:
    """Each window alone, unpadded, in one piece."""
    rows = []
    for ids, mask in zip(blocks.input_ids, blocks.attention_mask, strict=True):
        with torch.no_grad():
            logprobs = model.eval()(ids[mask][None]).logits[0, :-1].float().log_softmax(-1)
        rows.append([-logprobs.gather(1, ids[mask][1:, None]).double().sum().item(), int(mask.sum()) - 1])
    return torch.tensor(rows, dtype=torch.float64)


def test_loss_equals_the_naive_computation_over_chunks(evaluation_model: LlamaForCausalLM) -> None:
    blocks = make_blocks([600, 513, 2, 1, 257], 600)
    sums = per_window_loss(evaluation_model, blocks)
    assert sums.dtype == torch.float64 and sums.shape == (5, 2) and not sums.is_inference()
    torch.testing.assert_close(sums, naive_losses(evaluation_model, blocks), rtol=1e-5, atol=1e-5)
    assert sums[3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_batch_size_does_not_matter(
    evaluation_model: LlamaForCausalLM, evaluation_dense: LlamaForCausalLM, batch_size: int
) -> None:
    blocks = make_blocks([20, 7, 20, 3, 12], 20)
    for measure in (per_window_loss, lambda m, b, size=1: per_window_kl(m, evaluation_dense, b, size)):
        one, many = measure(evaluation_model, blocks), measure(evaluation_model, blocks, batch_size)
        torch.testing.assert_close(one, many, rtol=1e-5, atol=1e-5)


def test_padding_is_excluded_exactly(evaluation_model: LlamaForCausalLM, evaluation_dense: LlamaForCausalLM) -> None:
    lengths = [11, 5, 9]
    zeros, garbage = make_blocks(lengths, 16), make_blocks(lengths, 16, pad=17)
    tight = TokenBlocks(zeros.input_ids[:, :11], zeros.attention_mask[:, :11], zeros.domain, ("a",))
    for measure in (per_window_loss, lambda m, b: per_window_kl(m, evaluation_dense, b)):
        assert torch.equal(measure(evaluation_model, zeros), measure(evaluation_model, garbage))
        assert torch.equal(measure(evaluation_model, zeros), measure(evaluation_model, tight))
    batched = per_window_loss(evaluation_model, garbage, 3)
    assert torch.equal(batched, per_window_loss(evaluation_model, zeros, 3))


def test_loss_is_float32_for_a_bfloat16_model(evaluation_model: LlamaForCausalLM) -> None:
    half = copy.deepcopy(evaluation_model).to(torch.bfloat16)
    blocks = make_blocks([40, 40], 40)
    torch.testing.assert_close(per_window_loss(half, blocks), naive_losses(half, blocks), rtol=1e-6, atol=1e-6)


class WidestFloat32(TorchDispatchMode):
    """The most positions that any float32 tensor over the vocabulary had."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor) and output.dtype == torch.float32 and output.shape[-1:] == (VOCABULARY,):
            self.positions = max(self.positions, output.numel() // VOCABULARY)
        return output


def test_no_large_float32_copy(evaluation_model: LlamaForCausalLM, evaluation_dense: LlamaForCausalLM) -> None:
    """Logits stay in the model's dtype; float32 exists for a chunk of them."""
    model, dense = (copy.deepcopy(own).to(torch.bfloat16) for own in (evaluation_model, evaluation_dense))
    blocks = make_blocks([600, 300], 600)
    known = top_tokens(dense, blocks, 8)
    measures = {
        64: lambda: per_window_loss(model, blocks, 2),
        256: lambda: per_window_kl(model, dense, blocks, 2),
    }
    for positions, measure in measures.items():
        with WidestFloat32() as watched:
            measure()
        assert watched.positions == positions
    for measure in (lambda: top_tokens(dense, blocks, 8, 2), lambda: per_window_top_kl(model, known, blocks, 2)):
        with WidestFloat32() as watched:
            measure()
        assert 0 < watched.positions <= 256


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalizers_equal_logsumexp(dtype: torch.dtype) -> None:
    logits = 30 * torch.randn(131, 50, generator=torch.Generator().manual_seed(0))
    logits[7, 3:] = -math.inf
    logits[8, 0] = -math.inf
    logits[9] = 1e4
    logits[10] -= 1e4
    logits = logits.to(dtype)
    before = logits.clone()
    torch.testing.assert_close(evaluation._log_normalizers(logits), logits.float().logsumexp(-1), rtol=1e-6, atol=1e-5)
    assert torch.equal(logits, before)


def test_perplexity_and_its_standard_error(evaluation_model: LlamaForCausalLM) -> None:
    blocks = make_blocks([30, 12, 25, 18], 30)
    sums = naive_losses(evaluation_model, blocks)
    measured = perplexity(evaluation_model, blocks)
    assert measured.value == pytest.approx(math.exp(sums[:, 0].sum() / sums[:, 1].sum()), rel=1e-5)
    assert (measured.tokens, measured.samples) == (81, 4)
    loss = mean_over_windows("loss", sums)
    assert measured.standard_error == pytest.approx(measured.value * loss.standard_error, rel=1e-4)
    assert str(measured).startswith("perplexity ")
    assert math.isnan(perplexity(evaluation_model, blocks.select([0])).standard_error)
    with pytest.raises(CalibrationError, match="no token was scored"):
        perplexity(evaluation_model, make_blocks([1], 4))
    with pytest.raises(ConfigError, match="`batch_size`"):
        perplexity(evaluation_model, blocks, batch_size=0)


def test_standard_error_is_the_spread_of_repeated_measurements() -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(5, 50, (400, 40), generator=generator).double()
    sums = 3.0 * counts + torch.randn(counts.shape, generator=generator).double() * counts
    runs = [mean_over_windows("x", torch.stack([s, n], dim=1)) for s, n in zip(sums, counts, strict=True)]
    spread = torch.tensor([run.value for run in runs]).std().item()
    assert sum(run.standard_error for run in runs) / len(runs) == pytest.approx(spread, rel=0.1)
    equal = torch.full((10, 1), 7.0, dtype=torch.float64)
    plain = mean_over_windows("x", torch.cat([sums[0, :10, None], equal], dim=1))
    assert plain.standard_error == pytest.approx((sums[0, :10] / 7).std().item() / math.sqrt(10))


def test_kl_is_zero_with_itself_and_positive_otherwise(
    evaluation_model: LlamaForCausalLM, evaluation_dense: LlamaForCausalLM
) -> None:
    blocks = make_blocks([300, 8], 300)
    assert not per_window_kl(evaluation_model, evaluation_model, blocks, 2)[:, 0].any()
    other = per_window_kl(evaluation_model, evaluation_dense, blocks)
    assert (other[:, 0] > 0).all()
    assert torch.equal(other[:, 1], per_window_loss(evaluation_model, blocks)[:, 1])
    with torch.no_grad():
        logits = torch.stack([evaluation_dense(ids[None]).logits[0] for ids in blocks.input_ids])
        model = torch.stack([evaluation_model(ids[None]).logits[0] for ids in blocks.input_ids])
    torch.testing.assert_close(per_window_kl(evaluation_model, logits, blocks), other, rtol=1e-5, atol=1e-5)
    naive = torch.nn.functional.kl_div(
        model.log_softmax(-1), logits.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    expected = naive[0, :299].sum() + naive[1, :7].sum()
    assert kl_divergence(evaluation_model, evaluation_dense, blocks).value == pytest.approx(
        expected.item() / 306, rel=1e-4
    )
    with pytest.raises(ConfigError, match="one vocabulary"):
        kl_divergence(evaluation_model, logits[..., :-1], blocks)


def test_a_token_that_the_dense_model_excludes_adds_nothing(evaluation_model: LlamaForCausalLM) -> None:
    blocks = make_blocks([6], 6)
    with torch.no_grad():
        logits = evaluation_model(blocks.input_ids).logits
    logits[..., 3] = -math.inf
    assert 0 < kl_divergence(evaluation_model, logits, blocks).value < math.inf


def test_top_tokens_give_a_lower_bound_that_rises_to_the_divergence(
    evaluation_model: LlamaForCausalLM, evaluation_dense: LlamaForCausalLM
) -> None:
    blocks = make_blocks([300, 8, 2, 1, 40], 300)
    whole = per_window_kl(evaluation_model, evaluation_dense, blocks)
    found = []
    for k in (1, 4, 32, 128, VOCABULARY, 2 * VOCABULARY):
        known = top_tokens(evaluation_dense, blocks, k)
        assert len(known) == 5 and known.tokens.shape == (5, 299, min(k, VOCABULARY))
        found.append(per_window_top_kl(evaluation_model, known, blocks))
        assert torch.equal(found[-1][:, 1], whole[:, 1])
    sums = torch.stack(found)[..., 0]
    assert (sums.diff(dim=0) >= -1e-4).all() and (sums <= whole[:, 0] + 1e-4).all()
    assert (sums[0, :3] < 0.9 * whole[:3, 0]).all() and (sums[:, :3] > 0).all()
    torch.testing.assert_close(sums[-2], whole[:, 0], rtol=1e-4, atol=1e-4)
    assert torch.equal(sums[-1], sums[-2])
    assert sums[:, 3].tolist() == [0.0] * 6


def test_top_tokens_of_the_same_model_diverge_by_nothing(evaluation_model: LlamaForCausalLM) -> None:
    blocks = make_blocks([40, 13], 40)
    for k in (1, 16, VOCABULARY):
        sums = per_window_top_kl(evaluation_model, top_tokens(evaluation_model, blocks, k), blocks)
        assert (sums[:, 0].abs() < 1e-6 * sums[:, 1]).all()


def test_top_tokens_do_not_depend_on_batches_and_padding(
    evaluation_model: LlamaForCausalLM, evaluation_dense: LlamaForCausalLM
) -> None:
    lengths = [20, 7, 3, 12]
    zeros, garbage = make_blocks(lengths, 20), make_blocks(lengths, 20, pad=17)
    one = per_window_top_kl(evaluation_model, top_tokens(evaluation_dense, zeros, 9), zeros)
    for size in (2, 4):
        known = top_tokens(evaluation_dense, garbage, 9, size)
        other = per_window_top_kl(evaluation_model, known, garbage, size)
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    short = zeros.select([2, 1])  # a batch in which all windows are padded
    known = top_tokens(evaluation_dense, short, 9, 2)
    torch.testing.assert_close(per_window_top_kl(evaluation_model, known, short, 2), one[[2, 1]], rtol=1e-4, atol=1e-4)


def test_training_flags_come_back(evaluation_model: LlamaForCausalLM, evaluation_dense: LlamaForCausalLM) -> None:
    blocks = make_blocks([6], 6)
    evaluation_model.train()
    evaluation_model.lm_head.eval()
    evaluation_dense.train()
    perplexity(evaluation_model, blocks)
    kl_divergence(evaluation_model, evaluation_dense, blocks)
    kl_divergence(evaluation_model, evaluation_model, blocks)
    throughput(evaluation_model, prefill=2, new_tokens=1, repeats=1)
    assert evaluation_model.training and not evaluation_model.lm_head.training and evaluation_dense.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in evaluation_model.parameters())


ROWS = [
    ChoiceRow("0", "t", "the water in", (" a river ", "the sea", "rain"), 1),
    ChoiceRow("1", "t", "rain fills  ", ("it", "again", "sea", "down", "a"), 0),
    ChoiceRow("2", "t", "Question: what runs?\nAnswer:", ("the water", "the river runs down to the sea", "x"), 2),
    ChoiceRow("3", "t", "", ("the sea", "the rain again"), 0),
    ChoiceRow("4", "t", "the rain " * 12, ("a b c d e f g h", "again"), 1),
]


def brute_force(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, row: ChoiceRow) -> list[float]:
    """Log-likelihoods as lm-evaluation-harness defines them, one choice at a time and without any batching."""
    scores = []
    for choice in row.choices:
        context, continuation = row.context, " " + choice
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        # What the tokenizer adds to a text of its own accord belongs to it, unless there is no context.
        whole = tokenizer.encode(context + continuation, add_special_tokens=bool(context))
        before = tokenizer.encode(context) if context else []
        target = whole[len(before) :]
        tokens = [*(before or [tokenizer.eos_token_id]), *target]
        ids = torch.tensor([tokens[-(model.config.max_position_embeddings + 1) :]])
        with torch.no_grad():
            logprobs = model.eval()(ids[:, :-1]).logits[0].float().log_softmax(-1)[-len(target) :]
        scores.append(logprobs.gather(1, torch.tensor(target)[:, None]).sum().item())
    return scores


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("positions", [640, 40])
def test_multiple_choice_equals_brute_force(
    evaluation_tokenizer: PreTrainedTokenizerFast, batch_size: int, positions: int
) -> None:
    model = evaluation_make_model(3, max_position_embeddings=positions)
    scores = [brute_force(model, evaluation_tokenizer, row) for row in ROWS]
    normed = [
        [s / len(c) for s, c in zip(values, row.choices, strict=True)] for values, row in zip(scores, ROWS, strict=True)
    ]
    for wanted in range(3):
        rows = [ChoiceRow(r.id, r.task, r.context, r.choices, min(wanted, len(r.choices) - 1)) for r in ROWS]
        found = multiple_choice(model, evaluation_tokenizer, rows, batch_size)
        for key, values in (("acc", scores), ("acc_norm", normed)):
            right = [v.index(max(v)) == row.label for v, row in zip(values, rows, strict=True)]
            assert found[key].value == pytest.approx(sum(right) / 5)
            assert found[key].standard_error == pytest.approx(torch.tensor(right).double().std().item() / math.sqrt(5))
            assert found[key].samples == 5


# What the tokenizers of SmolLM2, of Llama, Mistral, Gemma and OPT, and of few others add to a text.
ADDED = {"nothing": "$A", "bos": "<s> $A", "bos and eos": "<s> $A </s>"}
HARNESS_ROWS = [
    *((row.context, row.choices) for row in ROWS),
    ("<s>the river", ("runs down", "fills <s> the sea", "it")),
    ("<s>", ("the water", "rain")),
    ("</s> rain", ("again", "the sea")),
    ("", ("<s>the rain", "the <s> sea")),
]


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None and not os.environ.get("CI"), reason="lm-eval is not installed"
)
@pytest.mark.filterwarnings("ignore")  # the harness' own dependencies warn when they are imported
@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("added", ADDED)
def test_scores_are_the_harness_own(
    added: str, bos: str | None, monkeypatch: pytest.MonkeyPatch, evaluation_tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    text = Tokenizer.from_str(evaluation_tokenizer.backend_tokenizer.to_str())
    text.add_special_tokens([AddedToken("<s>", lstrip=True, special=True), "</s>"])
    marks = [(mark, text.token_to_id(mark)) for mark in ("<s>", "</s>")]
    text.post_processor = processors.TemplateProcessing(single=ADDED[added], special_tokens=marks)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, eos_token="</s>", bos_token=bos)
    assert len(tokenizer("rain")["input_ids"]) == len(tokenizer("rain", add_special_tokens=False)["input_ids"]) + (
        ADDED[added].count("s>")
    )
    model = evaluation_make_model(3, vocab_size=len(tokenizer))
    rows = [ChoiceRow(str(i), "t", context, choices, 0) for i, (context, choices) in enumerate(HARNESS_ROWS)]
    asked = [
        Instance("loglikelihood", {}, (row.context, " " + choice), index)
        for index, row in enumerate(rows) for choice in row.choices
    ]  # fmt: skip
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu").loglikelihood(asked, True)
    ours, _ = _choice_scores(model, tokenizer, rows, 16)
    assert [score for own in ours for score in own] == pytest.approx([score for score, _ in theirs], rel=1e-5, abs=1e-4)


def test_text_is_scored_given_bos_where_the_tokenizer_adds_it() -> None:
    """As the harness' rolling log-likelihood does: every token of the text counts once, BOS never."""
    tokenizer = begun_tokenizer()
    model = evaluation_make_model(3, vocab_size=len(tokenizer))
    source = TextSource("a", [calibration_prose(1, 300)])
    blocks = report_blocks(source, tokenizer, tokens=200, sequence_length=32)
    ids = tokenizer(source.texts[0], add_special_tokens=False)["input_ids"]
    parts = [ids[start : start + 31] for start in range(0, 6 * 31, 31)] + [ids[6 * 31 : 6 * 31 + 7]]
    scores, count = log_likelihoods(model, [([tokenizer.bos_token_id], part) for part in parts])
    sums = per_window_loss(model, blocks, batch_size=3)
    assert sums[:, 1].tolist() == [31.0] * 6 + [7.0]
    assert sums[:, 0].tolist() == pytest.approx([-score for score in scores], rel=1e-5)
    measured = perplexity(model, blocks)
    assert measured.tokens == count == 200 - 7
    assert measured.value == pytest.approx(math.exp(-sum(scores) / count), rel=1e-5)


def test_errors_by_row_are_those_of_acc_norm(
    evaluation_model: LlamaForCausalLM, evaluation_tokenizer: PreTrainedTokenizerFast
) -> None:
    seen = set()
    for wanted in range(3):
        rows = [ChoiceRow(r.id, r.task, r.context, r.choices, min(wanted, len(r.choices) - 1)) for r in ROWS]
        errors = per_row_errors(evaluation_model, evaluation_tokenizer, rows)
        measured = multiple_choice(evaluation_model, evaluation_tokenizer, rows)["acc_norm"]
        assert 1 - sum(errors) / len(rows) == pytest.approx(measured.value)
        alone = [per_row_errors(evaluation_model, evaluation_tokenizer, [row], 1)[0] for row in rows]
        assert errors == alone
        seen.update(errors)
    assert seen == {0.0, 1.0}


def test_every_choice_is_found_when_it_is_the_likely_one(
    evaluation_model: LlamaForCausalLM, evaluation_tokenizer: PreTrainedTokenizerFast
) -> None:
    best = [
        max(range(len(r.choices)), key=brute_force(evaluation_model, evaluation_tokenizer, r).__getitem__) for r in ROWS
    ]
    rows = [ChoiceRow(r.id, r.task, r.context, r.choices, label) for r, label in zip(ROWS, best, strict=True)]
    assert multiple_choice(evaluation_model, evaluation_tokenizer, rows)["acc"].value == 1.0
    with pytest.raises(CalibrationError, match="no multiple-choice rows"):
        multiple_choice(evaluation_model, evaluation_tokenizer, [])


def test_continuations_of_one_token_share_a_forward(
    evaluation_model: LlamaForCausalLM, evaluation_tokenizer: PreTrainedTokenizerFast
) -> None:
    sequences = 0

    def counting(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal sequences
        sequences += len(args[0])

    row = ChoiceRow("0", "t", "rain", ("the", "river", "water"), 0)
    lengths = [len(evaluation_tokenizer(" " + c, add_special_tokens=False)["input_ids"]) for c in row.choices]
    handle = evaluation_model.get_input_embeddings().register_forward_pre_hook(counting)
    multiple_choice(evaluation_model, evaluation_tokenizer, [row, row])
    handle.remove()
    assert sequences == (1 if 1 in lengths else 0) + sum(length > 1 for length in lengths)


GOOD = {"id": "1", "task": "t", "context": "c", "choices": ["a", "b"], "label": 1}


def test_rows_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n", encoding="utf-8")
    assert read_rows(path) == read_rows(str(path)) == [ChoiceRow("1", "t", "c", ("a", "b"), 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({k: v for k, v in GOOD.items() if k not in ("label", "id")}), "row 1 lacks id, label"),
        ("[1]", "row 1 lacks"),
        (json.dumps({**GOOD, "choices": ["a"]}), "two or more"),
        (json.dumps({**GOOD, "choices": ["a", ""]}), "two or more"),
        (json.dumps({**GOOD, "context": None}), "`context` should be a string"),
        (json.dumps({**GOOD, "label": 2}), "should be 0 to 1. Found 2"),
        (json.dumps({**GOOD, "label": "1"}), "Found '1'"),
        (json.dumps(GOOD) + "\n{", "line 2"),
        ("", "holds no rows"),
    ],
)
def test_bad_rows_are_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CalibrationError, match=message):
        read_rows(path)
    with pytest.raises(CalibrationError, match="no file of multiple-choice rows"):
        read_rows(tmp_path / "none.jsonl")


def test_throughput_decodes_every_token_past_an_end_token() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    for model in (evaluation_make_model(0, eos_token_id=5), gpt2):
        model.generation_config.eos_token_id = list(range(VOCABULARY))
        calls: list[tuple[int, int]] = []
        hook = model.register_forward_hook(
            lambda _, args, kwargs, out, calls=calls: calls.append(
                (kwargs["input_ids"].shape[1], out.past_key_values.get_seq_length())
            ),
            with_kwargs=True,
        )
        speeds = throughput(model, prefill=8, new_tokens=3, repeats=2)
        hook.remove()
        assert calls == [(8, 8), (1, 9), (1, 10), (1, 11)] * 3
        assert set(speeds) == {"prefill_tokens_per_second", "decode_tokens_per_second"}
        assert all(0 < value < math.inf for value in speeds.values())
    with pytest.raises(ConfigError, match="32 positions"):
        throughput(gpt2, prefill=32, new_tokens=1)
    with pytest.raises(ConfigError, match="at least 1"):
        throughput(gpt2, repeats=0)


def test_several_models_are_timed_in_turns() -> None:
    models = [evaluation_make_model(0), evaluation_make_model(1)]
    calls: list[int] = []
    for number, model in enumerate(models):
        model.register_forward_hook(lambda *_, number=number: calls.append(number))
    speeds = throughputs(models, prefill=4, new_tokens=1, repeats=2)
    assert calls == [0, 0, 1, 1] * 3  # a prefill and a token of one, then of the other
    assert len(speeds) == 2


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_windows_longer_than_learned_positions_are_refused_before_any_forward(family: str) -> None:
    model, rotary = tiny_model(family), tiny_model("llama")
    blocks = random_blocks(length=129)
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for measure in (
        lambda: perplexity(model, blocks),
        lambda: kl_divergence(model, rotary, blocks),
        lambda: kl_divergence(rotary, model, blocks),
        lambda: top_tokens(model, blocks),
    ):
        with pytest.raises(CalibrationError, match=rf"up to 129 tokens.* {family} model has learned 128 positions"):
            measure()
    handle.remove()
    assert perplexity(rotary, blocks).value > 0
    # What is padding in every window needs no position.
    assert perplexity(model, random_blocks(length=129, padding=(1, 1, 1, 1))).value > 0


def test_tasks_leave_model_and_tokenizer_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrapped(pretrained: Any, tokenizer: Any) -> Any:  # what the harness does to both
        tokenizer.pad_token = "</s>"
        return pretrained.eval()

    def answered(model: Any, tasks: list[str]) -> dict[str, Any]:
        assert not model.training
        return {"results": {tasks[0]: {"acc,none": 0.5}}}

    models = SimpleNamespace(huggingface=SimpleNamespace(HFLM=wrapped))
    monkeypatch.setattr(harness, "load_harness", lambda: SimpleNamespace(models=models, simple_evaluate=answered))
    model, tokenizer = tiny_model("llama").train(), calibration_make_tokenizer()
    before = tokenizer.pad_token
    assert harness.run_tasks(model, tokenizer, ["piqa"])["piqa"]["acc"].value == 0.5
    assert all(module.training for module in model.modules()) and tokenizer.pad_token == before != "</s>"
