"""What `--smoke` runs on: a tiny random Llama, a tokenizer trained in memory, the texts that come with CPython.

Neither network nor data; numbers from it mean nothing but that every experiment runs.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from hf_adaprune import TextSource
from hf_adaprune.choices import ChoiceRow
from hf_adaprune.documents import read_source

from .experiments import SMOKE, Case, Experiment, Shape
from .setting import Setting
from .texts import Texts

__all__ = ["VOCABULARY", "fewer", "python_texts", "smoke_setting", "tokenizer_of"]

VOCABULARY = 320
CHARACTERS = 200_000


@functools.cache
def python_texts(characters: int | None = None) -> tuple[TextSource, TextSource, TextSource]:
    """Calibration, selection and report text: a third each of the prose and code that come with CPython."""
    found = []
    for role, part in (("calibration", (0, 3)), ("selection", (1, 3)), ("report", (2, 3))):
        documents = read_source("python", part=part, limit_characters=characters)
        found.append(TextSource(f"python-{role}", documents.texts))
    return found[0], found[1], found[2]


def tokenizer_of(source: TextSource) -> Any:
    """A byte-level BPE of a few hundred tokens, trained in memory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([source.texts[0][:20_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


def smoke_setting() -> Setting:
    """A tiny model with its texts and four questions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    prose, code = (
        TextSource(kind, read_source(f"python:{kind}", part=(0, 3), limit_characters=CHARACTERS).texts)
        for kind in ("prose", "code")
    )
    _, selection, report = python_texts(CHARACTERS)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=256, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128, tie_word_embeddings=True, eos_token_id=0,
        bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    rows = tuple(
        ChoiceRow(str(number), "sums", f"{number} + 1 =", (str(number), str(number + 1), "none"), 1)
        for number in range(SMOKE.task_rows + 1)
    )
    texts = Texts((prose, code), (selection,), (report,), {"sums": rows[:-1]}, {"sums": rows})
    return Setting("tiny random Llama", model, tokenizer_of(code), texts, SMOKE)


def fewer(experiment: Experiment) -> Experiment:
    """An experiment with one seed, of several ratios the second, one shape of cost and the smallest computed one."""
    cases: list[Any] = list(experiment.cases)
    if isinstance(cases[0], Shape):
        cases = [next(case for case in cases if case.trials)]
    elif "computed" in experiment.measures:
        cases = cases[:1]
    else:
        kept: dict[str, Case] = {}
        for case in cases:
            if case.label not in kept or case.ratio == 0.2:
                kept[case.label] = case
        cases = list(kept.values())
    return replace(experiment, cases=tuple(cases), seeds=experiment.seeds[:1])
