"""GGUF files: what is in them, and that llama.cpp computes from them what transformers computes from the checkpoint."""

from __future__ import annotations

import builtins
import json
import logging
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import tiny_model, tokens
from llama_cpp import ask, job
from peft import LoraConfig, get_peft_model
from plans import keep_nothing, plan_of_kind, random_repairs
from texts import calibration_prose
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_adaprune import apply_plan, find_sites
from hf_adaprune.cli import main
from hf_adaprune.errors import CheckpointError, ConfigError, MissingDependencyError, UnsupportedModelError
from hf_adaprune.export import export_gguf
from hf_adaprune.export import gguf as writing
from hf_adaprune.export.gguf_layout import FAMILIES, layout_of, llama3_factors
from hf_adaprune.export.gguf_tokenizer import PRE_TOKENIZERS, read_vocabulary
from hf_adaprune.plan import PruningPlan

ROWS = 440
SPECIAL = ["<s>", "</s>", "<unk>", "<|user|>"]
WIDE = {"channel", "kv_group"}
GONE = ("layers.0.attention", "layers.1.attention", "layers.2.attention")
NO_MLP = ("layers.0.mlp", "layers.1.mlp", "layers.2.mlp")


def train_tokenizer(
    model: Any, before: Any, normalizer: Any = None, more: Iterable[str] = (), size: int = 420, **special: str
) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer of some kind, trained in memory."""
    made = Tokenizer(model)
    bytes_first = not more
    if before is not None:
        made.pre_tokenizer = before
    if normalizer is not None:
        made.normalizer = normalizer
    joined = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.decoder = decoders.ByteLevel() if bytes_first else joined
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*SPECIAL, *more], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()) if bytes_first else [],
    )  # fmt: skip
    made.train_from_iterator(
        [calibration_prose(0, 2000), "don't we'll I'M 4567 89,5 == (a) \n\n  x\ty naïve 日本語" * 9], trainer
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def byte_level(**options: Any) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def adding(*tokens: AddedToken) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(models.BPE(), byte_level())
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(use_regex=False)])


def make_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """One of every kind that is written."""
    made = {
        "gpt-2": train_tokenizer(models.BPE(), byte_level()),
        "smollm": train_tokenizer(
            models.BPE(), pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])
        ),
    }
    for (splits, whole), name in PRE_TOKENIZERS.items():
        if name not in made:
            made[name] = train_tokenizer(models.BPE(ignore_merges=whole), split_by(splits[0]))
    bytes_last = [f"<0x{number:02X}>" for number in range(256)]
    marks = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fallback = models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    made["sentencepiece"] = train_tokenizer(fallback, None, marks, bytes_last, 700)
    return made


TOKENIZER = train_tokenizer(models.BPE(), byte_level(), pad_token="</s>")


def cut(
    family: str, kinds: Iterable[str] = (), gone: Iterable[str] = (), uniform: bool = False, repair: bool = False,
    **changes: object,
) -> PreTrainedModel:  # fmt: skip
    """A tiny model without some units, and without the sublayers that are named."""
    model = tiny_model(family, vocab_size=ROWS, **changes)
    sites = find_sites(model)
    chosen, dropped = {}, ()
    for kind in kinds:
        plan = plan_of_kind(sites, kind, uniform=uniform)
        assert plan is not None
        chosen.update(plan.sites)
        dropped = plan.dropped_layers or dropped
    chosen.update({name: keep_nothing(sites.by_name[name]) for name in gone})
    plan = PruningPlan(family, len(sites.layers), chosen, dropped)
    apply_plan(sites, plan, random_repairs(sites, plan) if repair else None)
    return model


def rope(kind: str, **values: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
# Name, architecture in the file, how the model is made.
CASES: dict[str, tuple[str, Callable[[], PreTrainedModel]]] = {
    "llama": ("llama", lambda: cut("llama")),
    "llama untied": ("llama", lambda: cut("llama", tie_word_embeddings=False)),
    "llama biases": ("llama", lambda: cut("llama", attention_bias=True, mlp_bias=True)),
    "llama linear": ("llama", lambda: cut("llama", **rope("linear", factor=2.0))),
    "llama llama3": ("llama", lambda: cut("llama", **rope("llama3", **LLAMA3))),
    "llama uniform repaired": ("llama", lambda: cut("llama", WIDE, uniform=True, repair=True)),
    "llama llama3 adaptive": ("deci", lambda: cut("llama", WIDE, **rope("llama3", **LLAMA3))),
    "llama biases adaptive": ("deci", lambda: cut("llama", WIDE, attention_bias=True, mlp_bias=True)),
    # Qwen 2's architecture wants heads as wide as the hidden state: 4 x 8, where the tiny model has 4 x 12.
    "qwen2 square": ("qwen2", lambda: cut("qwen2", {"channel"}, uniform=True, head_dim=8)),
    "qwen2 square adaptive": ("deci", lambda: cut("qwen2", {"channel"}, head_dim=8)),
    "qwen2": ("deci", lambda: cut("qwen2")),
    "qwen2 uniform": ("deci", lambda: cut("qwen2", WIDE, uniform=True)),
    "qwen3": ("qwen3", lambda: cut("qwen3")),
    "qwen3 uniform": ("qwen3", lambda: cut("qwen3", WIDE, uniform=True)),
    "qwen3 layer": ("qwen3", lambda: cut("qwen3", {"layer"})),
    "mistral": ("llama", lambda: cut("mistral")),
    "mistral uniform": ("llama", lambda: cut("mistral", WIDE, uniform=True)),
}


def adaptive(family: str) -> None:
    for name, options in {
        "uniform": {"kinds": WIDE, "uniform": True} if family == "llama" else None,
        "channels": {"kinds": {"channel"}},
        "groups": {"kinds": {"kv_group"}},
        "query heads": {"kinds": {"query_head"}},
        "repaired": {"kinds": WIDE, "repair": True},
        "first attention gone": {"kinds": {"channel"}, "gone": GONE[:1]},
        "last attention gone": {"kinds": {"channel"}, "gone": GONE[2:]},
        "all attention gone": {"kinds": {"channel"}, "gone": GONE},
        "first MLP gone": {"kinds": {"kv_group"}, "gone": NO_MLP[:1]},
        "last MLP gone": {"kinds": {"kv_group"}, "gone": NO_MLP[2:]},
        "all MLPs gone": {"kinds": {"kv_group"}, "gone": NO_MLP},
        "first layer empty": {"kinds": {"channel"}, "gone": (GONE[0], NO_MLP[0])},
        "last layer empty": {"kinds": {"channel"}, "gone": (GONE[2], NO_MLP[2])},
        "middle layer dropped": {"kinds": {"channel", "layer"}},
    }.items():
        if options is not None:
            arch = "llama" if name == "uniform" else "deci"
            CASES[f"{family} {name}"] = (arch, lambda made=options: cut(family, **made))


for _family in ("llama", "mistral", "qwen2"):
    adaptive(_family)
PROMPTS = [tokens(1, 5, seed=1)[0].tolist(), [7], tokens(1, 40, seed=2)[0].tolist()]


@torch.no_grad()
def log_probabilities(model: PreTrainedModel) -> list[torch.Tensor]:
    return [model(torch.tensor([ids]), use_cache=False).logits[0, -1].float().log_softmax(-1) for ids in PROMPTS]


def difference(answers: list[dict[str, Any]], expected: list[torch.Tensor]) -> float:
    """The largest of all tokens and prompts; not a number where llama.cpp left one out."""
    return float(torch.stack([a["logprobs"] - e for a, e in zip(answers, expected, strict=True)]).abs().max())


def written(model: PreTrainedModel, place: Path, **options: Any) -> gguf.GGUFReader:
    return gguf.GGUFReader(
        export_gguf(model, place / "model.gguf", **{"type": "f32", "tokenizer": TOKENIZER, **options})
    )


def key(reader: gguf.GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


# -- what llama.cpp computes ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, float]]:
    """The architecture in the file and the largest difference to transformers, of every case; one llama.cpp for all."""
    place = tmp_path_factory.mktemp("files")
    found, jobs = {}, []
    for number, (name, (_, make)) in enumerate(CASES.items()):
        model = make()
        file = export_gguf(model, place / f"{number}.gguf", type="f32", tokenizer=TOKENIZER)
        jobs.append(job(file, PROMPTS, ROWS, say=40))
        found[name] = (layout_of(model).arch, log_probabilities(model))
    answers = ask(*jobs)
    return {
        name: (arch, difference(answer, expected))
        for (name, (arch, expected)), answer in zip(found.items(), answers, strict=True)
    }


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_equals_transformers(name: str, computed: dict[str, tuple[str, float]]) -> None:
    arch, worst = computed[name]
    assert arch == CASES[name][0]
    # Measured 3e-6 at most; the smallest mistake that was seen while a trap was open was 1e-1.
    assert worst < 2e-5


# bfloat16 and Q8_0 also round what the matrices are multiplied with.
@pytest.mark.parametrize(("type", "tolerance"), [("f16", 2e-2), ("bf16", 1e-1), ("q8_0", 2e-1)])
def test_llama_cpp_reads_every_type(type: str, tolerance: float, tmp_path: Path) -> None:
    model = cut("llama", WIDE)
    file = export_gguf(model, tmp_path / "model.gguf", type=type, tokenizer=TOKENIZER)
    assert difference(ask(job(file, PROMPTS, ROWS, say=40))[0], log_probabilities(model)) < tolerance


def test_llama_cpp_sees_the_same_tokens(tmp_path: Path) -> None:
    texts = [
        "the model reads", "don't we'll I'M HE'LL", "12 345 6789 a1b22", "naïve 日本語 text",
        "  two  spaces\n\n\nx\t\ty ", "(x==y)!!! ...", "<|user|>hi</s> there", " lead", "\u017f's K",
    ]  # fmt: skip
    model = tiny_model("llama", vocab_size=720)
    made = make_tokenizers()
    assert set(PRE_TOKENIZERS.values()) < set(made)
    jobs = [
        job(export_gguf(model, tmp_path / f"{name}.gguf", tokenizer=tokenizer), texts, tokenize=True)
        for name, tokenizer in made.items()
    ]
    for (name, tokenizer), answers in zip(made.items(), ask(*jobs), strict=True):
        assert [answer["ids"] for answer in answers] == [tokenizer(text)["input_ids"] for text in texts], name


# -- what is in the file ----------------------------------------------------------------------------------------------


def test_a_uniform_file_reads_back(tmp_path: Path) -> None:
    model = cut("llama", WIDE, uniform=True)
    reader = written(model, tmp_path)
    assert key(reader, "general.architecture") == "llama"
    assert [key(reader, f"llama.{name}") for name in ("block_count", "context_length", "embedding_length")] == [
        3,
        128,
        32,
    ]
    assert [key(reader, f"llama.attention.head_count{kind}") for kind in ("", "_kv")] == [2, 1]
    assert key(reader, "llama.feed_forward_length") == 24
    assert {key(reader, f"llama.{name}") for name in ("attention.key_length", "rope.dimension_count")} == {12}
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in by_name  # tied
    assert np.array_equal(by_name["blk.1.ffn_down.weight"].data, model.model.layers[1].mlp.down_proj.weight.detach())
    # Rows (half, pair) of the two heads became (pair, half).
    query = model.model.layers[0].self_attn.q_proj.weight.detach()
    order = [head * 12 + half * 6 + pair for head in range(2) for pair in range(6) for half in range(2)]
    assert np.array_equal(by_name["blk.0.attn_q.weight"].data, query[order])


def test_an_adaptive_file_says_every_layer(tmp_path: Path) -> None:
    model = cut("llama", WIDE, gone=("layers.1.mlp",))
    reader = written(model, tmp_path)
    assert key(reader, "general.architecture") == "deci"
    assert key(reader, "deci.attention.head_count") == [4, 2, 2]
    assert key(reader, "deci.attention.head_count_kv") == [2, 1, 1]
    assert key(reader, "deci.feed_forward_length") == [24, 32, 26]
    zeros = {tensor.name: tensor for tensor in reader.tensors}["blk.1.ffn_down.weight"]
    assert zeros.shape.tolist() == [32, 32] and not zeros.data.any()


@pytest.mark.parametrize(("type", "kind"), [("f32", "F32"), ("f16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0")])
def test_types(type: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = cut("llama", repair=True, attention_bias=True)
    with caplog.at_level(logging.WARNING, logger="hf_adaprune"):
        reader = written(model, tmp_path, type=type)
    state = model.state_dict()
    for tensor in reader.tensors:
        one = len(tensor.shape) == 1
        # 4 heads of 12 and 48 channels: rows of 48.
        assert tensor.tensor_type.name == ("F32" if one else "F16" if type == "q8_0" and tensor.shape[0] % 32 else kind)
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    expected = state["model.layers.0.mlp.up_proj.weight"].numpy()
    step = {"f32": 0.0, "f16": 1e-3, "bf16": 4e-3, "q8_0": 4e-3}[type]
    assert np.abs(found["blk.0.ffn_up.weight"] - expected).max() <= step * np.abs(expected).max()
    assert ("6 of 22 matrices" in caplog.text) is (type == "q8_0")


def test_llama3_factors_are_transformers() -> None:
    config = LlamaConfig(head_dim=64, **rope("llama3", **{**LLAMA3, "original_max_position_embeddings": 8192}))
    plain = LlamaRotaryEmbedding(LlamaConfig(head_dim=64, **rope("default"))).inv_freq
    factors = llama3_factors(config.rope_parameters, 64)
    assert torch.allclose(plain / factors, LlamaRotaryEmbedding(config).inv_freq, rtol=1e-6)
    assert factors[0] == 1.0 and factors[-1] == 8.0


def test_a_vocabulary_is_complete() -> None:
    TOKENIZER.chat_template = {"default": "{{ messages }}"}
    vocabulary = read_vocabulary(TOKENIZER, 500)
    TOKENIZER.chat_template = None
    assert (vocabulary.model, vocabulary.pre, vocabulary.chat_template) == ("gpt2", "gpt-2", "{{ messages }}")
    assert len(vocabulary.tokens) == 500 and vocabulary.tokens[499] == "[PAD499]"
    assert vocabulary.types[:4] == (3, 3, 3, 3) and vocabulary.types[10] == 1 and vocabulary.types[499] == 5
    assert vocabulary.special == {"bos": 0, "eos": 1, "unknown": 2, "padding": 1}
    assert vocabulary.flags == {"add_bos_token": False, "add_eos_token": False}


def test_what_the_tokenizer_does_not_name_the_model_names(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(models.BPE(), byte_level())
    tokenizer.bos_token = tokenizer.eos_token = None
    model = cut("llama")
    model.config.bos_token_id, model.config.eos_token_id = 3, 4
    model.generation_config.bos_token_id, model.generation_config.eos_token_id = None, [5, 6]
    reader = written(model, tmp_path, tokenizer=tokenizer)
    assert [key(reader, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")] == [3, 5]
    assert not key(reader, "tokenizer.ggml.add_bos_token")
    again = written(model, tmp_path, tokenizer=TOKENIZER, overwrite=True)
    assert [key(again, f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")] == [0, 1]


# -- what is refused --------------------------------------------------------------------------------------------------


def with_adapter() -> PreTrainedModel:
    model = cut("llama")
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: cut("qwen3", WIDE), "layers of different widths"),
        (lambda: cut("qwen3", WIDE, uniform=True, repair=True), "biases on attn_output, ffn_down"),
        (lambda: cut("qwen3", gone=GONE[:1]), "different widths"),
        (lambda: cut("qwen3", gone=NO_MLP), "removed sublayers"),
        (lambda: cut("llama", hidden_act="gelu"), "silu"),
        (lambda: cut("mistral", sliding_window=16), "sliding window of 16"),
        (lambda: cut("llama", **rope("dynamic", factor=2.0)), "'dynamic'"),
        (lambda: tiny_model("llama", vocab_size=100), "ids up to 419"),
        (lambda: get_peft_model(cut("llama"), LoraConfig(target_modules=["q_proj"])), "merge_and_unload"),
        (with_adapter, "has adapters"),
        (lambda: cut("llama").model, "a LlamaModel has no language modelling head.*AutoModelForCausalLM"),
    ],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # read by peft
def test_refused_models(make: Callable[[], PreTrainedModel], said: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        export_gguf(make(), tmp_path / "model.gguf", tokenizer=TOKENIZER)
    assert not list(tmp_path.iterdir())


def test_a_compiled_model_is_written_as_the_model_that_it_is(tmp_path: Path) -> None:
    model = cut("llama", WIDE)
    compiled = torch.compile(model, backend="eager")
    files = []
    for number, given in enumerate((model, compiled)):
        (tmp_path / str(number)).mkdir()
        files.append(export_gguf(given, tmp_path / str(number) / "model.gguf", tokenizer=TOKENIZER).read_bytes())
    assert files[0] == files[1]
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    for whole in (model, torch.compile(model, backend="eager")):
        with pytest.raises(UnsupportedModelError, match=r"torch.compile.*as it was loaded"):
            export_gguf(whole, tmp_path / "model.gguf", tokenizer=TOKENIZER)


def test_other_families_are_refused(family: str, tmp_path: Path) -> None:
    if family not in FAMILIES:
        with pytest.raises(UnsupportedModelError, match="llama, mistral, qwen2, qwen3 are"):
            export_gguf(tiny_model(family), tmp_path / "model.gguf", tokenizer=TOKENIZER)


@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_numbers_that_do_not_fit_are_refused(type: str, tmp_path: Path) -> None:
    model = cut("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = 1e5
    with pytest.raises(UnsupportedModelError, match=r"blk\.1\.ffn_down\.weight holds 100000, and F16 ends at 65504"):
        export_gguf(model, tmp_path / "model.gguf", type=type, tokenizer=TOKENIZER)
    export_gguf(model, tmp_path / "model.gguf", type="bf16", tokenizer=TOKENIZER)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UnsupportedModelError, match=r"output_norm\.weight holds nan"):
        export_gguf(model, tmp_path / "model.gguf", type="f32", tokenizer=TOKENIZER, overwrite=True)


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (lambda: train_tokenizer(models.BPE(), split_by(r"\p{L}+|\p{N}")), "split text"),
        (lambda: train_tokenizer(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=True)), "split text"),
        (lambda: train_tokenizer(models.BPE(), byte_level(), normalizers.Lowercase()), "Lowercase"),
        (
            lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))),
            "WordLevel",
        ),
        (object, "tokenizer.json"),
        (lambda: adding(AddedToken("<|x|>", lstrip=True, special=True)), r"'<\|x\|>' \(lstrip\): a GGUF"),
        (lambda: adding(AddedToken("<|x|>", rstrip=True), AddedToken("<y>")), r"tokens '<\|x\|>' \(rstrip\): a GGUF"),
        (lambda: adding(AddedToken("ing", single_word=True, normalized=False)), r"'ing' \(single_word\)"),
    ],
)
def test_refused_tokenizers(tokenizer: Callable[[], Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=said):
        export_gguf(tiny_model("llama", vocab_size=720), tmp_path / "model.gguf", tokenizer=tokenizer())


# -- the file appears whole or not at all -----------------------------------------------------------------------------


def test_nothing_is_left_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
        with pytest.raises(CheckpointError, match="No space left"):
            export_gguf(cut("llama"), tmp_path / "model.gguf", tokenizer=TOKENIZER)
    assert not list(tmp_path.iterdir())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 1000))
    with pytest.raises(CheckpointError, match="MiB free"):
        export_gguf(cut("llama"), tmp_path / "model.gguf", tokenizer=TOKENIZER)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="overwrite"):
        export_gguf(cut("llama"), file, tokenizer=TOKENIZER)
    assert file.read_text() == "mine"
    assert export_gguf(cut("llama"), file, tokenizer=TOKENIZER, overwrite=True).read_bytes()[:4] == b"GGUF"
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(CheckpointError, match="is a folder"):
        export_gguf(cut("llama"), tmp_path, tokenizer=TOKENIZER)
    with pytest.raises(CheckpointError, match="there is no folder"):
        export_gguf(cut("llama"), tmp_path / "no" / "model.gguf", tokenizer=TOKENIZER)


def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"f32, f16, bf16, q8_0\. Found 'q4_0'"):
        export_gguf(cut("llama"), tmp_path / "a", type="q4_0", tokenizer=TOKENIZER)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="`tokenizer` is missing"):
        export_gguf(cut("llama"), tmp_path / "a")
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match=r"hf_adaprune\[gguf\]"):
        writing.export_gguf(cut("llama"), tmp_path / "a", tokenizer=TOKENIZER)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, file = tmp_path / "checkpoint", tmp_path / "model.gguf"
    model = cut("llama", WIDE)
    model.save_pretrained(folder)
    words = ["export", "gguf", str(folder), str(file), "--type", "f32", "--json", "--quiet"]
    assert main(words) == 2 and "tokenizer" in capsys.readouterr().err
    TOKENIZER.save_pretrained(folder)
    assert main(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {"architecture": "deci", "bytes": file.stat().st_size, "output": str(file), "type": "f32"}
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert file.read_bytes() == export_gguf(again, tmp_path / "b.gguf", type="f32", tokenizer=TOKENIZER).read_bytes()
    assert main(words) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert main(["export", "gguf", str(tmp_path / "none"), str(tmp_path / "c.gguf")]) == 2
