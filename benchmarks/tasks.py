"""Multiple choice through lm-evaluation-harness: its own tasks by name, and local rows as a task of their own.

Local rows are scored by `hf_adaprune.choices.multiple_choice` in the tables, which is faster and scores alike (the
tests compare both); `run_rows` gives the same rows to the harness.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_adaprune.choices import ChoiceRow
from hf_adaprune.evaluation import Measurement
from hf_adaprune.harness import load_harness, run_tasks

__all__ = ["run_named", "run_rows"]

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: "{file}"
  cache_dir: "{cache}"
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def run_named(model: Any, tokenizer: Any, names: Sequence[str], limit: int | None) -> dict[str, dict[str, Measurement]]:
    """`acc` and `acc_norm` of the first rows of tasks that lm-eval fetches by name.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        ConfigError: it could not run a task.
    """
    found = run_tasks(model, tokenizer, names, limit=limit)
    return {task: {key: own[key] for key in ("acc", "acc_norm") if key in own} for task, own in found.items()}


def run_rows(model: Any, tokenizer: Any, rows: Sequence[ChoiceRow], name: str = "local_rows") -> dict[str, Measurement]:
    """`acc` and `acc_norm` of local rows, by the harness.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer: its tokenizer.
        rows (sequence of [`ChoiceRow`]): the questions.
        name (`str`, *optional*): of the task.

    Raises:
        MissingDependencyError: lm-eval is not installed.
    """
    load_harness()
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory(prefix="hf_adaprune_rows_") as place:
        folder = Path(place)
        file = folder / "rows.jsonl"
        said = [{"context": row.context, "choices": list(row.choices), "label": row.label} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in said))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=file, cache=folder / "cache"))
        manager = TaskManager(include_path=place, include_defaults=False)
        return run_tasks(model, tokenizer, [name], task_manager=manager)[name]
