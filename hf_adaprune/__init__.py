"""Structured pruning of causal language models, as a transformers plugin.

Importing the package teaches `from_pretrained` the keyword `pruning_config=` and lets it open pruned checkpoints. Heavy
libraries load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import loading as _loading

if TYPE_CHECKING:
    from .architectures import ARCHITECTURES, Architecture, Attention, Experts, Mlp
    from .card import model_card
    from .config import (
        RECIPES,
        AllocationConfig,
        CalibrationConfig,
        ImportanceConfig,
        PruningConfig,
        RepairConfig,
        SearchConfig,
        TextSource,
    )
    from .cut_schedule import stage_shares
    from .distillation import DistillationTrainer
    from .errors import AdaPruneError
    from .hub import push_to_hub
    from .loading import result_of
    from .masking import masked
    from .metrics import METRICS
    from .pipeline import PruningResult, prune
    from .plan import PruningPlan, SitePlan
    from .recovery import recover
    from .recovery_config import LoraSettings, RecoveryConfig
    from .recovery_result import RecoveryResult
    from .saving import save_pruned
    from .search_stage import search_plan
    from .searching import SearchResult
    from .sites import find_sites
    from .streamed import StreamedResult, prune_to_disk
    from .surgery import apply_plan
    from .training import AdaPrunerCallback

__version__ = "0.1.0"

_WHERE = {
    "ARCHITECTURES": "architectures",
    "AdaPrunerCallback": "training",
    "AdaPruneError": "errors",
    "AllocationConfig": "config",
    "Architecture": "architectures",
    "Attention": "architectures",
    "CalibrationConfig": "config",
    "DistillationTrainer": "distillation",
    "Experts": "architectures",
    "ImportanceConfig": "config",
    "LoraSettings": "recovery_config",
    "METRICS": "metrics",
    "Mlp": "architectures",
    "PruningConfig": "config",
    "PruningPlan": "plan",
    "PruningResult": "pipeline",
    "RECIPES": "config",
    "RecoveryConfig": "recovery_config",
    "RecoveryResult": "recovery_result",
    "RepairConfig": "config",
    "SearchConfig": "config",
    "SearchResult": "searching",
    "SitePlan": "plan",
    "StreamedResult": "streamed",
    "TextSource": "config",
    "apply_plan": "surgery",
    "find_sites": "sites",
    "model_card": "card",
    "masked": "masking",
    "prune": "pipeline",
    "prune_to_disk": "streamed",
    "push_to_hub": "hub",
    "recover": "recovery",
    "result_of": "loading",
    "save_pruned": "saving",
    "search_plan": "search_stage",
    "stage_shares": "cut_schedule",
}

__all__ = [
    "ARCHITECTURES",
    "METRICS",
    "RECIPES",
    "AdaPruneError",
    "AdaPrunerCallback",
    "AllocationConfig",
    "Architecture",
    "Attention",
    "CalibrationConfig",
    "DistillationTrainer",
    "Experts",
    "ImportanceConfig",
    "LoraSettings",
    "Mlp",
    "PruningConfig",
    "PruningPlan",
    "PruningResult",
    "RecoveryConfig",
    "RecoveryResult",
    "RepairConfig",
    "SearchConfig",
    "SearchResult",
    "SitePlan",
    "StreamedResult",
    "TextSource",
    "apply_plan",
    "find_sites",
    "masked",
    "model_card",
    "prune",
    "prune_to_disk",
    "push_to_hub",
    "recover",
    "result_of",
    "save_pruned",
    "search_plan",
    "stage_shares",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, for completion."""
    return sorted({*globals(), *__all__})


_loading.install()
