"""The examples run as they stand, on a tiny model in a folder."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from fakehub import FakeHub
from test_hub import hub  # noqa: F401
from texts import calibration_make_tokenizer, calibration_prose
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model("llama", vocab_size=330, max_position_embeddings=512).save_pretrained(folder)
    calibration_make_tokenizer(eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(calibration_prose(3, 30_000))
    return file


@pytest.fixture(scope="module")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("short") / "short.txt"
    file.write_text(calibration_prose(4, 2500))
    return file


def run(name: str, *arguments: object) -> None:
    module: dict[str, Any] = runpy.run_path(str(EXAMPLES / name))
    module["main"](*arguments)


def parameters(folder: Path) -> int:
    return AutoModelForCausalLM.from_pretrained(folder).num_parameters()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60


def test_prune_and_publish(
    model_folder: Path,
    text: Path,
    tmp_path: Path,
    hub: FakeHub,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("prune_in_ten_lines.py", str(model_folder), str(tmp_path / "out"), [str(text)])
    assert parameters(tmp_path / "out") < parameters(model_folder)
    capsys.readouterr()
    run("publish_and_load.py", str(tmp_path / "out"), "me/pruned")
    assert float(capsys.readouterr().out.split()[-1]) == 0.0
    assert hub.repositories["me/pruned"].private


def test_prune_while_training(model_folder: Path, text: Path, tmp_path: Path) -> None:
    run("prune_while_training.py", str(model_folder), str(tmp_path / "out"), str(text), 80)
    assert parameters(tmp_path / "out") < parameters(model_folder)


def test_own_architecture(tmp_path: Path) -> None:
    run("own_architecture.py", str(tmp_path / "out"))


def test_compare_recipes(model_folder: Path, text: Path) -> None:
    run("compare_recipes.py", str(model_folder), str(text))


def test_search_a_plan(model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.txt"
    other.write_text(calibration_prose(9, 30_000))
    words = ["search_a_plan.py", str(model_folder), str(tmp_path / "out"), "--calibration", str(text)]
    monkeypatch.setattr(sys, "argv", [*words, "--selection", str(other), "--trials", "12"])
    run("search_a_plan.py")
    assert parameters(tmp_path / "out") < parameters(model_folder)


def test_search_under_latency(
    model_folder: Path,
    short_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(calibration_prose(9, 2500))
    words = ["search_under_latency.py", str(model_folder), str(tmp_path / "out"), "--calibration", str(short_text)]
    # A speed that any machine has, so that the run is not about this one.
    words += ["--selection", str(other), "--trials", "3", "--decode", "0.5", "--context", "64"]
    monkeypatch.setattr(sys, "argv", words)
    run("search_under_latency.py")
    out = capsys.readouterr().out
    assert "asked for 0.5" in out and parameters(tmp_path / "out") <= parameters(model_folder)


@pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None and not os.environ.get("CI"), reason="torchao is not installed"
)
def test_prune_then_quantise(model_folder: Path, short_text: Path, tmp_path: Path) -> None:
    # torchao warns of itself when it is imported, so it gets a process of its own.
    words = ["prune_then_quantise.py", str(model_folder), str(tmp_path / "out"), str(short_text)]
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / words[0]), *words[1:]],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert 0 < float(ran.stdout.split()[-1]) < 0.1
    assert parameters(tmp_path / "out") < parameters(model_folder)


def test_calibrate_on_your_text(
    model_folder: Path, short_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    web, report = tmp_path / "web.jsonl", tmp_path / "report.txt"
    rows = [json.dumps({"text": calibration_prose(20 + number, 500)}) for number in range(60)]
    web.write_text("\n".join(rows))
    report.write_text(calibration_prose(90, 3000))
    run("calibrate_on_your_text.py", *map(str, (model_folder, tmp_path / "out", short_text, web, report)))
    assert "of notes, web" in capsys.readouterr().out
    assert parameters(tmp_path / "out") < parameters(model_folder)


@pytest.fixture(autouse=True)
def _same_threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
