"""The examples run as they stand, on a tiny model in a folder."""

from __future__ import annotations

import runpy
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


@pytest.fixture(autouse=True)
def _same_threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
