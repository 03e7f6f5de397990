"""The loss is the formula, whatever the chunks, the batches and the form of the teacher."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from texts import random_blocks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

from hf_adaprune import DistillationTrainer, distillation_loss
from hf_adaprune.distillation import Windows
from hf_adaprune.distillation_loss import (
    DistillationTerms,
    FullTeaching,
    TopTeaching,
    distill_hidden,
    distill_logits,
)
from hf_adaprune.errors import CheckpointError, ConfigError, UnsupportedModelError
from hf_adaprune.evaluation import per_window_top_kl, top_tokens
from hf_adaprune.plan import PruningPlan
from hf_adaprune.sites import find_sites
from hf_adaprune.surgery import apply_plan
from hf_adaprune.teacher_cache import CachedTeacher, cache_teacher

TERMS = [DistillationTerms(1.0, 1.0), DistillationTerms(2.0, 1.0), DistillationTerms(2.0, 0.3), DistillationTerms(1, 0)]


def plain(logits: torch.Tensor, dense: torch.Tensor, targets: torch.Tensor, terms: DistillationTerms) -> torch.Tensor:
    """The formula as it is written."""
    t = terms.temperature
    kl = torch.nn.functional.kl_div(
        (logits / t).log_softmax(-1), (dense / t).log_softmax(-1), reduction="sum", log_target=True
    )
    return terms.alpha * t**2 * kl + (1 - terms.alpha) * torch.nn.functional.cross_entropy(
        logits, targets, reduction="sum"
    )


def plain_top(logits: torch.Tensor, tokens: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Divergence over top tokens and the rest, as it is written."""
    q = logits.softmax(-1).gather(-1, tokens.long())
    p = log_p.exp()
    p_rest, q_rest = 1 - p.sum(-1), 1 - q.sum(-1)
    return (p * (log_p - q.log())).sum() + (p_rest * (p_rest / q_rest).log()).sum()


def sample(positions: int = 37, vocabulary: int = 50, hidden: int = 8) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    states, weight = (torch.randn(n, hidden, generator=draw) for n in (positions, vocabulary))
    bias, dense = torch.randn(vocabulary, generator=draw), torch.randn(positions, vocabulary, generator=draw) * 2
    targets = torch.randint(vocabulary, (positions,), generator=draw)
    return states.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), dense, targets


@pytest.mark.parametrize("terms", TERMS, ids=str)
@pytest.mark.parametrize("slices", [(1024, 2**19), (5, 120), (1, 1)], ids=str)
def test_fused_and_chunked_equal_the_formula(
    terms: DistillationTerms, slices: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation_loss, "SLICE_POSITIONS", slices[0])
    monkeypatch.setattr(distillation_loss, "CACHE_ELEMENTS", slices[1])
    states, weight, bias, dense, targets = sample()
    expected = plain(torch.nn.functional.linear(states, weight, bias), dense, targets, terms)
    wanted = torch.autograd.grad(expected * 0.7, (states, weight, bias))
    loss = distill_hidden(states, weight, bias, FullTeaching(dense), targets, terms)[0]
    found = torch.autograd.grad(loss * 0.7, (states, weight, bias))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    logits = torch.nn.functional.linear(states, weight, bias)
    loss = distill_logits(logits, FullTeaching(dense), targets, terms)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(loss * 0.7, (states, weight, bias)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_a_device_without_float64_is_not_asked_for_it(
    terms: DistillationTerms, top: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation_loss, "summing_dtype", lambda device: torch.float32)
    states, weight, bias, dense, targets = sample()
    chosen = dense.log_softmax(-1).topk(8)
    teaching = TopTeaching(chosen.indices, chosen.values) if top else FullTeaching(dense)

    class Narrow(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            for one in found if isinstance(found, (tuple, list)) else [found]:
                assert getattr(one, "dtype", None) != torch.float64, func
            return found

    with Narrow():
        losses = distill_hidden(states, weight, bias, teaching, targets, terms)
        losses[0].backward()
    monkeypatch.undo()
    for narrow, wide in zip(losses, distill_hidden(states, weight, bias, teaching, targets, terms), strict=True):
        torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=1e-5)


def test_top_tokens_equal_the_formula() -> None:
    states, weight, _, dense, targets = sample()
    log_p, tokens = dense.log_softmax(-1).topk(7)
    expected = plain_top(states @ weight.t(), tokens, log_p)
    wanted = torch.autograd.grad(expected, (states, weight))
    loss, divergence, _ = distill_hidden(states, weight, None, TopTeaching(tokens, log_p), targets, TERMS[0])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert divergence == loss
    for mine, theirs in zip(torch.autograd.grad(loss, (states, weight)), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_all_tokens_of_a_cache_are_the_whole_divergence() -> None:
    states, weight, _, dense, targets = sample()
    log_p, tokens = dense.log_softmax(-1).topk(50)
    for terms in (TERMS[0], DistillationTerms(1.0, 0.3)):
        found, wanted = (
            distill_hidden(states, weight, None, teaching, targets, terms)[0]
            for teaching in (TopTeaching(tokens, log_p), FullTeaching(dense))
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        mine, theirs = (torch.autograd.grad(value, states)[0] for value in (found, wanted))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_tokens_that_the_teacher_excludes_cost_nothing() -> None:
    states, weight, _, dense, targets = sample()
    dense[:, :10] = -torch.inf
    loss = distill_hidden(states, weight, None, FullTeaching(dense), targets, TERMS[0])[0]
    p = dense.softmax(-1)
    log_q = (states @ weight.t()).log_softmax(-1)
    expected = (p[:, 10:] * (p[:, 10:].log() - log_q[:, 10:])).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, (states, weight)))


def trainer_of(tmp_path: Path, teacher: Any, blocks: Any, **options: Any) -> DistillationTrainer:
    own = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1, "learning_rate": 1e-2}
    arguments = {name: options.pop(name, value) for name, value in own.items()}
    arguments["label_smoothing_factor"] = options.pop("label_smoothing_factor", 0.0)
    student = options.pop("student", None) or tiny_model(options.pop("family", "llama"), seed=1)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, remove_unused_columns=False, **arguments,
    )  # fmt: skip
    return DistillationTrainer(student, arguments, train_dataset=Windows(blocks), teacher=teacher, **options)


def batch_of(blocks: Any) -> dict[str, torch.Tensor]:
    rows = [Windows(blocks)[index] for index in range(len(blocks))]
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "gpt2", "opt", "mixtral"])
def test_the_trainers_loss_is_the_mean_over_tokens_that_are_no_padding(family: str, tmp_path: Path) -> None:
    """Head and loss in one give what the model's own logits give; gemma2 squashes its logits and is not fused."""
    blocks, dense = random_blocks(4, padding=(3, 0, 6)), tiny_model(family)
    found = {}
    for fused in (None, False):
        trainer = trainer_of(tmp_path, dense, blocks, temperature=2.0, alpha=0.4, fused=fused, family=family)
        batch = batch_of(blocks)
        found[fused] = trainer.compute_loss(trainer.model, dict(batch))
        split = trainer._splits.get(id(trainer._student))
        assert (split is not None) == (fused is None and family != "gemma2")
    student = tiny_model(family, seed=1)
    chosen = blocks.attention_mask[:, 1:]
    mask = blocks.attention_mask.long()
    logits, other = (
        m(input_ids=blocks.input_ids, attention_mask=mask).logits[:, :-1][chosen] for m in (student, dense)
    )
    expected = plain(logits, other, blocks.input_ids[:, 1:][chosen], DistillationTerms(2.0, 0.4)) / chosen.sum()
    for value in found.values():
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # read by peft
@pytest.mark.parametrize("hidden", [0.0, 1.0])
def test_a_teacher_with_adapters_teaches_what_it_says(hidden: float, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    own = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_model("llama"), own)
    blocks, losses = random_blocks(4), []
    for teacher in (adapted, adapted.merge_and_unload):
        dense = teacher() if teacher is not adapted else adapted
        trainer = trainer_of(tmp_path, dense, blocks, hidden_weight=hidden)
        losses.append(trainer.compute_loss(trainer.model, batch_of(blocks)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def trained(tmp_path: Path, teacher: Any, blocks: Any, **options: Any) -> dict[str, torch.Tensor]:
    trainer = trainer_of(tmp_path, teacher, blocks, **options)
    with warnings.catch_warnings():
        # What a Trainer says of the installation is not what is tested here.
        warnings.simplefilter("ignore", FutureWarning)
        trainer.train()
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def test_accumulated_batches_equal_one(tmp_path: Path) -> None:
    """Windows of different lengths, so that a mean of means would differ."""
    blocks, dense = random_blocks(8, padding=(3, 0, 6, 1, 9, 0, 0, 2)), tiny_model("llama")
    for options in ({"alpha": 0.5, "temperature": 2.0}, {"hidden_weight": 0.5}):
        once = trained(tmp_path, dense, blocks, **options)
        for batch, accumulated in ((2, 4), (1, 8)):
            own = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
            again = trained(tmp_path, dense, blocks, **own, **options)
            for name, value in once.items():
                torch.testing.assert_close(again[name], value, rtol=1e-5, atol=2e-6)
        before = tiny_model("llama", seed=1).state_dict()
        assert any(not torch.equal(before[name], value) for name, value in once.items())


def test_a_cached_teacher_of_all_tokens_trains_like_a_live_one(tmp_path: Path) -> None:
    blocks, dense = random_blocks(8, padding=(3, 0, 6)), tiny_model("llama")
    cached = cache_teacher(dense, blocks, tmp_path / "cache", VOCABULARY, temperature=2.0)
    options = {"temperature": 2.0, "max_steps": 3, "per_device_train_batch_size": 2}
    live = trained(tmp_path, dense, blocks, **options)
    found = trained(tmp_path, cached, blocks, **options)
    for name, value in live.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-4)  # the cache is in half precision


def test_a_teacher_on_disk_is_loaded_when_it_is_needed(tmp_path: Path) -> None:
    dense, blocks = tiny_model("llama"), random_blocks(4)
    dense.save_pretrained(tmp_path / "dense")
    expected = trained(tmp_path / "out", dense, blocks)
    found = trained(tmp_path / "out", str(tmp_path / "dense"), blocks)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "of nobody"}')
    for nothing in ("no/such/folder/anywhere", str(tmp_path / "other")):
        trainer = trainer_of(tmp_path / "out", nothing, blocks)
        with pytest.raises(UnsupportedModelError, match="could not be loaded"):
            trainer.compute_loss(trainer.model, batch_of(blocks))


def test_the_teacher_is_left_alone(tmp_path: Path) -> None:
    dense, blocks = tiny_model("llama"), random_blocks(4)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    trained(tmp_path, dense, blocks, max_steps=2)
    assert all(torch.equal(before[name], value) for name, value in dense.state_dict().items())
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_hidden_states_are_compared_layer_by_layer(tmp_path: Path) -> None:
    dense, blocks = tiny_model("llama"), random_blocks(4)
    values = []
    for layers in ({0: 0, 2: 2}, {0: 0, 1: 2}, None):
        for fused in (None, False):
            options = {"hidden_weight": 2.0, "hidden_layers": layers, "alpha": 0.0, "fused": fused}
            trainer = trainer_of(tmp_path, dense, blocks, **options)
            values.append(float(trainer.compute_loss(trainer.model, batch_of(blocks)).detach()))
    assert "tie_last_hidden_states" not in dense.config.to_dict()
    student, last = tiny_model("llama", seed=1), []
    dense.model.layers[2].register_forward_hook(lambda module, args, output: last.append(output))
    with torch.no_grad():
        mine, theirs = (
            m(blocks.input_ids, labels=blocks.input_ids, output_hidden_states=True) for m in (student, dense)
        )

    def distance(own: torch.Tensor, other: torch.Tensor) -> float:
        a, b = own[:, :-1], other[:, :-1]
        return float(((a - b).square().sum(-1) / b.square().sum(-1)).mean())

    loss, own, other = float(mine.loss), mine.hidden_states, theirs.hidden_states
    first, normed = distance(own[1], other[1]), distance(own[3], other[3])
    assert values[:2] == pytest.approx([loss + first + normed] * 2, rel=1e-5)
    assert values[2:4] == pytest.approx([loss + first + distance(own[2], last[0])] * 2, rel=1e-5)
    assert values[4:] == pytest.approx([loss + 2 * normed] * 2, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt", "gpt_neox"])
def test_a_student_without_its_last_layer_is_at_no_distance_from_its_teacher(family: str, tmp_path: Path) -> None:
    """All layers that are left are the dense model's own; its final norm stands between them no more."""
    dense, blocks = tiny_model(family), random_blocks(4)
    for fused in (None, False):
        student = tiny_model(family)
        apply_plan(find_sites(student), PruningPlan(student.config.model_type, 3, {}, (2,)))
        options = {"hidden_weight": 1.0, "hidden_layers": {0: 0, 1: 1}, "alpha": 0.0, "fused": fused}
        trainer = trainer_of(tmp_path, dense, blocks, student=student, **options)
        found = float(trainer.compute_loss(trainer.model, batch_of(blocks)).detach())
        with torch.no_grad():
            assert found == pytest.approx(float(student(blocks.input_ids, labels=blocks.input_ids).loss), rel=1e-5)


def test_a_teacher_of_unknown_code_says_what_it_cannot_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, blocks = tiny_model("llama"), random_blocks(4)
    monkeypatch.setattr(type(dense.model), "_can_record_outputs", None)
    options = {"hidden_weight": 1.0, "alpha": 0.0}
    trainer = trainer_of(tmp_path, dense, blocks, hidden_layers={1: 2}, **options)
    with pytest.raises(ConfigError, match="last hidden states normed only"):
        trainer.compute_loss(trainer.model, batch_of(blocks))


def test_a_cache_divergence_is_the_evaluations(tmp_path: Path) -> None:
    dense, blocks = tiny_model("llama"), random_blocks(4)
    cached = cache_teacher(dense, blocks, tmp_path / "cache", 16)
    trainer = trainer_of(tmp_path, cached, blocks)
    found = float(trainer.compute_loss(trainer.model, batch_of(blocks)).detach())
    sums = per_window_top_kl(tiny_model("llama", seed=1), top_tokens(dense, blocks, 16), blocks).sum(0)
    assert found == pytest.approx(float(sums[0] / sums[1]), rel=2e-3)


def test_a_cache_is_made_once_and_refused_when_stale(tmp_path: Path) -> None:
    dense, blocks = tiny_model("llama"), random_blocks(4)
    cache_teacher(dense, blocks, tmp_path / "cache", 8)
    made = (tmp_path / "cache" / "teacher.safetensors").stat().st_mtime_ns
    assert cache_teacher(dense, blocks, tmp_path / "cache", 8).facts["top_k"] == 8
    assert (tmp_path / "cache" / "teacher.safetensors").stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    with pytest.raises(CheckpointError, match="other text"):
        CachedTeacher(tmp_path / "cache", random_blocks(4, seed=1))
    for model, options in ((dense, {"top_k": 9}), (dense, {"temperature": 2.0}), (tiny_model("llama", 3), {})):
        with pytest.raises(CheckpointError, match="cached with another"):
            cache_teacher(model, blocks, tmp_path / "cache", **{"top_k": 8, **options})
    with pytest.raises(CheckpointError, match="holds no cached teacher"):
        CachedTeacher(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="asked for number 9"):
        CachedTeacher(tmp_path / "cache").read(torch.tensor([9]))


def test_an_interrupted_cache_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("hf_adaprune.teacher_cache.save_file", full)
    with pytest.raises(CheckpointError, match="the disk is full"):
        cache_teacher(tiny_model("llama"), random_blocks(2), tmp_path / "cache")
    assert not list(tmp_path.iterdir())


def test_a_cache_is_readable_by_others_and_needs_a_place(tmp_path: Path) -> None:
    dense, blocks = tiny_model("llama"), random_blocks(2)
    cache_teacher(dense, blocks, tmp_path / "new" / "cache", 4)
    assert (tmp_path / "new" / "cache").stat().st_mode & 0o777 == 0o755
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        cache_teacher(dense, blocks, tmp_path / "file" / "cache", 4)


@pytest.mark.parametrize("facts", ["[]", "{}", '{"sha256": "a", "windows": "2", "vocabulary": 96, "temperature": 1.0}'])
def test_facts_that_are_none_are_refused(tmp_path: Path, facts: str) -> None:
    dense, blocks = tiny_model("llama"), random_blocks(2)
    cache_teacher(dense, blocks, tmp_path / "cache", 4)
    (tmp_path / "cache" / "teacher.json").write_text(facts)
    with pytest.raises(CheckpointError, match="should say"):
        CachedTeacher(tmp_path / "cache", blocks)


def test_a_cache_answers_for_its_own_windows_alone(tmp_path: Path) -> None:
    own, other = random_blocks(4), random_blocks(4, seed=7)
    assert own.digest != other.digest
    cached = cache_teacher(tiny_model("llama"), own, tmp_path / "cache", 8)
    with pytest.raises(ConfigError, match="not those that the teacher was cached for"):
        trainer_of(tmp_path, cached, other)
    trainer = trainer_of(tmp_path, cached, own)
    assert trainer.evaluate(Windows(own))["eval_loss"] > 0
    assert trainer.evaluate(Windows(own.select(slice(0, 2))))["eval_loss"] > 0  # the first ones have their numbers
    with pytest.raises(ConfigError, match="not those that the teacher was cached for"):
        trainer.evaluate(Windows(own.select(slice(2, 4))))
    for data in (Windows(other), {"other": Windows(other)}):
        with pytest.raises(ConfigError, match="not those that the teacher was cached for"):
            trainer.evaluate(data)
    with pytest.raises(ConfigError, match="not those that the teacher was cached for"):
        trainer.predict(Windows(other))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    blocks, dense = random_blocks(4), tiny_model("llama")
    with pytest.raises(ConfigError, match="one vocabulary"):
        trainer_of(tmp_path, tiny_model("llama", vocab_size=80), blocks)
    for options, message in (
        ({"temperature": 0.0}, "temperature"),
        ({"alpha": 1.5}, "alpha"),
        ({"hidden_weight": -1.0}, "hidden_weight"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"hidden_weight": 1.0, "hidden_layers": {-1: -1}}, "layers of the student from 0 to 2. Found -1"),
        ({"hidden_weight": 1.0, "hidden_layers": {3: 2}}, "layers of the student from 0 to 2. Found 3"),
        ({"hidden_weight": 1.0, "hidden_layers": {2: 3}}, "layers of the teacher from 0 to 2. Found 3"),
        ({"hidden_weight": 1.0, "hidden_layers": {2: True}}, "layers of the teacher from 0 to 2. Found True"),
    ):
        with pytest.raises(ConfigError, match=message):
            trainer_of(tmp_path, dense, blocks, **options)
    cached = cache_teacher(dense, blocks, tmp_path / "cache", 8)
    with pytest.raises(ConfigError, match="at temperature 1"):
        trainer_of(tmp_path, cached, blocks, temperature=2.0)
    with pytest.raises(ConfigError, match="no hidden states"):
        trainer_of(tmp_path, cached, blocks, hidden_weight=1.0)
    trainer = trainer_of(tmp_path, cached, blocks)
    batch = batch_of(blocks)
    with pytest.raises(ConfigError, match="sample_index"):
        trainer.compute_loss(trainer.model, {key: batch[key] for key in ("input_ids", "labels")})
    with pytest.raises(ConfigError, match="as long as"):
        trainer.compute_loss(trainer.model, {k: v[:, :5] if v.dim() > 1 else v for k, v in batch.items()})
    with pytest.raises(ConfigError, match="labels"):
        trainer.compute_loss(trainer.model, {"input_ids": batch["input_ids"]})


def test_evaluation_gives_logits_and_the_same_loss(tmp_path: Path) -> None:
    blocks, dense = random_blocks(4), tiny_model("llama")
    trainer = trainer_of(tmp_path, dense, blocks)
    loss, outputs = trainer.compute_loss(trainer.model, batch_of(blocks), return_outputs=True)
    assert outputs.logits.shape[-1] == VOCABULARY
    metrics = trainer.evaluate(Windows(blocks))
    assert metrics["eval_loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
