"""The house: imports go downward, few files touch what matters, and the import of the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_adaprune"
# From the ground up. A file may import, when it is loaded, only from files before it.
ORDER = [
    "errors",
    "locks",
    "whole_files",
    "run_folder",
    "names",
    "public",
    "workers",
    "fields",
    "parts",
    "search_config",
    "config",
    "architectures",
    "architecture_json",
    "plan",
    "site",
    "sites",
    "offloading",
    "activations",
    "documents",
    "quiet",
    "token_blocks",
    "calibration",
    "positions",
    "experts",
    "layers",
    "model_config",
    "elements",
    "statistics",
    "gram_sums",
    "backward",
    "sweeps",
    "recording",
    "tracing",
    "clustering",
    "moments",
    "metrics",
    "importance",
    "offers",
    "shapes",
    "allocation_checks",
    "allocation",
    "compensation",
    "run_facts",
    "run_artefacts",
    "masking",
    "streaming",
    "surgery",
    "modeling",
    "remote_code",
    "walk",
    "layerwise",
    "evaluation",
    "continuations",
    "choices",
    "harness",
    "throughput",
    "speeds",
    "costs",
    "budgets",
    "search.dimensions",
    "search.space",
    "search.journal",
    "search.problem",
    "search.measuring",
    "search.loop",
    "search.baselines",
    "search.shares",
    "search.evolution",
    "search.gaussian_process",
    "search.predictor",
    "measures",
    "trials",
    "clock",
    "repairing",
    "stages",
    "layer_scores",
    "selection",
    "search_checks",
    "search_journal",
    "run_start",
    "searching",
    "parallel",
    "search_stage",
    "pipeline",
    "cut_schedule",
    "optimizer_state",
    "loading",
    "saving",
    "shards",
    "export.gguf_layout",
    "export.gguf_tokenizer",
    "export.gguf",
    "widths",
    "reporting",
    "description",
    "width_plot",
    "journal_report",
    "journal_plot",
    "card",
    "publication",
    "hub",
    "restoring",
    "adapters",
    "training_masks",
    "training_text",
    "training_checks",
    "training_cuts",
    "training_files",
    "training",
    "skeleton",
    "footprint",
    "machine_speed",
    "estimate",
    "layer_writing",
    "streamed",
    "recovery_config",
    "recovery_course",
    "distillation_loss",
    "teacher_cache",
    "distillation",
    "recovery_texts",
    "recovery_training",
    "recovery_result",
    "recovery",
    "demo",
    "cli_model",
    "cli_run",
    "cli_search",
    "cli_recover",
    "cli_publish",
    "cli_arguments",
    "cli",
    "__main__",
]
WITHOUT_TORCH = (
    "errors",
    "locks",
    "whole_files",
    "public",
    "fields",
    "parts",
    "search_config",
    "config",
    "architectures",
    "architecture_json",
    "plan",
    "recovery_config",
)
FILES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)


def text_of(name: str) -> str:
    return (PACKAGE / f"{name.replace('.', '/')}.py").read_text()


def imports_when_loaded(name: str) -> list[str]:
    """Modules of the package that a file imports at load time (not for types, not inside functions)."""
    found = []
    for node in ast.parse(text_of(name)).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            room = name.split(".")[: -node.level] + ([node.module] if node.module else [])
            found.extend([".".join(room)] if node.module else [".".join([*room, alias.name]) for alias in node.names])
    return found


def calls(name: str) -> set[str]:
    """Names of the functions and methods that a file calls."""
    tree = ast.parse(text_of(name))
    called = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called.add(node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", ""))
    return called


def test_every_file_has_a_floor() -> None:
    assert sorted(ORDER) == FILES


@pytest.mark.parametrize("name", FILES)
def test_imports_go_downward(name: str) -> None:
    above = [module for module in imports_when_loaded(name) if ORDER.index(module) >= ORDER.index(name)]
    assert not above, f"{name} imports {above}, which stand above it"


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_data_files_import_no_torch(name: str) -> None:
    assert "torch" not in text_of(name).replace("no torch", "")


def test_only_surgery_assigns_parameters() -> None:
    """Assigning `.data` or making a Parameter is surgery's alone."""
    for name in FILES:
        tree = ast.parse(text_of(name))
        data = [
            node
            for node in ast.walk(tree)
            if isinstance(node, (ast.Assign, ast.AugAssign))
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Attribute) and target.attr == "data"
        ]
        if name != "surgery":
            assert not data, f"{name} assigns .data"
            assert "Parameter" not in calls(name), f"{name} makes a Parameter"


def test_few_files_hook_the_model() -> None:
    """`recording` and `tracing` read, `masking` writes."""
    for name in FILES:
        if name not in ("recording", "tracing", "masking"):
            assert not {call for call in calls(name) if call.startswith("register_forward")}, f"{name} hooks"


def test_import_is_light() -> None:
    code = "import sys, hf_adaprune; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_one_room(name: str) -> None:
    """Crowded rooms get redrawn: the limit is generous, and the longest files stand near it on purpose."""
    assert len(text_of(name).splitlines()) <= 620
