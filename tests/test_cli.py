"""The command line: end to end on tiny models, and every mistake told in one line."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import tiny_model
from texts import begun_tokenizer, calibration_make_tokenizer, calibration_prose
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, GPTJConfig, GPTJForCausalLM

from hf_adaprune import PruningConfig, PruningPlan, cli, cli_run, parallel, pipeline, saving, whole_files
from hf_adaprune.cli import main
from hf_adaprune.cli_arguments import build_config, command_line
from hf_adaprune.errors import ConfigError
from hf_adaprune.search import loop


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_model("llama", vocab_size=330).save_pretrained(folder)
    calibration_make_tokenizer(eos_token="<eos>").save_pretrained(folder)
    return folder


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with two disjoint texts."""
    (tmp_path / "calibration.txt").write_text(calibration_prose(1, 3000))
    (tmp_path / "report.txt").write_text(calibration_prose(2, 600))
    return tmp_path


def prune_words(dense: Path, work: Path, *more: str) -> list[str]:
    text = ["--calibration", str(work / "calibration.txt"), "--samples", "8", "--sequence-length", "32"]
    return ["prune", str(dense), "--output", str(work / "out"), *text, "--quiet", *more]


SEARCH = {"selection_tokens": 128, "first_tokens": 64, "final_tokens": 96, "sequence_length": 32, "initial": 4}


def search_words(dense: Path, work: Path, *more: str) -> list[str]:
    (work / "selection.txt").write_text(calibration_prose(3, 600))
    (work / "config.txt").write_text(json.dumps({"search": SEARCH}))
    words = prune_words(dense, work, "--selection", str(work / "selection.txt"), "--config", str(work / "config.txt"))
    return ["search", *words[1:], *more]


def left_in(work: Path) -> list[str]:
    return sorted(path.name for path in work.iterdir() if path.suffix != ".txt")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a refused command says."""
    capsys.readouterr()
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("hf-adaprune: ")]
    assert not out and "Traceback" not in err and len(lines) == 1
    return lines[0]


def test_prune_then_reload_show_and_evaluate(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(prune_words(dense, work, "--pruning-ratio", "0.3", "--report", str(work / "report.txt"), "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pruning_ratio"] == pytest.approx(0.3, abs=0.03)
    assert found["evaluation"]["report"]["pruned"]["value"] > 0
    assert left_in(work) == ["out"]
    model = AutoModelForCausalLM.from_pretrained(work / "out")
    assert sum(p.numel() for p in model.parameters()) == found["after"]["total"]

    assert main(["show", str(work / "out"), "--plot", str(work / "widths.svg")]) == 0
    shown = capsys.readouterr().out
    assert "pruning ratio 0.3" in shown and "recipe: default" in shown and "perplexity on report" in shown
    assert (work / "widths.svg").read_text().lstrip().startswith("<?xml")
    assert main(["show", str(work / "out" / "pruning_plan.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "plan"

    row = {"task": "t", "context": "the model", "choices": ["reads", "rain and light"]}
    rows = [{**row, "id": number, "label": number % 2} for number in range(4)]
    (work / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["evaluate", str(work / "out"), "--report", str(work / "report.txt"), "--tasks", str(work / "rows.jsonl")]
    size = ["--tokens", "96", "--sequence-length", "32", "--quiet"]
    assert main([*words, *size, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert set(results["rows"]) == {"acc", "acc_norm"} and results["report"]["perplexity"]["samples"] == 3
    assert main([*words, *size]) == 0
    assert "± standard error" in capsys.readouterr().out


def test_evaluate_says_what_windows_begin_with(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = begun_tokenizer()
    shutil.copytree(dense, work / "begun")
    tokenizer.save_pretrained(work / "begun")
    size = ["--report", str(work / "report.txt"), "--tokens", "96", "--sequence-length", "32", "--quiet"]
    for folder, first in ((work / "begun", tokenizer.bos_token_id), (dense, None)):
        assert main(["evaluate", str(folder), *size, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["begins_with"] == first and found["results"]["report"]["perplexity"]["tokens"] == 93
        assert main(["evaluate", str(folder), *size]) == 0
        assert ("windows of text begin with <s>" in capsys.readouterr().out) == (first is not None)


def test_texts_and_tasks_of_one_stem_are_all_measured(
    dense: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts, tasks = [], []
    for number, folder in enumerate(("wiki", "c4"), 1):
        (work / folder).mkdir()
        texts.append(work / folder / "test.txt")
        texts[-1].write_text(calibration_prose(10 + number, 600))
        tasks.append(work / folder / "test.jsonl")
        row = {"id": 0, "task": "t", "context": "the model", "choices": ["reads", "rain and light"], "label": 0}
        tasks[-1].write_text("\n".join([json.dumps(row)] * number))
    size = ["--tokens", "96", "--sequence-length", "32", "--quiet", "--json"]
    words = ["evaluate", str(dense), "--report", *map(str, texts), "--tasks", *map(str, tasks), *size]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)["results"]
    assert list(found) == ["test", "test-2", "test-3", "test-4"]
    assert found["test"]["perplexity"]["value"] != found["test-2"]["perplexity"]["value"]
    assert [found[name]["acc"]["samples"] for name in ("test-3", "test-4")] == [1, 2]
    # A text alone is measured as beside others, and `prune` reports both.
    assert main(["evaluate", str(dense), "--report", str(texts[1]), *size]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["test"] == found["test-2"]
    words = prune_words(dense, work, "--recipe", "magnitude", "--json", "--report", *map(str, texts))
    assert main(words) == 0
    reported = json.loads(capsys.readouterr().out)["evaluation"]
    assert list(reported) == ["test", "test-2"]
    assert reported["test"]["dense"]["value"] != reported["test-2"]["dense"]["value"]


def test_layer_by_layer(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in prune_words(dense, work, "--layer-by-layer") if word != "--quiet"]
    assert main([*words, "--dry-run", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)
    assert left_in(work) == []
    assert main([*words, "--json"]) == 0
    told = capsys.readouterr()
    assert "scored as the recipe flap does" in told.err
    assert f"{expected['peak_bytes'] / 2**20:,.0f} MiB of memory" in told.err
    found = json.loads(told.out)
    assert found["config"]["layer_by_layer"] and found["config"]["importance"]["metrics"] == {"wifv": 1.0}
    model = AutoModelForCausalLM.from_pretrained(work / "out")
    assert sum(p.numel() for p in model.parameters()) == found["after"]["total"] < found["before"]["total"]
    assert left_in(work) == ["out"]


def test_summary_says_what_went(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(prune_words(dense, work, "--recipe", "magnitude", "--target-parameters", "34k")) == 0
    out, err = capsys.readouterr()
    assert "recipe magnitude" in out and "MLP width" in out and "removed" in out
    assert "%|" not in err  # no progress bar with --quiet
    assert not logging.getLogger("hf_adaprune").handlers


def test_dry_run_writes_nothing(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(work.rglob("*"))
    assert main(prune_words(dense, work, "--dry-run", "--json")) == 0
    expected = json.loads(capsys.readouterr().out)
    assert expected["after"]["decoder"] < expected["before"]["decoder"] and expected["gram_bytes"] > 0
    assert main(["prune", str(dense), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "peak memory" in out and "disk for a restart, about" in out and "pruned and pruned.run" in out
    assert main(["prune", str(dense), "--dry-run", "--no-run-dir"]) == 0
    assert "peak memory" in (out := capsys.readouterr().out) and "disk" not in out
    assert sorted(work.rglob("*")) == before


def test_disk_is_stated_and_its_lack_told_before_the_work(
    dense: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "elsewhere").mkdir()
    words = [word for word in prune_words(dense, work, "--dry-run") if word != "--quiet"]
    found: dict[str, dict] = {}
    ways = {"beside": [], "nowhere": ["--no-run-dir"], "elsewhere": ["--run-dir", str(work / "elsewhere" / "run")]}

    def told(free: int) -> str:
        usage = namedtuple("usage", "total used free")
        with monkeypatch.context() as patch:
            patch.setattr(cli_run.shutil, "disk_usage", lambda path: usage(10**12, 0, free))
            for name, more in ways.items():
                assert main([*words, *more, "--json"]) == 0
                out, err = capsys.readouterr()
                found[name] = json.loads(out)
                assert ("MiB free" in err) is (free < 2**27 and name != "nowhere")
        return err

    assert told(10**9) == ""
    (room,) = found["beside"]["disks"]
    kept, output = found["beside"]["run_bytes"], found["beside"]["output_bytes"]
    assert room["holds"] == [str(work / "out"), str(work / "out.run")] and room["folder"] == str(work)
    assert room["needed_bytes"] == kept + output and room["free_bytes"] == 10**9
    assert kept > found["beside"]["gram_bytes"] and output == found["beside"]["after"]["bytes"]
    assert found["nowhere"]["disks"] == [] and found["nowhere"]["run_bytes"] == 0
    # Room for the output, which is refused without, and not for what is kept beside it.
    err = told(output + 2**26)
    assert re.search(r"has 64 MiB free, .*out and .*run will need about 6\d MiB there\. Free .*--run-dir", err), err
    assert left_in(work) == ["elsewhere"]


def test_two_disks_are_stated_one_by_one(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == work.stat().st_dev:
        pytest.skip("there is no second disk")
    words = prune_words(dense, work, "--dry-run", "--run-dir", str(other / "hf_adaprune" / "run"))
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [room["needed_bytes"] for room in found["disks"]] == [found["output_bytes"], found["run_bytes"]]
    assert [room["folder"] for room in found["disks"]] == [str(work), str(other)]
    assert main(words) == 0
    assert len(re.findall(r"^/.* MiB +[\d,]+ MiB$", capsys.readouterr().out, re.MULTILINE)) == 2


def test_what_an_earlier_run_left_is_there_already(
    dense: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def needed(*more: str) -> int:
        capsys.readouterr()
        assert main([*prune_words(dense, work), "--dry-run", "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        return found["disks"][0]["needed_bytes"] - found["output_bytes"]

    whole = needed()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "carry_out", interrupted)
        assert main(prune_words(dense, work)) == 130
    assert needed() < whole / 2 and needed("--fresh") == whole
    (work / "mine").mkdir()
    (work / "mine" / "thesis").write_bytes(bytes(whole))
    assert needed("--run-dir", str(work / "mine")) == whole


def test_options_override_the_file_and_the_file_the_recipe(tmp_path: Path) -> None:
    def config_of(*words: str) -> object:
        return build_config(command_line(cli.COMMANDS).parse_args(["prune", "m", "--output", "o", *words]))

    partial = tmp_path / "part.json"
    partial.write_text(json.dumps({"target_parameters": 10**6, "seed": 3, "calibration": {"samples": 9}}))
    words = ["--recipe", "flap", "--config", str(partial), "--seed", "4", "--units", "channel"]
    words += ["--calibration", "a.txt", "b.txt"]
    config = config_of(*words)
    assert (config.recipe_name, config.seed, config.units, config.calibration.samples) == ("flap", 4, ("channel",), 9)
    assert config.calibration.sources == ("a.txt", "b.txt") and config.target_parameters == 10**6
    assert config.importance.metrics == {"wifv": 1.0}
    assert config_of(*words, "--pruning-ratio", "0.4").target_parameters is None
    config.save_pretrained(tmp_path)
    whole = str(tmp_path / "pruning_config.json")
    assert config_of("--config", whole) == config
    partial.write_text(json.dumps({"recipe_name": "flap", "seed": 3}))
    assert config_of("--config", str(partial)).importance.metrics == {"wifv": 1.0}
    for file in (whole, str(partial)):
        with pytest.raises(ConfigError, match=r"`--recipe random` would change nothing.*Leave out one"):
            config_of("--recipe", "random", "--config", file)
    assert config_of() == config_of("--recipe", "default")
    assert config_of("--repair-schedule", "best") == config_of().with_changes(repair={"schedule": "best"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pruning-ratio", "-0.1"], r"should be in \[0, 1\).*Found -0.1"),
        (["--pruning-ratio", "20"], r"For 20 percent write 0.2"),
        (["--recipe", "best"], "`recipe` should be one of default"),
        (["--units", "neuron"], "`units` should be one of channel"),
        (["--repair-schedule", "twice"], "`repair.schedule` should be one of cached, sequential"),
        (["--recipe", "flap", "--repair-schedule", "best"], "'best' is of least squares.*Set `repair.method` to"),
        (["--target-parameters", "9G"], "above the model's"),
        (["--target-parameters", "1"], "at most|budget|reach"),
        (["--config", "nowhere.json"], "there is no config at nowhere.json"),
        (["--plan", "nowhere.json"], "there is no plan at nowhere.json"),
        (["--dtype", "int8"], "`--dtype` should be auto"),
        (["--report", "CALIBRATION"], "overlap"),
        (["--samples", "0"], "`calibration.samples` should be"),
        (["--calibration", "nowhere.txt"], "there is no file at nowhere.txt"),
    ],
)
def test_mistakes_are_told_in_one_line(
    words: list[str], message: str, dense: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(work / "calibration.txt") if word == "CALIBRATION" else word for word in words]
    line = refused(capsys, *prune_words(dense, work, *words))
    assert re.search(message, line), line
    assert left_in(work) == []


def test_text_too_short(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "calibration.txt").write_text("the model")
    assert "too" in refused(capsys, *prune_words(dense, work))
    assert left_in(work) == []


def test_output_is_checked_first(
    dense: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "`--output` is missing" in refused(capsys, "prune", str(dense))
    (work / "out").mkdir()
    (work / "out" / "mine").touch()
    assert "not empty" in refused(capsys, *prune_words(Path("no-model-is-read"), work))
    shutil.rmtree(work / "out")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(saving.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
        assert "0 MiB free" in refused(capsys, *prune_words(dense, work))

    def read_only(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(whole_files.tempfile, "TemporaryFile", read_only)
    assert "is not writable (Permission denied)" in refused(capsys, *prune_words(dense, work))
    assert left_in(work) == []


def test_models_that_cannot_be_pruned(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "could not be loaded" in refused(capsys, *prune_words(work / "nothing-here", work))
    quantised = work.parent / f"{work.name}-quantised"
    shutil.copytree(dense, quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    assert "quantised weights" in refused(capsys, *prune_words(quantised, work))
    small = {"vocab_size": 330, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForMaskedLM(BertConfig(**small)).save_pretrained(quantised.with_name("bert"))
    assert "no causal language model" in refused(capsys, *prune_words(quantised.with_name("bert"), work))
    gptj = GPTJConfig(vocab_size=330, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    GPTJForCausalLM(gptj).save_pretrained(quantised.with_name("gptj"))
    assert "No architecture for model_type 'gptj'" in refused(capsys, *prune_words(quantised.with_name("gptj"), work))
    assert left_in(work) == []


def interrupted(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_interrupted_before_anything_was_kept(
    dense: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "gather_texts", interrupted)
    assert main(prune_words(dense, work)) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert left_in(work) == []


@pytest.mark.parametrize(("room", "stop"), [(pipeline, "decide"), (saving, "check_round_trip")])
def test_the_same_command_goes_on(
    room: ModuleType,
    stop: str,
    dense: Path,
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = prune_words(dense, work, "--fresh")
    with monkeypatch.context() as patch:
        patch.setattr(room, stop, interrupted)
        assert main(words) == 130
    err = capsys.readouterr().err
    assert left_in(work) == ["out.run"] and f"is kept in {work / 'out.run'}" in err
    again = shlex.split(err.split("to go on: hf-adaprune ")[1].splitlines()[0])
    assert again == words[:-1]  # what was done is not thrown away by the command that goes on
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "gather_texts", lambda *args: pytest.fail("text was read again"))
        assert main([*again, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert left_in(work) == ["out"]
    (work / "out").rename(work / "first")
    assert main([*again, "--no-run-dir", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan_digest"] == found["plan_digest"]
    assert (work / "first" / "model.safetensors").read_bytes() == (work / "out" / "model.safetensors").read_bytes()


def test_a_changed_command_is_refused_until_it_begins_afresh(
    dense: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "decide", interrupted)
        assert main(prune_words(dense, work)) == 130
    line = refused(capsys, *prune_words(dense, work, "--pruning-ratio", "0.3"))
    assert "pruning_ratio 0.2 -> 0.3." in line and "--fresh" in line
    assert "Leave it out" in refused(capsys, *prune_words(dense, work, "--no-run-dir", "--fresh"))
    (work / "mine").mkdir()
    (work / "mine" / "thesis").touch()
    mine = ["--run-dir", str(work / "mine"), "--fresh"]
    assert "no folder of a run" in refused(capsys, *prune_words(dense, work, *mine))
    assert (work / "mine" / "thesis").exists()
    assert main(prune_words(dense, work, "--pruning-ratio", "0.3", "--fresh")) == 0
    assert left_in(work) == ["mine", "out"]


def test_a_model_without_tokenizer(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("qwen2").save_pretrained(work.parent / f"{work.name}-bare")
    bare = work.parent / f"{work.name}-bare"
    assert main(prune_words(bare, work, "--recipe", "magnitude", "--uniform")) == 0
    assert "the tokenizer of" in refused(capsys, "prune", str(bare), "--output", str(work / "other"), "--quiet")


def test_show_refuses_garbage(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is no plan" in refused(capsys, "show", str(work / "report.txt"))
    assert "it has no config.json" in refused(capsys, "show", str(work))
    assert "there is nothing at" in refused(capsys, "show", str(work / "nowhere"))


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_what_goes_at_the_end_holds_nothing_that_stays(
    dense: Path, work: Path, capsys: pytest.CaptureFixture[str], fresh: list[str]
) -> None:
    out, journal = work / "out", work / "out.run" / "journal.jsonl"
    for run_dir in (out, out / "run", work):
        said = refused(capsys, *prune_words(dense, work, "--run-dir", str(run_dir), *fresh))
        assert "--run-dir" in said and "--output" in said and not out.exists()
    recover = ["recover", str(dense), "--teacher", str(dense), "--output", str(out), "--run-dir", str(out), "--quiet"]
    assert "Name a place beside it" in refused(capsys, *recover, *fresh)
    said = refused(capsys, *search_words(dense, work, "--journal", str(journal), *fresh))
    assert "--journal" in said and "--run-dir" in said
    assert "--output" in refused(capsys, *search_words(dense, work, "--journal", str(out / "j.jsonl"), *fresh))
    assert left_in(work) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there_is_told(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(dense), "--report", str(work / "report.txt"), "--device", "cuda", "--quiet"]
    assert "could not be loaded" in refused(capsys, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--report", ""], "`calibration.report` should hold file paths.*Found ''"),
        (["--tokens", "0"], "`--tokens` should be a whole number of at least 2.*Found 0"),
        (["--tokens", "1"], "`--tokens` should be a whole number of at least 2.*Found 1"),
        (["--sequence-length", "0"], "`--sequence-length` should be a whole number of at least 2.*Found 0"),
        (["--sequence-length", "-5"], "`--sequence-length` should be a whole number of at least 2.*Found -5"),
    ],
    ids=str,
)
def test_sizes_and_texts_that_are_none_are_not_evaluated(
    words: list[str], message: str, dense: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.Loader, "model", lambda self: pytest.fail("weights were loaded"))
    line = refused(capsys, "evaluate", str(dense), "--quiet", *words)
    assert re.search(message, line), line


def test_tasks_by_name_are_lm_evals(
    dense: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "hf_adaprune[eval]" in refused(capsys, "evaluate", str(dense), "--tasks", "piqa", "--quiet")
    assert "no file of multiple-choice rows" in refused(capsys, "evaluate", str(dense), "--tasks", "x.jsonl", "--quiet")
    harness = ModuleType("lm_eval")
    harness.models = SimpleNamespace(huggingface=SimpleNamespace(HFLM=lambda pretrained, tokenizer: pretrained))
    values = {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1}
    values |= {"acc_norm,none": 0.6, "acc_norm_stderr,none": "N/A"}
    values |= {"exact_match,strict": 0.3, "exact_match_stderr,strict": 0.2, "exact_match,flexible": 0.4}
    answer = {"results": {"piqa": values}, "n-samples": {"piqa": {"effective": 7}}}
    harness.simple_evaluate = lambda model, tasks: answer
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    monkeypatch.setitem(sys.modules, "lm_eval.models", harness.models)
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", harness.models.huggingface)
    assert main(["evaluate", str(dense), "--tasks", "piqa", "--json", "--quiet"]) == 0
    piqa = json.loads(capsys.readouterr().out)["results"]["piqa"]
    assert piqa["acc"]["standard_error"] == 0.1 and piqa["acc"]["samples"] == 7
    assert piqa["acc_norm"]["standard_error"] is None
    assert [piqa[f"exact_match,{kind}"]["value"] for kind in ("strict", "flexible")] == [0.3, 0.4]
    assert set(piqa) == {"acc", "acc_norm", "exact_match,strict", "exact_match,flexible"}


def test_search_end_to_end(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = search_words(dense, work, "--trials", "4", "--strategy", "random", "--report", str(work / "report.txt"))
    assert main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    journal = work / "out.journal.jsonl"
    assert found["search"]["trials"] == 4 and found["journal"] == str(journal) and "trial" not in err
    assert left_in(work) == ["out", "out.journal.jsonl"] and not (work / "out" / journal.name).exists()
    model = AutoModelForCausalLM.from_pretrained(work / "out")
    assert sum(p.numel() for p in model.parameters()) == found["after"]["total"]
    assert json.loads((work / "out" / "pruning_config.json").read_text())["config"]["search"] is None

    assert "--resume" in refused(capsys, *words[:3], str(work / "other"), *words[4:], "--journal", str(journal))
    before = journal.read_text()
    again = [*words[:3], str(work / "again"), *words[4:], "--journal", str(journal), "--resume"]
    assert main(again) == 0
    text = capsys.readouterr().out
    assert journal.read_text() == before and f"hf-adaprune show {journal}" in text and "4 trials" in text
    plans = [PruningPlan.load(work / name / "pruning_plan.json").digest for name in ("out", "again")]
    assert plans == [found["plan_digest"]] * 2

    assert main(["show", str(journal), "--plot", str(work / "journal.png")]) == 0
    assert f"winner: trial {found['search']['winner']['trial']}" in capsys.readouterr().out
    assert (work / "journal.png").read_bytes().startswith(b"\x89PNG")
    assert main(["show", str(journal), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == 4


@pytest.mark.parametrize(
    ("more", "ratios"),
    [(["--ratios", "0.2", "0.3"], [0.2, 0.3]), (["--pareto", "parameters", "--space", '{"repair.damping": 0.02}'], [])],
)
def test_many_plans_in_a_folder(
    more: list[str], ratios: list[float], dense: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(search_words(dense, work, "--trials", "3", "--strategy", "random", *more)) == 0
    said = capsys.readouterr().out
    command = said.split("to carry one out: hf-adaprune ")[1].split()
    table = json.loads((work / "out" / "front.json").read_text())["points"]
    if not ratios:  # no plan of a front has won: they differ in size
        assert f"search: 3 trials, {len(table)} plans that no other beats in quality and size" in said
        assert " won" not in said
    assert table and len(list((work / "out").iterdir())) == 1 + 2 * len(table)
    for number, row in enumerate(table):
        config = PruningConfig.from_pretrained(work / "out" / row["config"])
        assert config.search is None and PruningPlan.load(work / "out" / row["plan"]).model_type == "llama"
        if ratios:
            assert config.pruning_ratio == ratios[number] == row["costs"]["asked"]
            assert row["costs"]["ratio"] == pytest.approx(ratios[number], abs=0.03)
        else:
            assert config.repair.damping == 0.02
    assert len(table) == len(ratios) or not ratios
    command[command.index("DIR")] = str(work / "pruned")
    assert main([*command, "--json", "--quiet"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert after["plan_digest"] == PruningPlan.load(work / "out" / table[-1]["plan"]).digest
    assert after["after"]["total"] == table[-1]["costs"]["parameters"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "weight=3"], "KIND one of ratio"),
        (["--budget", "parameters"], "KIND=VALUE"),
        (["--budget", "parameters=many"], "should be a number"),
        (["--budget", "ratio=0.1", "--budget", "ratio=0.2"], "given twice"),
        (["--budget", "parameters=1"], "but plans reach"),
        (["--ratios", "0.2", "0.99"], "reach|at most|budget"),
        (["--ratios", "0.2", "0.3", "--target-parameters", "1k"], "`search.ratios` says.*`target_parameters` would"),
        (["--pareto", "bytes", "--target-bytes", "1k"], "`search.pareto` says what goes.*`target_bytes` would fix"),
        (["--space", "nowhere.json"], "Cannot read nowhere.json"),
        (["--space", "{"], "is not JSON"),
        (["--space", '{"repair.dumping": 1}'], "repair.dumping"),
        (["--space", '{"protected_layers": [0, 99]}'], r"names layers \[99\], the model has"),
        (["--strategy", "annealing"], "`search.strategy` should be one of"),
        (["--strategy", "gp:3", "random:9"], "fit together"),
        (["--objective", "custom"], "needs a function"),
        (["--objective", "accuracy"], "needs `search.tasks`"),
        (["--tasks", "nowhere.jsonl"], "--objective accuracy"),
        (["--surrogate", "saas", "--pareto", "bytes"], "knows one objective"),
        (["--objective", "accuracy", "--tasks", "nowhere.jsonl"], "no file of multiple-choice rows"),
        (["--journal", "."], "`--journal` should be a file. Found the folder"),
        (["--warm-start", "nowhere.jsonl"], "there is no journal at nowhere"),
        (["--pareto", "beauty"], "`search.pareto` should be one of"),
    ],
)
def test_mistakes_in_a_search_cost_nothing(
    words: list[str],
    message: str,
    dense: Path,
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(self: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(cli.Loader, "model", loaded)
    line = refused(capsys, *search_words(dense, work, *words))
    assert re.search(message, line), line
    assert left_in(work) == []


def test_a_search_needs_selection_text(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = prune_words(dense, work)
    assert "`--selection` is missing" in refused(capsys, "search", *words[1:])
    (work / "config.txt").write_text(json.dumps({"search": SEARCH}))
    assert "hf-adaprune search" in refused(capsys, *words, "--config", str(work / "config.txt"))


def test_budgets_of_the_command_line(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prune", "m", "--budget", "parameters=110M", "--budget", "macs=2.5k", "--budget", "ratio=0.3"]
    config = build_config(command_line(cli.COMMANDS).parse_args(words))
    assert config.budgets == {"parameters": 110e6, "macs": 2500.0, "ratio": 0.3}
    assert main(prune_words(dense, work, "--budget", "parameters=34k", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["after"]["total"] <= 34_000


def test_a_search_can_be_estimated(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flops = []
    for trials in ("10", "20"):
        words = search_words(dense, work, "--trials", trials, "--budget", "decode_tokens_per_second=1", "--dry-run")
        assert main([*words, "--json"]) == 0
        flops.append(json.loads(capsys.readouterr().out)["search_flops"])
    assert 1.3 * flops[0] < flops[1] < 2 * flops[0]
    assert left_in(work) == []


def stopped_search(dense: Path, work: Path, *more: str) -> list[str]:
    """The words of a search that was interrupted when its trials were done."""
    words = search_words(dense, work, "--trials", "3", "--strategy", "random", *more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_run_finals", interrupted)
        assert main(words) == 130
    return words


def test_an_interrupted_search_goes_on(
    dense: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = stopped_search(dense, work)
    journal = work / "out.journal.jsonl"
    trials = journal.read_text()
    again = shlex.split(capsys.readouterr().err.split("to go on: hf-adaprune ")[1].splitlines()[0])
    assert left_in(work) == ["out.journal.jsonl", "out.run"] and again == words
    with monkeypatch.context() as patch:
        patch.setattr(saving, "check_round_trip", interrupted)
        patch.setattr(parallel, "collect_statistics", lambda *args, **options: pytest.fail("measured again"))
        assert main(words) == 130
    assert journal.read_text().startswith(trials) and left_in(work) == ["out.journal.jsonl", "out.run"]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    digest = json.loads(capsys.readouterr().out)["plan_digest"]
    assert left_in(work) == ["out", "out.journal.jsonl"]
    (work / "out").rename(work / "first")
    fresh = [*words, "--no-run-dir", "--journal", str(work / "other.jsonl"), "--json"]
    assert main(fresh) == 0
    assert json.loads(capsys.readouterr().out)["plan_digest"] == digest

    # A journal of a run that is over is no leftover of this one.
    more = ["--output", str(work / "new"), "--journal", str(journal), "--fresh"]
    assert "there is a journal at" in refused(capsys, *words, *more)
    assert journal.exists()


def test_a_search_begins_afresh(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = stopped_search(dense, work)
    assert "seed" in refused(capsys, *words, "--seed", "7")
    assert main([*words, "--seed", "7", "--fresh"]) == 0
    assert left_in(work) == ["out", "out.journal.jsonl"]


def test_an_interrupted_search_without_a_folder(dense: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = stopped_search(dense, work, "--no-run-dir")
    again = shlex.split(capsys.readouterr().err.split("to go on: hf-adaprune ")[1].splitlines()[0])
    assert left_in(work) == ["out.journal.jsonl"] and again == [*words, "--resume"]
    assert main(again) == 0


def test_only_the_first_process_saves_and_talks(
    dense: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main(prune_words(dense, work, "--recipe", "magnitude")) == 0
    assert main(["show", str(work / "nowhere")]) == 2
    assert capsys.readouterr() == ("", "") and left_in(work) == []


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, hf_adaprune.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "prune" in ran.stdout
    version = [sys.executable, "-m", "hf_adaprune", "--version"]
    shown = subprocess.run(version, capture_output=True, text=True, check=True)
    assert shown.stdout.startswith("hf_adaprune ")


def test_the_commands_of_the_readme_are_understood() -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    found = [shlex.split(part, comments=True) for line in lines for part in line.split("&&") if "hf-adaprune " in part]
    for words in found:
        assert command_line(cli.COMMANDS).parse_args(words[1:]).run in cli.COMMANDS.values()
    assert {words[1] for words in found} == set(cli.COMMANDS)


def test_a_model_of_few_positions_is_timed_with_a_shorter_prompt(
    dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(dense), "--latency", "--json", "--quiet"]) == 0  # it has 128
    speed = json.loads(capsys.readouterr().out)["speed"]
    assert speed["prefill_tokens_per_second"] > 0 and speed["decode_tokens_per_second"] > 0


def test_windows_longer_than_learned_positions_are_refused_before_text_is_read(
    dense: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("gpt2", vocab_size=330).save_pretrained(work / "gpt2")
    calibration_make_tokenizer(eos_token="<eos>").save_pretrained(work / "gpt2")
    words = ["evaluate", str(work / "gpt2"), "--quiet", "--report"]
    told = "`--sequence-length` asks for windows of {} tokens, and this gpt2 model has learned 128 positions. Lower it"
    assert told.format("1,024") in refused(capsys, *words, str(work / "none.txt"))
    assert told.format(129) in refused(capsys, *words, str(work / "none.txt"), "--sequence-length", "129")
    assert main([*words, str(work / "report.txt"), "--sequence-length", "128"]) == 0
    assert main(["evaluate", str(dense), *words[2:], str(work / "report.txt"), "--sequence-length", "136"]) == 0
