"""Tasks of lm-evaluation-harness by name, on a model in memory."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .documents import eval_mode
from .errors import ConfigError, MissingDependencyError
from .evaluation import Measurement

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_harness", "run_tasks"]


def load_harness() -> Any:
    """The library.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
    except ImportError as error:
        raise MissingDependencyError(
            "tasks by name are lm-evaluation-harness's, which the extra `eval` brings: pip install hf_adaprune[eval]. "
            "Without it, give a file of multiple-choice rows."
        ) from error
    return lm_eval


def run_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], **options: Any
) -> dict[str, dict[str, Measurement]]:
    """Run tasks and return every metric of each.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer: its tokenizer.
        names (sequence of `str`): of the tasks.
        **options: of `lm_eval.simple_evaluate`, such as `limit` and `task_manager`.

    Returns:
        `dict[str, dict[str, Measurement]]`: by task and metric, as `acc`, or `exact_match,strict-match` where the task
        filters answers; tokens are not counted.

    Raises:
        MissingDependencyError: the library is not installed.
        ConfigError: it could not run the tasks.
    """
    harness = load_harness()
    try:
        # The harness puts the model into eval mode, and gives the tokenizer a token to pad with.
        with eval_mode(model):
            wrapped = harness.models.huggingface.HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer))
            answer = harness.simple_evaluate(model=wrapped, tasks=list(names), **options)
    except (KeyError, ValueError, OSError) as error:
        raise ConfigError(f"lm-eval could not run {', '.join(names)}: {error}") from error
    rows: Mapping[str, Any] = answer.get("n-samples", {})
    found: dict[str, dict[str, Measurement]] = {}
    for task, values in answer["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, (int, float)) and kind and not metric.endswith("_stderr"):
                spread = values.get(f"{metric}_stderr,{kind}")
                spread = float(spread) if isinstance(spread, (int, float)) else math.nan
                count = int(rows.get(task, {}).get("effective", 0))
                # A task may measure the same of several readings of an answer (gsm8k: strict and flexible).
                name = metric if kind == "none" else key
                found.setdefault(task, {})[name] = Measurement(name, float(value), spread, 0, count)
    return found
