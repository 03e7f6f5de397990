"""Tokens per second of whole models, and the clock that waits for a device."""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from .documents import eval_mode, input_device
from .errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["last_logits", "seconds_on", "throughput", "throughputs"]


def seconds_on(device: torch.device) -> float:
    """Seconds of a monotonic clock, read when the device has done all that it was asked for.

    Args:
        device (`torch.device`): whose queue is waited for; a CPU has none.
    """
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def last_logits(model: PreTrainedModel) -> dict[str, Any]:
    """Arguments that apply the head to the last position alone, as `generate` does; none where the model cannot.

    Args:
        model (`PreTrainedModel`): a causal language model.
    """
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def throughput(
    model: PreTrainedModel, *, prefill: int = 512, new_tokens: int = 32, repeats: int = 5, seed: int = 0
) -> dict[str, float]:
    """Speed at batch 1 with cache: medians over repeats, after one run that does not count.

    The model is called directly, so neither generation settings nor an end-of-sequence token play a part.

    Args:
        model (`PreTrainedModel`): a causal language model.
        prefill (`int`, *optional*, defaults to 512): tokens of the prompt, drawn at random.
        new_tokens (`int`, *optional*, defaults to 32): tokens decoded greedily after it.
        repeats (`int`, *optional*, defaults to 5): timed runs.
        seed (`int`, *optional*, defaults to 0): of the prompt.

    Returns:
        `dict[str, float]`: `prefill_tokens_per_second` and `decode_tokens_per_second`.

    Raises:
        ConfigError: a count is below one, or the model has too few positions.
    """
    return throughputs([model], prefill=prefill, new_tokens=new_tokens, repeats=repeats, seed=seed)[0]


def throughputs(
    models: Sequence[PreTrainedModel], *, prefill: int = 512, new_tokens: int = 32, repeats: int = 5, seed: int = 0
) -> list[dict[str, float]]:
    """Speeds of several models, timed in turns: what else the machine does slows all of them alike.

    Args:
        models (list of `PreTrainedModel`): causal language models.
        prefill (`int`, *optional*, defaults to 512): tokens of the prompt, drawn at random.
        new_tokens (`int`, *optional*, defaults to 32): tokens decoded greedily after it.
        repeats (`int`, *optional*, defaults to 5): timed turns.
        seed (`int`, *optional*, defaults to 0): of the prompt.

    Returns:
        `list[dict[str, float]]`: as of [`throughput`], in the models' order.

    Raises:
        ConfigError: a count is below one, or a model has too few positions.
    """
    if min(prefill, new_tokens, repeats) < 1:
        raise ConfigError(
            f"`prefill`, `new_tokens` and `repeats` should be at least 1. Found {prefill}, {new_tokens} and {repeats}."
        )
    for model in models:
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and prefill + new_tokens > positions:
            raise ConfigError(
                f"`prefill` + `new_tokens` should be at most the model's {positions} positions. "
                f"Found {prefill + new_tokens}; lower one of them."
            )
    runs: list[list[tuple[float, float]]] = [[] for _ in models]
    for _ in range(repeats + 1):
        for own, model in zip(runs, models, strict=True):
            own.append(_timed(model, prefill, new_tokens, seed))
    return [
        {
            "prefill_tokens_per_second": median(run[0] for run in own[1:]),
            "decode_tokens_per_second": median(run[1] for run in own[1:]),
        }
        for own in runs
    ]


def _timed(model: PreTrainedModel, prefill: int, new_tokens: int, seed: int) -> tuple[float, float]:
    """Tokens per second of one prefill, and of decoding after it."""
    device = input_device(model)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(vocabulary, (1, prefill), generator=generator).to(device)
    with eval_mode(model), torch.inference_mode():
        started = seconds_on(device)
        output = model(input_ids=prompt, use_cache=True, **last_logits(model))
        filled = seconds_on(device)
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return prefill / (filled - started), new_tokens / (seconds_on(device) - filled)
