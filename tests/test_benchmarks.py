"""The benchmarks run in small, go on where they were, and README.md's tables are what the results say."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from texts import calibration_make_tokenizer, calibration_prose

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import machine, runner, tables  # noqa: E402
from benchmarks import setting as setting_module  # noqa: E402
from benchmarks.__main__ import chosen, main  # noqa: E402
from benchmarks.earlier import EARLIER  # noqa: E402
from benchmarks.experiments import (  # noqa: E402
    EVERYTHING,
    EXPERIMENTS,
    FULL,
    SMOKE,
    Case,
    Experiment,
    config_of,
    expand,
    search_of,
)
from benchmarks.groups import groups_of  # noqa: E402
from benchmarks.headline import headline  # noqa: E402
from benchmarks.plots import _curves, _lines  # noqa: E402
from benchmarks.results import FIELDS, Book, read_results  # noqa: E402
from benchmarks.runner import rows_of, run  # noqa: E402
from benchmarks.smoke import smoke_setting  # noqa: E402
from benchmarks.texts import Sources, held_out, in_folder, read  # noqa: E402
from hf_adaprune import RECIPES, TextSource  # noqa: E402
from hf_adaprune.choices import ChoiceRow, multiple_choice  # noqa: E402
from hf_adaprune.errors import CalibrationError  # noqa: E402

PEERS = importlib.util.find_spec("torch_pruning") is not None
CI = bool(os.environ.get("CI"))
needs_peers = pytest.mark.skipif(not PEERS and not CI, reason="torch-pruning is not installed")
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None and not CI, reason="lm-eval is not installed"
)


@pytest.fixture(scope="module")
def setting() -> Any:
    torch.set_num_threads(1)
    return smoke_setting()


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of `run all --smoke`."""
    folder = tmp_path_factory.mktemp("results")
    code = main(["run", "all", "--smoke", "--results", str(folder), "--threads", "1"])
    # Where a peer is not installed, its rows say so.
    assert code == int(not PEERS)
    return folder


def rows_in(folder: Path, name: str) -> list[dict[str, Any]]:
    return read_results(folder / f"{name}.json")["rows"]


# -- the smoke run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs_in_small(smoke: Path, name: str) -> None:
    data = read_results(smoke / f"{name}.json")
    assert data["rows"]
    for row in data["rows"]:
        assert set(FIELDS) <= set(row)
        if "Torch-Pruning" in row["label"] and not PEERS:
            assert row["status"] == "failed" and "hf_adaprune[benchmarks]" in row["reason"]
            continue
        assert row["status"] == "done", row.get("reason")
        assert row["seconds"]["all"] > 0 and row["peak_bytes"] > 0
        kinds = data["protocols"][row["protocol"]]["measures"]
        assert data["machines"][row["machine"]]["versions"]["torch"] == torch.__version__
        assert data["machines"][row["machine"]]["cpu"] and data["machines"][row["machine"]]["threads"] == 1
        for own in row.get("results", {}).values():
            values = [own[key]["value"] for key in own]
            assert values and all(value == value and value >= 0 for value in values)
        assert ("speed" in row) == ("speed" in kinds) and ("cost" in row) == ("cost" in kinds)
        assert row.get("results") or not {"perplexity", "tasks", "all tasks"} & set(kinds)
        # Whole layers and coarse multiples of a tiny model are large steps.
        if row["ratio"] and name != "speed" and row["label"] != "shortgpt":
            assert abs(row["pruning_ratio"] - row["ratio"]) < 0.02
    # Every line of the experiment is there.
    labels = {row["label"] for row in data["rows"]}
    if name not in ("cost", "computed_cost"):
        assert {case.label for case in EXPERIMENTS[name].cases} <= labels


def test_all_questions_are_more_than_the_first_ones(smoke: Path, setting: Any) -> None:
    counts = {
        name: {own[key]["samples"] for row in rows_in(smoke, name) if row["seed"] == 0 and row["status"] == "done"
               for task, own in row["results"].items() if task == "sums" for key in own}
        for name in ("quality", "questions")
    }  # fmt: skip
    whole, first = len(setting.texts.all_rows["sums"]), len(setting.texts.rows["sums"])
    assert counts == {"quality": {first}, "questions": {whole}} and whole > first


def test_the_matrix_has_every_domain_both_ways(smoke: Path) -> None:
    rows = [row for row in rows_in(smoke, "domains") if row["ratio"]]
    assert {row["label"] for row in rows} == {"all", "prose", "code"}
    assert all(set(row["results"]) == {"prose", "code"} for row in rows)


def test_costs_are_told_by_stop_and_beside_the_estimate(smoke: Path) -> None:
    (row,) = rows_in(smoke, "cost")
    assert {"statistics", "search", "repair", "save", "load"} <= set(row["seconds"])
    assert set(row["cost"]["peaks"]) <= set(row["seconds"])
    assert row["cost"]["trial_seconds"] > 0 and row["cost"]["estimate"]["peak_bytes"] > 0


def test_every_table_and_picture_is_made_from_results_alone(smoke: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in EXPERIMENTS:
        table = tables.made(name, smoke)
        assert table is not None and table.count("|") > 8
        body = [line for line in table.splitlines() if line.startswith("|")]
        for row in rows_in(smoke, name):
            assert not row["ratio"] or any(line.startswith(f"| {row['label']} |") for line in body)
    assert main(["plot", "--results", str(smoke), "--output", str(tmp_path)]) == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".png", ".png"]


# -- groups: what may stand in one table ------------------------------------------------------------------------------


def test_rows_of_other_models_texts_and_windows_are_not_averaged(tmp_path: Path) -> None:
    plain = {"model": {"name": "m", "weights": "w", "dtype": "float32"}, "measures": ["perplexity"],
             "report": {"text": [128, "x"]}, "report_window": 64}  # fmt: skip
    others = {
        "weights v": {**plain, "model": {**plain["model"], "weights": "v"}},
        "report ": {**plain, "report": {"text": [128, "y"]}},
        "report window 32": {**plain, "report_window": 32},
    }
    for said, other in others.items():
        rows = [
            {**quality_row(label, ratio, 0, value), "key": f"{label}{name}", "protocol": name, "machine": "m"}
            for name, start in (("one", 20.0), ("other", 40.0))
            for label, ratio, value in (("dense", 0.0, start), ("default", 0.2, start + 1))
        ]
        data = {"protocols": {"one": plain, "other": other}, "machines": {"m": {}}, "rows": rows}
        (tmp_path / "quality.json").write_text(json.dumps(data))
        first, second = groups_of(data)
        assert first.title != second.title and said in second.title and first.rows == tuple(rows[:2])
        table = tables.made("quality", tmp_path)
        assert table is not None and "±" not in table and "dense 20.00 |" in table and "dense 40.00 |" in table
        assert [_curves(group.rows, "text") for group in (first, second)] == [
            {"default": {0.0: 20.0, 0.2: 21.0}}, {"default": {0.0: 40.0, 0.2: 41.0}},
        ]  # fmt: skip
        # The same model from a folder of another name is the same model.
        copied = {**plain, "model": {**plain["model"], "name": "copy"}}
        (both,) = groups_of({**data, "protocols": {"one": plain, "other": copied}})
        assert both.title == "m, float32; text (128 tokens)." and len(both.rows) == 4


def test_rows_of_other_scales_and_calibration_texts_are_not_averaged(
    setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    searched = Case("search", 0.2, searches=(("repair.damping",),))
    quality = Experiment("quality", "", (*SMALL.cases, searched), seeds=(0, 1))
    monkeypatch.setitem(EXPERIMENTS, "quality", quality)

    def with_changes(**changes: Any) -> Any:
        own = smoke_setting()
        for name, value in changes.items():
            setattr(own, name, value)
        return own

    assert measured(setting, tmp_path, quality) == 5
    old = read_results(tmp_path / "quality.json")
    # An old file does not say what its rows read; they are one group, until a run asks for the same rows.
    del old["runs"]
    (tmp_path / "quality.json").write_text(json.dumps(old))
    assert [len(group.rows) for group in groups_of(old)] == [5]
    fewer = with_changes(scale=replace(SMOKE, samples=6))
    assert measured(fewer, tmp_path, quality, seeds=(0,)) == 2
    assert [len(group.rows) for group in groups_of(read_results(tmp_path / "quality.json"))] == [5, 3]
    # A part of the experiment names all of its rows.
    assert measured(setting, tmp_path, replace(quality, cases=SMALL.cases[:1]), seeds=(0,)) == 0
    assert measured(fewer, tmp_path, quality) == 2
    short = with_changes(texts=replace(setting.texts, calibration=setting.texts.calibration[:1]))
    assert measured(short, tmp_path, quality) == 4
    data = read_results(tmp_path / "quality.json")
    # The dense model reads no calibration text: it is a row of all three.
    groups = groups_of(data)
    assert [len(group.rows) for group in groups] == [5, 5, 5] and len(data["rows"]) == 13
    assert all("dense" in [row["label"] for row in group.rows] for group in groups)
    said = [re.findall(r"samples (\d), calibration (\w+)\.$", group.title)[0] for group in groups]
    assert sorted(samples for samples, _ in said) == ["6", "8", "8"] and len(set(said)) == 3
    assert len({text for _, text in said}) == 2
    table = tables.made("quality", tmp_path)
    assert table is not None and all(group.title in table for group in groups)
    assert main(["plot", "--results", str(tmp_path), "--output", str(tmp_path / "pictures")]) == 0
    assert len(list((tmp_path / "pictures").iterdir())) == 3
    # Fewer trials are other searches and the same rows without one; a run that only repeats another adds no table.
    trials = with_changes(scale=replace(SMOKE, trials=2))
    before = len(groups)
    assert measured(trials, tmp_path, replace(quality, cases=SMALL.cases)) == 0
    assert len(groups_of(read_results(tmp_path / "quality.json"))) == before
    assert measured(trials, tmp_path, quality) == 2
    last = groups_of(read_results(tmp_path / "quality.json"))[-1]
    assert len(last.rows) == 5 and "trials 2" in last.title
    assert headline(tmp_path, tmp_path) is not None


# -- rows: keys, continuing -------------------------------------------------------------------------------------------


SMALL = Experiment("small", "", (Case("dense", 0.0, "magnitude", seeds=(0,)), Case("random", 0.2, "random")))


def measured(setting: Any, folder: Path, experiment: Experiment = SMALL, **options: Any) -> int:
    book = Book(folder, experiment.name, options.pop("fresh", False))
    return run([(experiment, book)], setting, say=str, **options)[experiment.name]


def test_a_run_that_was_stopped_goes_on_with_what_is_missing(
    setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def killed(line: str) -> None:
        told.append(line)
        if len(told) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run([(SMALL, Book(tmp_path, "small"))], setting, say=killed)
    before = rows_in(tmp_path, "small")
    assert len(before) == 2 and measured(setting, tmp_path) == 2
    rows = rows_in(tmp_path, "small")
    assert rows[:2] == before and len({row["key"] for row in rows}) == len(rows) == 4
    assert measured(setting, tmp_path) == 0
    assert measured(setting, tmp_path, fresh=True) == 4 and len(rows_in(tmp_path, "small")) == 4
    # The same rows under another experiment's name are taken over, under its labels.
    other = Experiment("other", "", (Case("drawn", 0.2, "random"),), seeds=(1,))
    assert measured(setting, tmp_path, other) == 0
    (taken,) = rows_in(tmp_path, "other")
    assert taken["label"] == "drawn" and taken["results"] in [row["results"] for row in rows]


def test_what_experiments_share_is_measured_once(setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    collect = setting_module.collect_statistics
    monkeypatch.setattr(
        setting_module, "collect_statistics", lambda *own, **named: passes.append(1) or collect(*own, **named)
    )
    tasks = Experiment("tasks", "", (Case("flap", 0.2, "flap"),), ("perplexity", "tasks"), seeds=(0, 1))
    plain = Experiment(
        "plain", "", (Case("the same", 0.2, "flap"), Case("more", 0.3, "flap"), Case("default", 0.2)), seeds=(0, 1)
    )

    def both(folder: Path, fresh: bool = False) -> dict[str, int]:
        return run([(one, Book(folder, one.name, fresh)) for one in (plain, tasks)], setting, say=str)

    # One pass a seed for both experiments; what both ask for is measured with the tasks, for the first seed too.
    assert both(tmp_path) == {"plain": 5, "tasks": 1}
    assert len(passes) == 2
    assert both(tmp_path) == {"tasks": 0, "plain": 0}
    rows = {(row["label"], row["seed"]): row for row in rows_in(tmp_path, "plain")}
    for row in rows_in(tmp_path, "tasks"):
        own = rows["the same", row["seed"]]
        assert ("sums" in row["results"]) == (row["seed"] == 0)
        assert own["results"] == {name: value for name, value in row["results"].items() if name != "sums"}
        assert {other["protocol"] for other in rows.values()} == {own["protocol"]}
    # Alone it finds the rows of the other experiment; those that it measured itself do not spare the tasks.
    assert measured(setting, tmp_path, plain) == 0
    alone = tmp_path / "alone"
    assert measured(setting, alone, plain) == 6 and measured(setting, alone, tasks) == 1
    # Everything again is measured again, once.
    assert both(tmp_path, fresh=True) == {"plain": 5, "tasks": 1}


def test_searches_that_differ_by_the_schedule_of_the_repair_are_one(
    setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedules = {
        "cached": {},
        "walk": {"schedule": "sequential"},
        "half a walk": {"schedule": "sequential", "target_mix": 0.25},
    }
    cases = [
        Case(label, 0.3, changes={"repair": own}, searches=(("repair.damping", "allocation.attention_balance"),))
        for label, own in schedules.items()
    ]
    alone: dict[str, Any] = {}
    for case in cases:
        measured(setting, tmp_path / case.label, Experiment("one", "", (case,), seeds=(0,)))
        (alone[case.label],) = rows_in(tmp_path / case.label, "one")
    begun: list[int] = []
    find_best = setting_module.find_best
    monkeypatch.setattr(setting_module, "find_best", lambda *own, **named: begun.append(1) or find_best(*own, **named))
    assert measured(setting, tmp_path, Experiment("all", "", tuple(cases), seeds=(0,))) == 3
    assert len(begun) == 1
    together = {row["label"]: row for row in rows_in(tmp_path, "all")}
    for label, row in together.items():
        assert row["search"] == alone[label]["search"] and row["plan_digest"] == alone[label]["plan_digest"]
        assert row["results"] == alone[label]["results"] and row["repair"] == alone[label]["repair"]
        assert row["seconds"]["search"] == together["cached"]["seconds"]["search"] > 0
    assert len({str(row["results"]) for row in together.values()}) == 3


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in ("cost", "computed_cost")])
def test_rows_of_a_group_read_the_same_windows(setting: Any, name: str) -> None:
    groups: dict[str, set[str]] = {}
    for row in rows_of(EXPERIMENTS[name], setting):
        groups.setdefault(runner._group(EXPERIMENTS[name], row), set()).add(setting_module.pool_key(row.config))
    assert groups and all(len(keys) == 1 for keys in groups.values())


def test_processes_share_the_work(setting: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, list[str]] = {"first": [], "second": []}
    cases = (Case("dense", 0.0, "magnitude", seeds=(0,)), Case("random", 0.2, "random"))
    impossible = Case("too much", 0.9, changes={"protected_layers": tuple(range(8))})
    timed = Experiment("timed", "", (Case("fast", 0.2, "magnitude", seeds=(0,)),), ("perplexity", "speed"))

    def work() -> list[tuple[Experiment, Book]]:
        plain = Experiment("small", "", (*cases, impossible))
        return [(one, Book(tmp_path, one.name)) for one in (timed, plain)]

    class Enough(Exception):
        pass

    def enough(seconds: float) -> None:
        raise Enough  # what is left is the first one's, which waits for this call

    def hear(line: str) -> None:
        told["first"].append(line)
        if len(told["first"]) == 1:  # while the first one has its first pass
            with monkeypatch.context() as patch, pytest.raises(Enough):
                patch.setattr(runner.time, "sleep", enough)
                run(work(), setting, say=told["second"].append)

    assert run(work(), setting, say=hear)["timed"] == 1
    # Nothing twice (failures neither), nothing left out, each one's writes kept those of the other, and what is timed
    # came when nothing else was left.
    rows = [row for name in ("small", "timed") for row in rows_in(tmp_path, name)]
    assert len(rows) == sum(map(len, told.values())) == 1 + 3 + 3 + 1
    assert told["second"] and told["first"][-1].startswith("timed: fast") and "timed" not in str(told["second"])
    assert not {line.split(": ")[1] for line in told["first"]} & {line.split(": ")[1] for line in told["second"]}
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".json"]
    # The next run tries failures again.
    assert run(work(), setting, say=str) == {"timed": 0, "small": 3}


def test_a_failed_row_is_tried_again(setting: Any, tmp_path: Path) -> None:
    impossible = Experiment("impossible", "", (Case("too much", 0.9, changes={"protected_layers": tuple(range(8))}),))
    for _ in range(2):
        assert measured(setting, tmp_path, impossible, seeds=(0,)) == 1
        (row,) = rows_in(tmp_path, "impossible")
        assert row["status"] == "failed" and row["reason"]
    assert "failed" in (tables._quality(rows_in(tmp_path, "impossible")) + row["status"])


def test_keys_tell_configs_seeds_models_and_texts_apart(setting: Any) -> None:

    keys = {row.key for row in rows_of(SMALL, setting)}
    assert len(keys) == 4 and keys == {row.key for row in rows_of(SMALL, setting)}
    (row,) = rows_of(replace(SMALL, cases=SMALL.cases[1:]), setting, (0,))

    def other(**changes: Any) -> str:
        own = smoke_setting()
        for name, value in changes.items():
            setattr(own, name, value)
        return rows_of(replace(SMALL, cases=SMALL.cases[1:]), own, (0,))[0].key

    assert other() == other(name="a folder of another name") == row.key
    text = setting.texts
    shorter = TextSource("python-report", text.report[0].texts[1:])
    model = smoke_setting().model
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    found = {
        other(texts=replace(text, report=(shorter,))),
        other(texts=replace(text, calibration=(text.calibration[0],))),
        other(scale=replace(SMOKE, report_tokens=128)),
        other(model=model),
        row.key,
    }
    assert len(found) == 5
    # What is only computed reads no text, so another folder of them adds no line.
    own = smoke_setting()
    own.texts = replace(text, calibration=(text.calibration[0],), report=(shorter,))
    computed = [row.key for row in rows_of(EXPERIMENTS["computed_cost"], setting)]
    assert [row.key for row in rows_of(EXPERIMENTS["computed_cost"], own)] == computed
    assert len(set(computed)) == len(EXPERIMENTS["computed_cost"].cases)


def test_a_masked_row_is_what_pruning_gives(setting: Any, tmp_path: Path) -> None:
    """Shared statistics, masks and all: a row equals `prune` with its config."""
    import copy

    from hf_adaprune import prune
    from hf_adaprune.evaluation import perplexity

    experiment = Experiment("same", "", tuple(Case(name, 0.2, name) for name in ("flap", "default")), seeds=(1,))
    measured(setting, tmp_path, experiment)
    for case, row in zip(experiment.cases, rows_in(tmp_path, "same"), strict=True):
        config = config_of(case, 1, setting.scale, setting.texts)
        result = prune(copy.deepcopy(setting.model), setting.tokenizer, config)
        (blocks,) = setting.report(False).values()
        value = perplexity(result.model, blocks).value
        assert row["plan_digest"] == result.plan.digest and row["parameters"] == result.after.total
        assert row["results"]["python-report"]["perplexity"]["value"] == pytest.approx(value, rel=1e-5)


def test_the_writing_of_a_row_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = dict.fromkeys(FIELDS, 0) | {"key": "a", "status": "done"}
    book = Book(tmp_path, "one")
    book.add(row, {"p": 1}, {"m": 1})
    before = book.path.read_bytes()
    monkeypatch.setattr("benchmarks.results.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        book.add({**row, "key": "b"}, {"p": 1}, {"m": 1})
    assert book.path.read_bytes() == before
    with pytest.raises(ValueError, match="lacks key"):
        Book(tmp_path, "two").add({}, {}, {})


# -- experiments as data ----------------------------------------------------------------------------------------------


def test_cases_are_configs(setting: Any) -> None:
    """Every case of full size is a config, and its searches vary what they say and nothing else."""
    from hf_adaprune.search.space import default_space

    for experiment in EXPERIMENTS.values():
        for case in expand(experiment, 2):
            config = config_of(case, 0, FULL, setting.texts)
            assert config.pruning_ratio == case.ratio and config.seed == 0
            start = config
            for free in case.searches:
                asked = search_of(case, start, free, FULL, setting.texts)
                varied = {dimension.path for dimension in default_space(asked, ("a", "b"), (0.5, 0.5)).dimensions}
                assert varied == set(free) and set(free) <= set(EVERYTHING)
    ratios = {case.ratio for case in EXPERIMENTS["quality"].cases}
    assert ratios == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
    assert {case.recipe for case in EXPERIMENTS["quality"].cases} == set(RECIPES)


def test_chance_gets_three_seeds() -> None:
    for experiment in EXPERIMENTS.values():
        measured = {"perplexity"} == set(experiment.measures) - {"tasks"}
        chance = [case for case in experiment.cases if isinstance(case, Case) and case.recipe != "magnitude"]
        for case in chance if measured else []:
            assert len(case.seeds or experiment.seeds) >= 3, f"{experiment.name}: {case.label}"


def test_names_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(EXPERIMENTS)
    assert chosen(["cost", "all"]) == list(EXPERIMENTS.values())
    with pytest.raises(SystemExit, match="there is no experiment 'costs'"):
        chosen(["costs"])


# -- texts ------------------------------------------------------------------------------------------------------------


def test_a_folder_of_texts(tmp_path: Path, setting: Any) -> None:
    with pytest.raises(CalibrationError, match="no text in"):
        in_folder(tmp_path)
    for role in ("calibration", "selection", "report"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "a.txt").write_text(f"{role} " * 200)
    question = {"id": "1", "task": "t", "context": "a", "choices": ["b", "c"], "label": 0}
    (tmp_path / "report" / "asked.jsonl").write_text(json.dumps(question) + "\n" + json.dumps(question) + "\n")
    sources = in_folder(tmp_path)
    assert [len(getattr(sources, role)) for role in ("calibration", "selection", "report", "rows")] == [1, 1, 1, 1]
    texts = read(sources, setting.tokenizer, task_rows=1)
    assert texts.report[0].name == "a" and list(texts.rows) == ["asked"] and len(texts.rows["asked"]) == 1
    (tmp_path / "report" / "a.txt").write_text("calibration " * 200)
    with pytest.raises(CalibrationError, match="overlap"):
        read(sources, setting.tokenizer)


def test_files_of_one_stem_are_all_measured(tmp_path: Path, setting: Any) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(f"{folder} " * 200)
        question = {"id": folder, "task": "t", "context": "a", "choices": ["b", "c"], "label": 0}
        (tmp_path / folder / "x.jsonl").write_text(json.dumps(question) + "\n")
    (tmp_path / "piqa.txt").write_text("piqa " * 200)
    texts, rows = ([str(tmp_path / folder / f"x.{end}") for folder in ("one", "two")] for end in ("txt", "jsonl"))
    text = tuple(TextSource(name, [name * 300]) for name in ("calibration", "selection"))
    sources = Sources(text[:1], text[1:], (*texts, str(tmp_path / "piqa.txt")), ("piqa", *rows))
    found = read(sources, setting.tokenizer)
    # Results are kept by name, so no text, file of questions or task of lm-eval may have another's.
    assert [source.name for source in found.report] == ["x", "x-2", "piqa-2"] and found.tasks == ("piqa",)
    assert {name: own[0].id for name, own in found.rows.items()} == {"x-3": "one", "x-4": "two"}
    assert list(found.windows(setting.tokenizer, 64, 16)) == ["x", "x-2", "piqa-2"]


@pytest.mark.parametrize(
    "texts", [[f"page {number}" for number in range(23)], ["".join(f"line {number}\n" for number in range(500))]]
)
def test_domains_are_cut_in_two(texts: list[str]) -> None:
    kept, left = held_out(TextSource("web", texts))
    assert kept.texts and left.texts and not (set(kept.texts) & set(left.texts) and len(texts) > 1)
    if len(texts) > 1:
        assert sorted((*kept.texts, *left.texts)) == sorted(texts)


# -- peers and tasks --------------------------------------------------------------------------------------------------


@needs_peers
@pytest.mark.parametrize("heads", [True, False])
def test_torch_pruning_meets_our_count(setting: Any, heads: bool) -> None:
    from benchmarks.peers import loss_gradients, prune_with_torch_pruning
    from hf_adaprune.calibration import report_blocks

    blocks = report_blocks(setting.texts.calibration[0], setting.tokenizer, tokens=128, sequence_length=32)
    before = machine.weights_digest(setting.model)
    gradients = loss_gradients(setting.model, blocks.select(slice(0, 2)))
    for ratio in (0.2, 0.5):
        pruned, said = prune_with_torch_pruning(setting.model, blocks.input_ids[:1, :8], ratio, gradients, heads)
        assert said["pruning_ratio"] == pytest.approx(ratio, abs=0.01)
        assert said["parameters"] == sum(parameter.numel() for parameter in pruned.parameters())
        # Six query heads in two groups: one of three goes, or none.
        assert said["query_heads"] == (4 if heads else 6)
        assert not any(parameter.requires_grad for parameter in pruned.parameters())
    assert machine.weights_digest(setting.model) == before and setting.model.config._attn_implementation == "sdpa"


@needs_harness
@pytest.mark.filterwarnings("ignore")  # the harness' own dependencies warn when they are imported
def test_the_harness_scores_local_rows_as_we_do(setting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.tasks import run_rows

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    draw, words = random.Random(0), ["def", "class", "import", "self", "return", "value", "of", "the", "and", "is"]
    rows = [
        ChoiceRow(
            str(number), "t", " ".join(draw.choices(words, k=6)),
            tuple(" ".join(draw.choices(words, k=draw.randrange(1, 5))) for _ in range(3 + number % 2)),
            draw.randrange(3),
        )
        for number in range(12)
    ]  # fmt: skip
    ours, theirs = (
        multiple_choice(setting.model, setting.tokenizer, rows),
        run_rows(setting.model, setting.tokenizer, rows),
    )
    for name in ("acc", "acc_norm"):
        assert theirs[name].value == ours[name].value and theirs[name].samples == 12
        assert theirs[name].standard_error == pytest.approx(ours[name].standard_error)
    assert 0 < ours["acc_norm"].value < 1


# -- documents --------------------------------------------------------------------------------------------------------


def test_the_tables_of_the_documents_are_what_the_results_say() -> None:
    shown = []
    for path in (tables.README, tables.RESULTS):
        text = path.read_text(encoding="utf-8")
        shown += [match[2] for match in tables.MARKED.finditer(text)]
        assert text.count("<!-- table:") == len(tables.MARKED.findall(text)) == text.count("<!-- /table -->")
        assert tables.stale(text, machine.HERE / "results" / "experiments") == []
    assert set(shown) >= set(EARLIER) and len(shown) == len(set(shown))


def test_a_stale_table_is_found_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tables.RESULTS.read_text(encoding="utf-8")
    other = tmp_path / "RESULTS.md"
    monkeypatch.setattr(tables, "RESULTS", other)
    readme = tables.README.read_text(encoding="utf-8")
    monkeypatch.setattr(tables, "README", tmp_path / "README.md")
    tables.README.write_text(readme)
    other.write_text(text.replace("| 24.92 | 30.61 |", "| 24.92 | 29.61 |"))
    assert other.read_text() != text and main(["table", "--check"]) == 1
    assert "recipes is stale in RESULTS.md" in capsys.readouterr().out
    assert main(["table", "--write"]) == 0 and other.read_text() == text and main(["table", "--check"]) == 0
    emptied = re.sub(r"(<!-- table:recipes -->\n).*?\n(<!-- /table -->)", r"\1\2", text, flags=re.DOTALL)
    other.write_text(emptied)  # an empty table takes nothing of what follows it
    assert main(["table", "--write"]) == 0 and other.read_text() == text
    other.write_text("<!-- table:repair -->\n\n<!-- /table -->")
    with pytest.raises(SystemExit, match=r"no results for the table '(headline|repair)'"):
        main(["table", "--write", "--results", str(tmp_path)])
    assert tables.README.read_text(encoding="utf-8") == readme
    with pytest.raises(SystemExit, match="no table 'qualities'"):
        tables.made("qualities", tmp_path)


def quality_row(label: str, ratio: float, seed: int, value: float, accuracy: float | None = None) -> dict[str, Any]:
    results: dict[str, Any] = {"text": {"perplexity": {"value": value}}}
    if accuracy is not None:
        results |= {name: {"acc": {"value": 0.0}, "acc_norm": {"value": accuracy}} for name in ("a", "b")}
    name = "tasks" if accuracy is not None else "plain"
    return {"label": label, "ratio": ratio, "seed": seed, "status": "done", "results": results, "protocol": name}


def test_the_headline_is_of_means_over_seeds_with_recovered_models_of_the_same_protocol(tmp_path: Path) -> None:
    assert headline(tmp_path, tmp_path) is None
    rows = [
        quality_row("dense", 0.0, 0, 20.0, 0.6),
        quality_row("default", 0.2, 0, 29.0, 0.5),
        quality_row("default", 0.2, 1, 31.0),
        quality_row("default", 0.5, 0, 50.0, 0.4),
        quality_row("flap", 0.2, 0, 40.0, 0.45),
        quality_row("flap", 0.5, 0, 5000.0, 0.3),
        quality_row("slow", 0.5, 0, 90.0, 0.3),
        quality_row("flap", 0.3, 0, 1.0, 0.3),
        {"label": "peer", "ratio": 0.2, "seed": 0, "status": "failed", "protocol": "plain"},
        {**quality_row("default", 0.2, 0, 1.0, 1.0), "protocol": "other"},
    ]
    plain = {"model": {"name": "m", "weights": "w"}, "report": {"text": [128, "x"]}, "report_window": 64}
    asked = {**plain, "rows": {"a": [9, "y"], "b": [9, "z"]}}
    said = {"plain": plain, "tasks": asked, "other": {**plain, "report": {"text": [64, "x"]}}}
    (tmp_path / "quality.json").write_text(json.dumps({"protocols": said, "machines": {}, "rows": rows}))
    trained = {"run": "once:0.2:kl:1", "tokens": 1024, "after": {"text": 24.0, "a": [0.5, 0.1], "b": [0.6, 0.1]}}
    own = {"weights": "w", **{name: asked[name] for name in ("report", "report_window", "rows")}}
    recovered = {"protocol": {"measured_on": own}, "rows": [trained]}
    (tmp_path / "recovered.json").write_text(json.dumps(recovered))
    expected = (
        "|  | text, 20% removed | tasks, 20% removed | text, 50% removed | tasks, 50% removed |\n"
        "|---|---|---|---|---|\n"
        "| dense | 20.00 | 0.600 | 20.00 | 0.600 |\n"
        "| default | **30.00** (1.50x) | **0.500** | **50.00** (2.50x) | **0.400** |\n"
        "| flap | 40.00 (2.00x) | 0.450 | 5,000 | 0.300 |\n"
        "| slow | - | - | 90.00 (4.50x) | 0.300 |\n"
        "| cut, then recovered (1,024 tokens) | **24.00** (1.20x) | **0.550** | - | - |"
    )
    assert headline(tmp_path, tmp_path) == headline(tmp_path, tmp_path, strict=True) == expected
    # Beside another model, other texts or other questions they say nothing; documents must not lose them unnoticed.
    without = expected[: expected.rindex("\n")]
    others = ({"weights": "v"}, {"report": {"text": [128, "v"]}}, {"report_window": 32}, {"rows": {"a": [9, "y"]}})
    for changes in (*others, None):
        changed = {"protocol": {} if changes is None else {"measured_on": own | changes}, "rows": [trained]}
        (tmp_path / "recovered.json").write_text(json.dumps(changed))
        assert headline(tmp_path, tmp_path) == without
        with pytest.raises(SystemExit, match="another model, other tokens or other questions"):
            headline(tmp_path, tmp_path, strict=True)
    (tmp_path / "recovered.json").unlink()
    assert headline(tmp_path, tmp_path, strict=True) == without


def test_tables_of_other_results_hold_nothing_of_this_repository(
    smoke: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["table", "--results", str(smoke)]) == 0
    shown = capsys.readouterr().out
    assert "recovered" not in shown and "\nquality\n" in shown and not [name for name in EARLIER if name in shown]
    assert main(["table", "--results", str(smoke), "recovery"]) == 0
    # Where they are this repository's own, recovered models of other texts are an error of its documents.
    monkeypatch.setattr(tables, "PLACE", smoke)
    for path in ("README", "RESULTS"):
        monkeypatch.setattr(tables, path, tmp_path / "README.md")
    tables.README.write_text("<!-- table:headline -->\n<!-- /table -->")
    for words in ("--check", "--write"):
        with pytest.raises(SystemExit, match=r"recovered\.json was measured on another model"):
            main(["table", words, "--results", str(smoke)])


def test_a_line_breaks_where_nothing_was_measured() -> None:
    rows = [
        quality_row("dense", 0.0, 0, 20.0), quality_row("default", 0.2, 0, 30.0), quality_row("default", 0.5, 0, 50.0),
        quality_row("slow", 0.5, 0, 40.0), quality_row("slow", 0.5, 1, 44.0),
    ]  # fmt: skip
    curves = _curves(rows, "text")
    assert curves == {"default": {0.0: 20.0, 0.2: 30.0, 0.5: 50.0}, "slow": {0.0: 20.0, 0.5: 42.0}}
    ratios, lines = _lines(curves)
    assert ratios == [0.0, 0.2, 0.5] and list(lines) == ["slow", "default"]
    assert lines["default"] == [20.0, 30.0, 50.0]
    assert lines["slow"] == pytest.approx([20.0, math.nan, 42.0], nan_ok=True)


def script(name: str, monkeypatch: pytest.MonkeyPatch, place: Path) -> Any:
    """A script beside `machine.py`, whose results go elsewhere."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (place / "results").mkdir()
    monkeypatch.setattr(module, "HERE", place)
    return module


@pytest.mark.parametrize("name", ["predictor", "search"])
def test_scripts_measure_every_file_of_one_stem(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama", vocab_size=384).save_pretrained(tmp_path / "model")
    calibration_make_tokenizer(eos_token="</s>").save_pretrained(tmp_path / "model")
    roles: dict[str, list[str]] = {}
    for number, role in enumerate(("calibration", "selection", "report")):
        for part in range(2):
            folder = tmp_path / role / str(part)
            folder.mkdir(parents=True)
            (folder / "test.txt").write_text(calibration_prose(10 * number + part, 3000))
            roles.setdefault(role, []).append(str(folder / "test.txt"))
    row = {"id": 0, "task": "t", "context": "the model", "choices": ["reads", "rain and light"], "label": 0}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    module = script(name, monkeypatch, tmp_path)
    words = [str(tmp_path / "model"), "--journals", str(tmp_path / "journals"), "--trials", "2", "--samples", "8"]
    words += [word for role, files in roles.items() for word in (f"--{role}", *files)] + ["--tokens", "64", "--seeds"]
    commands = {"predictor": [[]], "search": [["run"], ["report"]]}[name]
    more = {"predictor": [], "search": ["--strategies", "random", "--rows", str(tmp_path / "test.jsonl")]}[name]
    for command in commands:
        monkeypatch.setattr(sys, "argv", [name, *command, *words, "0", *more])
        module.main()
    found = json.loads((tmp_path / "results" / f"{name}.json").read_text())["rows"][-1]
    if name == "predictor":
        found = found["uniform"]
    texts = [found["test"], found["test-2"]]
    assert texts[0] != texts[1] and all(isinstance(value, float) for value in texts)
    assert name == "predictor" or found["test-3"][0] in (0.0, 1.0)
