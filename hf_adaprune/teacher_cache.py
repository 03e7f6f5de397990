"""A teacher's outputs on disk: the most likely next tokens at every position, made once and read at every epoch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from .documents import eval_mode, input_device
from .errors import CheckpointError, ConfigError
from .gram_sums import summing_dtype
from .names import name_of
from .token_blocks import TokenBlocks
from .whole_files import whole_folder

__all__ = ["CachedTeacher", "cache_teacher", "vocabulary_of"]

CACHE_FILE, CACHE_FACTS = "teacher.safetensors", "teacher.json"
_CHUNK_POSITIONS = 64
# What a cache is refused without.
_FACTS: Mapping[str, Any] = {"sha256": str, "windows": int, "vocabulary": int, "temperature": (int, float)}


@dataclass(frozen=True, eq=False)
class CachedTeacher:
    """The most likely next tokens of a teacher at every position of some windows, on disk.

    Args:
        folder (`str`): written by [`cache_teacher`].
        blocks ([`TokenBlocks`], *optional*): the windows that the cache should be of; another digest is refused.

    Raises:
        CheckpointError: there is no cache, it is damaged, or of other text.
    """

    folder: str | os.PathLike[str]
    blocks: TokenBlocks | None = None
    facts: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        """Read what the cache is about."""
        path = Path(self.folder)
        try:
            facts = json.loads((path / CACHE_FACTS).read_text(encoding="utf-8"))
            with safe_open(path / CACHE_FILE, framework="pt") as file:
                shape = file.get_slice("tokens").get_shape()
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} holds no cached teacher. Make one with cache_teacher().") from error
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            raise CheckpointError(f"the cached teacher in {path} cannot be read: {error}. Remove it.") from error
        wrong = [
            name for name, kind in _FACTS.items() if type(facts) is not dict or not isinstance(facts.get(name), kind)
        ]
        if wrong:
            raise CheckpointError(
                f"{path / CACHE_FACTS} should say {', '.join(wrong)} of a cached teacher. Remove the folder, and cache "
                "again."
            )
        if self.blocks is not None and facts["sha256"] != self.blocks.digest:
            raise CheckpointError(
                f"the cached teacher in {path} is of other text (digest {facts['sha256'][:12]}) than the training "
                f"windows ({self.blocks.digest[:12]}). Cache the teacher again into another folder."
            )
        if shape[0] != facts["windows"]:
            raise CheckpointError(
                f"the cached teacher in {path} should hold {facts['windows']} windows. Found {shape[0]}. Cache again."
            )
        object.__setattr__(self, "facts", facts)

    def read(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and log-probabilities `[windows, length - 1, k]` of the windows at `index`."""
        with safe_open(Path(self.folder) / CACHE_FILE, framework="pt") as file:
            tokens, values = file.get_slice("tokens"), file.get_slice("log_probabilities")
            rows = [int(row) for row in index]
            if not 0 <= min(rows) <= max(rows) < self.facts["windows"]:
                raise CheckpointError(
                    f"the cached teacher has {self.facts['windows']} windows and was asked for number {max(rows)}. "
                    "Train on the windows that were cached."
                )
            return torch.stack([tokens[row] for row in rows]), torch.stack([values[row] for row in rows])


def cache_teacher(
    model: PreTrainedModel,
    blocks: TokenBlocks,
    folder: str | os.PathLike[str],
    top_k: int = 64,
    *,
    temperature: float = 1.0,
    batch_size: int = 4,
) -> CachedTeacher:
    """Write a teacher's `top_k` most likely next tokens at every position, 6 bytes each.

    Worth it where the text is read more than once: from the second epoch on the teacher costs nothing.

    Args:
        model (`PreTrainedModel`): the dense model.
        blocks ([`TokenBlocks`]): the windows.
        folder (`str`): does not exist yet, or holds the cache of the same windows, `top_k` and temperature, which then
            is what comes back. It appears when it is whole.
        top_k (`int`, *optional*, defaults to 64): tokens per position.
        temperature (`float`, *optional*, defaults to 1.0): what logits are divided by before they become probabilities.
            The loss has to use the same.
        batch_size (`int`, *optional*, defaults to 4): windows per forward.

    Raises:
        CheckpointError: the folder holds something else, or cannot be written.
        ConfigError: `top_k` is no number of tokens.
    """
    if top_k < 1:
        raise ConfigError(f"`top_k` should be at least 1. Found {top_k}.")
    target = Path(folder)
    name = name_of(model)
    facts: dict[str, Any] = {
        "sha256": blocks.digest, "windows": len(blocks), "temperature": temperature, "vocabulary": vocabulary_of(model),
        "top_k": min(top_k, vocabulary_of(model)), "teacher": _fingerprint(model), "name": name,
    }  # fmt: skip
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        there = CachedTeacher(target, blocks)
        different = [key for key in facts if key != "name" and there.facts.get(key) != facts[key]]
        if different:
            raise CheckpointError(
                f"{target} holds a teacher cached with another {' and '.join(different)}. Name another "
                "folder, or remove it."
            )
        return there
    with whole_folder(target) as partial:
        tokens, values = _top_of_all(model, blocks, facts["top_k"], temperature, batch_size)
        save_file({"tokens": tokens, "log_probabilities": values}, partial / CACHE_FILE)
        (partial / CACHE_FACTS).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return CachedTeacher(target, blocks)


def _fingerprint(model: PreTrainedModel) -> str:
    """A digest of sums over the weights: another model, or the same one trained further, has another."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        total = parameter.detach().to(summing_dtype(parameter.device)).sum().item()
        found.update(f"{name}:{total:.12g}".encode())
    return found.hexdigest()


def _top_of_all(
    model: PreTrainedModel, blocks: TokenBlocks, top_k: int, temperature: float, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    width = blocks.input_ids.shape[1] - 1
    tokens = torch.zeros(len(blocks), width, top_k, dtype=torch.int32)
    values = torch.full((len(blocks), width, top_k), -torch.inf, dtype=torch.float16)
    bar = transformers_logging.tqdm(
        blocks.batches(batch_size), desc="teacher", unit="batch", total=-(-len(blocks) // batch_size)
    )
    first = 0
    with eval_mode(model), torch.inference_mode():
        for batch in bar:
            device, whole = input_device(model), bool(batch.attention_mask.all())
            mask = None if whole else batch.attention_mask.long().to(device)
            logits = model(input_ids=batch.input_ids.to(device), attention_mask=mask, use_cache=False).logits
            for row, window in enumerate(logits, start=first):
                for start in range(0, width, _CHUNK_POSITIONS):
                    part = slice(start, min(start + _CHUNK_POSITIONS, width))
                    scaled = window[part].float() / temperature
                    best, index = scaled.topk(top_k)
                    tokens[row, part] = index.int().cpu()
                    values[row, part] = (best - scaled.logsumexp(-1, keepdim=True)).half().cpu()
            first += len(batch)
    return tokens, values


def vocabulary_of(model: Any) -> int:
    """Number of tokens that a model predicts."""
    return int(model.config.get_text_config().vocab_size)
