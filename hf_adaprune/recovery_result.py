"""What came of a recovery, and how it is kept."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluation import Measurement
from .pipeline import Sizes
from .plan import PruningPlan
from .recovery_config import RecoveryConfig
from .saving import save_pruned
from .sites import find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["RecoveryResult"]


@dataclass(frozen=True, eq=False)
class RecoveryResult:
    """What came of a recovery.

    Args:
        model (`PreTrainedModel`): the object that went in, trained; adapters are merged.
        tokenizer (`PreTrainedTokenizerBase`): as given.
        config ([`RecoveryConfig`]): what was asked for.
        tokens, steps (`int`): trained on.
        minutes (`float`): the training took, with caching the teacher.
        held_out (`dict[str, dict[str, Measurement]]`): `before` and `after`: `loss` and `kl` to the teacher on windows
            that training never saw.
        log (`tuple[dict[str, float], ...]`): losses, learning rate and gradient norm by step.
        text (`dict[str, Any]`): tokens, windows, domains and digest of the training text, and the token (BOS) that all
            windows begin with.
        pruning (`dict[str, Any]`): what `pruning_config.json` said about the pruned checkpoint.
        plan ([`PruningPlan`], *optional*): of the pruned checkpoint.
        teacher (`str`): its name.
        evaluation (`dict[str, dict[str, Measurement]]`): perplexity per report source: `dense` (the teacher), `before`
            and `recovered`.
        evaluation_length (`int`, *optional*): tokens of a window of it, at most.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    config: RecoveryConfig
    tokens: int
    steps: int
    minutes: float
    held_out: Mapping[str, Mapping[str, Measurement]] = field(default_factory=dict)
    log: tuple[Mapping[str, float], ...] = ()
    text: Mapping[str, Any] = field(default_factory=dict)
    pruning: Mapping[str, Any] = field(default_factory=dict)
    plan: PruningPlan | None = None
    teacher: str = ""
    evaluation: Mapping[str, Mapping[str, Measurement]] = field(default_factory=dict)
    evaluation_length: int | None = None

    @property
    def after(self) -> Sizes:
        """The model's sizes, which training does not change."""
        return Sizes.of(find_sites(self.model))

    def to_dict(self) -> dict[str, Any]:
        """What the pruned checkpoint said, with a part `recovery`; JSON types."""
        own = {
            "config": self.config.to_dict(), "teacher": self.teacher, "tokens": self.tokens, "steps": self.steps,
            "minutes": round(self.minutes, 3), "text": dict(self.text), "log": [dict(entry) for entry in self.log],
            "held_out": {
                when: {name: vars(value) for name, value in measured.items()}
                for when, measured in self.held_out.items()
            },
        }  # fmt: skip
        if self.evaluation_length is not None:
            own["evaluation_length"] = self.evaluation_length
        # What was measured when it was pruned is not true of the recovered model.
        own["pruned"] = {"evaluation": self.pruning.get("evaluation", {})}
        evaluation = {
            source: {which: vars(value) for which, value in measured.items()}
            for source, measured in self.evaluation.items()
        }
        return {**self.pruning, "evaluation": evaluation, "recovery": own}

    def save_pretrained(self, output_dir: str | os.PathLike[str], **options: Any) -> Path:
        """Save checkpoint, plan and provenance, and check that they reload; see [`hf_adaprune.save_pruned`]."""
        return save_pruned(self, output_dir, **options)
