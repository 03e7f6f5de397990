"""The model card: only what was measured, by names that may be published, in a form that the Hub takes."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model
from fakehub import card_errors
from huggingface_hub import ModelCard
from plans import plan_of_kind
from test_hub import folder, hub, pruned, saved  # noqa: F401
from test_pipeline import config_of, tiny_tokenizer
from test_pipeline import tiny_model as model_with_vocabulary

from hf_adaprune import model_card, prune, push_to_hub
from hf_adaprune.description import describe_checkpoint
from hf_adaprune.errors import CheckpointError
from hf_adaprune.public import base_model_name, find_token, is_repo_id, linked_name, public, without_tokens
from hf_adaprune.publication import check_checkpoint
from hf_adaprune.sites import find_sites
from hf_adaprune.surgery import apply_plan

# See test_hub.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def record_of(folder: Path) -> dict[str, Any]:  # noqa: F811
    return json.loads((folder / "pruning_config.json").read_text())


def change(folder: Path, **entries: Any) -> None:  # noqa: F811
    (folder / "pruning_config.json").write_text(json.dumps(record_of(folder) | entries))


def test_the_card_says_what_was_measured(saved: Path) -> None:  # noqa: F811
    card = model_card(saved, "me/tiny", base_model="big/dense", license="apache-2.0", picture=True)
    text = str(card)
    assert card_errors(text) == []
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert {"hf-adaprune", "pruned"} <= set(data.tags)
    run = record_of(saved)
    measured = run["evaluation"]["report words"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("perplexity", measured["pruned"]["value"])
    assert (result.dataset_name, result.metric_args["sequence_length"]) == ("report words", 32)
    for number in (run["before"]["total"], run["after"]["total"], run["before"]["decoder"], run["after"]["decoder"]):
        assert f"{number:,}" in text
    assert f"{measured['dense']['value']:.4g} ±" in text and f"{measured['pruned']['value']:.4g} ±" in text
    assert f"{run['calibration']['tokens']:,} tokens" in text
    assert "from words, other words" in text
    assert "pruned_widths.png" in text and "[big/dense](https://huggingface.co/big/dense)" in text
    assert "Speed was not measured" in text
    assert "import hf_adaprune  #" in text


def test_nothing_is_said_of_what_was_not_measured(tmp_path: Path) -> None:
    result = prune(model_with_vocabulary("gpt2"), None, config_of("magnitude", uniform=True))
    text = str(model_card(result.save_pretrained(tmp_path / "out"), "me/tiny"))
    assert card_errors(text) == []
    assert "nothing was measured" in text and "model-index" not in text and "perplexity" not in text
    assert "license" not in text and "base_model" not in text
    assert "calibrated" not in text
    assert "import hf_adaprune" not in text and "All layers are equally wide" in text


@pytest.mark.parametrize("name", ["recovered", "pruned"])  # the second one in records of earlier versions
def test_a_recovered_model_is_called_so(folder: Path, name: str) -> None:  # noqa: F811
    run = record_of(folder)
    pair = run["evaluation"]["report words"]
    found = {"dense": pair["dense"], "before": pair["pruned"], name: {**pair["pruned"], "value": 77.25}}
    recovery = {"tokens": 1000, "minutes": 1.0, "config": {"alpha": 1.0}, "evaluation_length": 24}
    change(folder, evaluation={"report words": found}, recovery=recovery)
    text = str(model_card(folder, "me/tiny"))
    assert card_errors(text) == []
    (result,) = ModelCard(text).data.eval_results
    assert (result.metric_value, result.metric_args["sequence_length"]) == (77.25, 24)
    assert "| dense | before recovery | recovered | recovered / dense | tokens |" in text
    assert f"{pair['pruned']['value']:.4g} ±" in text and "windows of at most 24 tokens" in text
    assert "Dense and recovered model" in text
    assert " 77.25 recovered" in str(describe_checkpoint(folder))


def test_a_later_evaluation_joins(folder: Path) -> None:  # noqa: F811
    value = {"name": "accuracy", "value": 0.5, "standard_error": 0.1, "tokens": 0, "samples": 40}
    bad = {"name": "perplexity", "value": float("inf"), "standard_error": None, "tokens": 9, "samples": 1}
    found = {"rows": {"accuracy": value}, "x": {"perplexity": bad}}
    speed = {"decode_tokens_per_second": 24.25}
    data = {"model": "/somewhere/private/tiny", "results": found, "speed": speed}
    (folder / "evaluation.json").write_text(json.dumps(data))
    text = str(model_card(folder, "me/tiny"))
    assert card_errors(text) == []
    metrics = {r.metric_type: r.metric_value for r in ModelCard(text).data.eval_results}
    assert metrics["accuracy"] == 0.5 and len(metrics) == 2
    assert "accuracy, rows | 0.5 ± 0.1 | 40" in text and "24.2" in text and "Speed was not measured" not in text


def test_a_search_is_told_with_its_cost(folder: Path) -> None:  # noqa: F811
    search = {
        "trials": 60,
        "strategy": ["gp"],
        "objective": "kl",
        "winner": {"trial": 41, "strategy": "gp", "point": {}},
    }
    change(folder, search=search, seconds={"statistics": 122.0, "search": 472.0})
    text = str(model_card(folder, "me/tiny"))
    assert "search: 60 trials (gp) in 7.9 minutes for the lowest kl on selection text; trial 41 won" in text
    assert "9.9 minutes" in text
    for objective, said in (("accuracy", "the highest accuracy on"), ("custom", "the lowest value of a function;")):
        change(folder, search={**search, "objective": objective})
        assert f"60 trials (gp) in 7.9 minutes for {said}" in str(model_card(folder, "me/tiny"))


def test_names_of_files_lose_their_folders(folder: Path) -> None:  # noqa: F811
    run = record_of(folder)
    run["evaluation"] = {"/home/somebody/texts/wiki.txt": run["evaluation"]["report words"]}
    run["calibration"]["domains"] = ["~/notes/private.jsonl", "C:\\Users\\somebody\\mine.txt"]
    change(folder, **run, base_model="/home/somebody/models/dense")
    text = str(model_card(folder, "me/tiny"))
    assert not re.search(r"somebody|/home|notes|Users|\\", text)
    assert {"wiki.txt", "private.jsonl", "mine.txt"} <= set(re.findall(r"[\w.]+", text))


def test_without_matplotlib_the_card_says_so(
    hub: Any, saved: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    real = builtins.__import__

    def none(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", none)
    push_to_hub(saved, "me/tiny")
    files = hub.repositories["me/tiny"].files
    assert "pruned_widths.png" not in files
    assert b"No picture: matplotlib was not installed" in files["README.md"]


@pytest.mark.parametrize(
    "entries",
    [
        {"before": None},
        {"before": {"decoder": 0, "total": 0, "bytes": 0}},
        {"pruning_ratio": "a lot"},
        {"evaluation": {"x": 3}},
        {"config": {}},
        {"config": 3},
        {"calibration": {"tokens": "many"}},
        {"plan_digest": None, "search": {"trials": []}},
    ],
    ids=str,
)
def test_a_record_that_is_none_is_refused(folder: Path, entries: dict) -> None:  # noqa: F811
    change(folder, **entries)
    with pytest.raises(CheckpointError):
        model_card(folder, "me/tiny")


def test_markup_in_names_means_nothing(folder: Path) -> None:  # noqa: F811
    run = record_of(folder)
    name = "<script>alert(1)</script> | [x](http://evil) `\n---\nlicense: evil"
    run["evaluation"] = {name: run["evaluation"]["report words"]}
    run["calibration"]["domains"] = [name, name]
    change(folder, **run)
    text = str(model_card(folder, "me/tiny"))
    body = text.split("\n---\n", 1)[1]
    assert "<script>" not in body and "](http://evil" not in body and "\n---\nlicense" not in text
    assert ModelCard(text).data.license is None


def test_widths_of_more_than_ten_layers_are_read_right(tmp_path: Path) -> None:
    sites = find_sites(tiny_model("llama", num_hidden_layers=12))
    plan = plan_of_kind(sites, "channel")
    assert plan is not None
    apply_plan(sites, plan)
    sites.model.save_pretrained(tmp_path)
    rows = describe_checkpoint(tmp_path).layers
    assert [row.channels and row.channels[0] for row in rows] == [24 + layer for layer in range(12)]


@pytest.mark.parametrize("kind", ["channel", "kv_group", "attention", "mlp", "layer"])
def test_every_family_passes_the_check_of_its_own_folder(family: str, kind: str, tmp_path: Path) -> None:
    sites = find_sites(model_with_vocabulary(family))
    plan = plan_of_kind(sites, kind)
    if plan is None:
        pytest.skip(f"no {kind} to remove")
    done = prune(sites.model, None, config_of("magnitude"), plan=plan)
    folder = done.save_pretrained(tmp_path / "out", check=False)  # noqa: F811
    assert check_checkpoint(folder).parameters
    assert card_errors(str(model_card(folder, "me/tiny"))) == []


def test_the_names_of_base_models(tmp_path: Path) -> None:
    class Of:
        def __init__(self, name: str) -> None:
            self.config = type("Config", (), {"_name_or_path": name})()

    cache = "/x/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/0123456789abcdef"
    (tmp_path / "mine").mkdir()
    names = {
        "HuggingFaceTB/SmolLM2-135M": "HuggingFaceTB/SmolLM2-135M",
        cache: "HuggingFaceTB/SmolLM2-135M",
        str(tmp_path / "mine"): "mine",
        "./models/mine": "mine",
        "C:\\models\\mine": "mine",
        "~": "",
        "": "",
    }
    assert {name: base_model_name(Of(name)) for name in names} == names
    assert base_model_name(None) == ""
    linked = ("HuggingFaceTB/SmolLM2-135M", cache)
    assert {name: linked_name(name) for name in names} == {n: names[n] if n in linked else "" for n in names}
    for other in ("gpt2", "../secrets", "/srv/private/x", str(tmp_path / "mine"), None, 3, {"a": 1}, ["a/b"]):
        assert linked_name(other) == ""
    assert is_repo_id("gpt2") and is_repo_id("a/b-1.0") and not is_repo_id("a/b/c") and not is_repo_id("../b")


def test_what_may_be_published() -> None:
    home = str(Path.home())
    data = {
        "sources": ["allenai/c4:en:train", "python", "self", "texts/wiki.txt", "/a b/c d/e.jsonl", "..\\x\\y.txt"],
        "/a/words.txt": 1,
        "/b/words.txt": 2,
        "error": f"there is no text at /srv/private/x.txt, see {home}/y",
        "number": 1.5,
        "nothing": None,
        "ratio": "1/2 of model.layers",
        "url": "https://example.org/a/b",
    }
    assert public(data) == {
        "sources": ["allenai/c4:en:train", "python", "self", "wiki.txt", "e.jsonl", "y.txt"],
        "words.txt": 1,
        "words.txt (2)": 2,
        "error": "there is no text at x.txt, see y",
        "number": 1.5,
        "nothing": None,
        "ratio": "1/2 of model.layers",
        "url": "https://example.org/a/b",
    }
    token = "hf_" + "a1B2" * 8
    assert find_token(f"x={token}") and not find_token("hf_config") and find_token("my secret", "secret")
    assert without_tokens(f"Bearer {token}, secret", "secret") == "Bearer <token>, <token>"


def test_a_result_knows_its_base_model(tmp_path: Path) -> None:
    model = model_with_vocabulary("llama")
    model.config._name_or_path = str(tmp_path)
    result = prune(model, tiny_tokenizer(), config_of("magnitude"))
    assert result.to_dict()["base_model"] == tmp_path.name
    assert pruned().to_dict().get("base_model") is None
    assert set(model.model_tags) == {"hf-adaprune", "pruned"}
