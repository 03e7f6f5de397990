"""Texts, token blocks, a tokenizer and a model that reads its tokens, all made in memory."""

from __future__ import annotations

import random

import torch
from conftest import tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_adaprune.token_blocks import TokenBlocks

SENTENCE = "the model reads a river of words and every head keeps what it learned about rain stone light and time"
WORDS = SENTENCE.split()
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"


def calibration_prose(seed: int, words: int) -> str:
    """Sentences of random words, in lines of twelve."""
    draw = random.Random(seed)
    lines = [" ".join(draw.choices(WORDS, k=12)) + f" {draw.randrange(10**6)}." for _ in range(max(words // 12, 1))]
    return "\n".join(lines)


def calibration_make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE of a few hundred tokens, trained in memory."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([calibration_prose(0, 2000)], trainer)
    if "eos_token" in special:
        # Like the tokenizers that add a token of their own to every text, which packing must not let happen.
        eos = special["eos_token"]
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{eos} $A {eos}", special_tokens=[(eos, bpe.token_to_id(eos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def begun_tokenizer(adds: bool = True) -> PreTrainedTokenizerFast:
    """One that puts `<s>` before every text, as Llama's and Gemma's do, or that knows it and does not."""
    tokenizer = calibration_make_tokenizer(eos_token="<eos>", bos_token="<s>")
    marks = [("<s>", tokenizer.bos_token_id)]
    rule = processors.TemplateProcessing(single="<s> $A" if adds else "$A", special_tokens=marks)
    tokenizer.backend_tokenizer.post_processor = rule
    return tokenizer


def text_model() -> LlamaForCausalLM:
    """A tiny Llama with random weights for the tokens of `calibration_make_tokenizer`, in training mode."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=330, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=48, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def random_blocks(
    samples: int = 4, length: int = 11, domains: int = 1, padding: tuple[int, ...] = (), seed: int = 0
) -> TokenBlocks:
    """Windows of random tokens; domains take turns, and the first windows are padded by so many tokens."""
    ids = tokens(samples, length, seed)
    mask = torch.ones(samples, length, dtype=torch.bool)
    for window, pad in enumerate(padding):
        mask[window, length - pad :] = False
    names = tuple("abcdef"[:domains])
    return TokenBlocks(ids, mask, torch.arange(samples) % domains, names)


def sampled_prose(model: object, tokenizer: PreTrainedTokenizerFast, tokens: int, *_: object) -> list[str]:
    """What a model might say that speaks prose: so many tokens and no more, in the place of `documents._sample`."""
    ids = tokenizer(calibration_prose(77, tokens), add_special_tokens=False)["input_ids"]
    return [tokenizer.decode(ids[:tokens])]


def windows_of(blocks: TokenBlocks) -> list[tuple[int, ...]]:
    """The unpadded windows."""
    return [tuple(ids[mask].tolist()) for ids, mask in zip(blocks.input_ids, blocks.attention_mask, strict=True)]
