"""Publishing: one commit with everything, twice the same is once, a broken upload is none, and no token anywhere."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers.utils.hub
from conftest import logits_of, tokens
from fakehub import FakeHub, card_errors, running
from test_pipeline import TEXT, config_of, tiny_model, tiny_tokenizer
from texts import calibration_prose
from transformers import AutoModelForCausalLM

from hf_adaprune import PruningPlan, PruningResult, RecoveryConfig, TextSource, prune, push_to_hub, recover
from hf_adaprune.cli import main
from hf_adaprune.errors import CheckpointError, HubError, PlanError
from hf_adaprune.names import rename
from hf_adaprune.search.journal import Journal

# huggingface_hub 2.4 sends large files in a way that its own HTTP library calls deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning", "ignore:.*is_gradient_checkpointing:FutureWarning"
)
TOKEN = "hf_RecognisableTokenThatMustNotLeak42"
REPORT = TextSource("report words", [calibration_prose(seed, 60) for seed in range(900, 930)])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    """A Hub that everything in this process talks to, with a token that is easy to recognise."""
    with running() as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.url)
        api = huggingface_hub.HfApi(endpoint=server.url)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", api, raising=False)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server
        assert TOKEN.encode() not in server.sent()


@functools.cache
def pruned(uniform: bool = False) -> PruningResult:
    """One result for many tests, measured on report text; nobody changes it."""
    texts = {"sources": (TEXT, TextSource("other words", [calibration_prose(s, 60) for s in range(500, 560)]))}
    texts |= {"report": REPORT, "evaluation_tokens": 256, "evaluation_length": 32}
    return prune(tiny_model("llama"), tiny_tokenizer(), config_of(uniform=uniform, calibration=texts))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pruned().save_pretrained(tmp_path_factory.mktemp("saved") / "tiny-pruned")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint, for tests that change it."""
    return Path(shutil.copytree(saved, tmp_path / "tiny-pruned"))


# Loads by id in all three ways; the package is imported last.
LOADS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.set_verbosity_error()
torch.set_num_threads(1)
known = torch.load(sys.argv[1])
def same(name, which, **options):
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(name, **options)
        return torch.equal(model(input_ids=known["ids"], use_cache=False).logits, known[which])
print("uniform", same("me/uniform", "uniform"))
try:
    AutoModelForCausalLM.from_pretrained("me/adaptive")
except Exception as error:
    print("refused", type(error).__name__)
print("remote", same("me/remote", "adaptive", trust_remote_code=True))
assert not [name for name in sys.modules if name.startswith("hf_adaprune")]
import hf_adaprune
print("plugin", same("me/adaptive", "adaptive"), same("me/by_model", "adaptive"))
print("both", same("me/remote", "adaptive", trust_remote_code=True), same("me/remote", "adaptive"))
print("tokens", AutoTokenizer.from_pretrained("me/adaptive").encode("a river"))
"""


def test_what_is_pushed_loads_in_another_process_in_three_ways(hub: FakeHub, saved: Path, tmp_path: Path) -> None:
    uniform, adaptive = pruned(uniform=True), pruned()
    uniform.push_to_hub("uniform")
    push_to_hub(saved, "me/adaptive", token=TOKEN)
    adaptive.push_to_hub("me/remote", remote_code=True)
    adaptive.model.push_to_hub("me/by_model")
    known = {"ids": tokens()}
    known |= {"uniform": logits_of(uniform.model, tokens()), "adaptive": logits_of(adaptive.model, tokens())}
    torch.save(known, tmp_path / "known.pt")
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-W", "ignore", "-c", LOADS, str(tmp_path / "known.pt")]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "uniform True",
        "refused AmbiguousGlobalPerLayerAttributeError",
        "remote True",
        "plugin True True",
        "both True True",
        f"tokens {tiny_tokenizer().encode('a river')}",
    ]
    assert TOKEN not in ran.stdout + ran.stderr
    assert b"hf-adaprune" in hub.repositories["me/by_model"].files["README.md"]
    assert hub.authorizations - {""} == {f"Bearer {TOKEN}"}


def test_one_commit_holds_everything_and_the_same_again_is_none(hub: FakeHub, saved: Path) -> None:
    first = push_to_hub(saved, "me/tiny", commit_message="A smaller one")
    again = push_to_hub(saved, "me/tiny")
    assert [commit.oid for commit in hub.commits("me/tiny")] == [first.oid] == [again.oid]
    assert hub.commits("me/tiny")[0].message == "A smaller one"
    files = hub.repositories["me/tiny"].files
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "pruned_widths.png",
        "pruning_config.json",
        "pruning_plan.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    assert card_errors(files["README.md"].decode()) == []
    assert not list(saved.glob("*.png")) and not (saved / "README.md").exists()


def test_what_a_recovery_returned_is_pushed_as_its_folder_is(hub: FakeHub, saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    config = RecoveryConfig(tokens=256, batch_size=4, sequence_length=32, precision="fp32", held_out=0)
    result = recover(model, tiny_tokenizer(), tiny_model("llama"), config, sources=TEXT)
    push_to_hub(result, "me/recovered", remote_code=True)
    push_to_hub(result.save_pretrained(tmp_path / "out", remote_code=True), "me/folder")
    one, other = (hub.repositories[name].files for name in ("me/recovered", "me/folder"))
    assert one.keys() == other.keys() and one["model.safetensors"] == other["model.safetensors"]
    assert json.loads(one["pruning_config.json"])["recovery"]["tokens"] == result.tokens


def test_a_result_pushed_twice_is_one_commit(hub: FakeHub) -> None:
    oids = {pruned().push_to_hub("tiny", remote_code=True).oid for _ in range(2)}
    assert [commit.oid for commit in hub.commits("me/tiny")] == list(oids)


def test_a_pushed_result_is_called_by_its_id(hub: FakeHub) -> None:
    model = pruned().model
    rename(model, "")
    for options in ({"revision": "candidate"}, {"create_pr": True}):
        pruned().push_to_hub("tiny", **options)
        assert model.name_or_path == ""  # the id loads something else, or nothing
    hub.fails("POST", "/commit/", 403)
    with pytest.raises(HubError):
        pruned().push_to_hub("me/other")
    assert model.name_or_path == ""
    pruned().push_to_hub("tiny")
    assert model.name_or_path == "me/tiny"


def test_the_command_line_pushes(hub: FakeHub, saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(saved), "me/tiny", "--private", "--license", "apache-2.0", "--json", "--quiet"]) == 0
    out = json.loads(capfd.readouterr().out)
    assert out["commit"] == hub.commits("me/tiny")[0].oid
    assert out["url"].endswith(f"/me/tiny/commit/{out['commit']}")
    assert hub.repositories["me/tiny"].private
    assert "license: apache-2.0" in hub.repositories["me/tiny"].files["README.md"].decode()
    hub.fails("POST", "/commit/", 403, message=f"{TOKEN} may not write")
    assert main(["push", str(saved), "me/tiny", "--message", "x", "--license", "mit"]) == 2
    said = capfd.readouterr()
    assert "403" in said.err and "write access" in said.err
    assert TOKEN not in said.err + said.out


def test_a_branch_a_pull_request_and_a_private_repository(hub: FakeHub, saved: Path) -> None:
    push_to_hub(saved, "me/tiny", revision="candidate")
    repository = hub.repositories["me/tiny"]
    assert not repository.files
    assert "model.safetensors" in repository.commits[repository.heads["candidate"]].files
    commit = push_to_hub(saved, "me/tiny", create_pr=True)
    assert commit.pr_url == f"{hub.url}/me/tiny/discussions/1"
    assert not repository.files
    with pytest.raises(HubError, match="is public"):
        push_to_hub(saved, "me/tiny", private=True)
    push_to_hub(saved, "me/secret", private=True)
    assert hub.repositories["me/secret"].private


def test_the_license_and_the_name_of_the_base_model(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    api = huggingface_hub.HfApi()
    api.create_repo("big/dense")
    card = b"---\nlicense: other\nlicense_name: dense-1.0\nlicense_link: https://example.org/dense\n---\n# Dense\n"
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="big/dense")
    record = json.loads((folder / "pruning_config.json").read_text())
    (folder / "pruning_config.json").write_text(json.dumps(record | {"base_model": "big/dense"}))
    push_to_hub(folder, "me/tiny")
    data = huggingface_hub.ModelCard(hub.repositories["me/tiny"].files["README.md"].decode()).data
    assert data.base_model == "big/dense"
    assert (data.license, data.license_name) == ("other", "dense-1.0")
    (folder / "pruning_config.json").write_text(
        json.dumps(record | {"base_model": str(tmp_path / "secrets" / "dense")})
    )
    push_to_hub(folder, "me/other")
    text = hub.repositories["me/other"].files["README.md"].decode()
    assert "base_model" not in text and "license" not in text
    assert "\ndense with" in text and "secrets" not in text


def test_a_readme_of_the_users_own_is_kept(hub: FakeHub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push_to_hub(folder, "me/tiny")
    assert hub.repositories["me/tiny"].files["README.md"] == (folder / "README.md").read_bytes()


def test_what_an_earlier_push_left_goes(hub: FakeHub, folder: Path, saved: Path) -> None:
    (folder / "model.safetensors").unlink()
    pruned().model.save_pretrained(folder, max_shard_size="30kB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    push_to_hub(folder, "me/tiny")
    push_to_hub(saved, "me/tiny")
    names = set(hub.repositories["me/tiny"].files)
    assert [name for name in names if name.endswith((".safetensors", ".index.json"))] == ["model.safetensors"]
    assert len(hub.commits("me/tiny")) == 2


def test_weights_that_no_push_of_ours_wrote_stay(
    hub: FakeHub, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:  # fmt: skip
    api = huggingface_hub.HfApi()
    api.create_repo("me/tiny")
    others = {"adapter_model.safetensors", "steering.safetensors", "model.fp16.safetensors", "model-x.safetensors"}
    ours = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
    for name in others | ours:
        api.upload_file(path_or_fileobj=name.encode(), path_in_repo=name, repo_id="me/tiny")
    with caplog.at_level(logging.INFO, "hf_adaprune"):
        push_to_hub(saved, "me/tiny")
    files = hub.repositories["me/tiny"].files
    assert {name: files.get(name) for name in others} == {name: name.encode() for name in others}
    assert not ours & files.keys()
    told = next(record.getMessage() for record in caplog.records if "taken out" in record.getMessage())
    assert all(name in told for name in ours) and not any(name in told for name in others)


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "times", "words"),
    [
        ("POST", "/commit/", 0, 1, "broke off"),
        ("PUT", "/lfs/", 0, 99, "broke off"),
        ("POST", "/preupload/", 401, 1, "hf auth login"),
        ("POST", "repos/create", 401, 1, "hf auth login"),
        ("POST", "/commit/", 403, 1, "write access"),
        ("POST", "/commit/", 409, 1, "changed meanwhile"),
        ("POST", "/commit/", 412, 1, "changed meanwhile"),
        ("PUT", "/lfs/", 413, 1, "max_shard_size"),
        ("POST", "/commit/", 413, 1, "max_shard_size"),
        ("PUT", "/lfs/", 500, 99, "answered 500"),
        ("POST", "objects/batch", 503, 99, "answered 503"),
        ("GET", "/tree/", 500, 99, "answered 500"),
    ],
)
def test_a_broken_upload_publishes_nothing_and_is_finished_by_running_again(
    hub: FakeHub, saved: Path, method: str, path: str, status: int, times: int, words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    hub.fails(method, path, status, times, f"no, {TOKEN}")
    with caplog.at_level(logging.INFO), pytest.raises(HubError) as caught:
        push_to_hub(saved, "me/tiny")
    assert words in str(caught.value)
    assert TOKEN not in str(caught.value) + caplog.text
    assert caught.value.__cause__ is None
    assert not [c for c in hub.commits("me/tiny") if c.files] if "me/tiny" in hub.repositories else True
    hub.faults.clear()
    push_to_hub(saved, "me/tiny")
    assert len(hub.commits("me/tiny")) == 1
    assert hub.repositories["me/tiny"].files["model.safetensors"] == (saved / "model.safetensors").read_bytes()


@pytest.mark.parametrize(("path", "status"), [("/lfs/", 500), ("/lfs/", 0)])
def test_a_passing_fault_is_ridden_out(hub: FakeHub, saved: Path, path: str, status: int) -> None:
    hub.fails("PUT", path, status)
    push_to_hub(saved, "me/tiny")
    assert len(hub.commits("me/tiny")) == 1


def test_large_files_that_arrived_are_not_sent_twice(hub: FakeHub, saved: Path) -> None:
    hub.fails("POST", "/commit/", 0)
    with pytest.raises(HubError):
        push_to_hub(saved, "me/tiny")
    before = sum(method == "PUT" for method, _ in hub.requests)
    push_to_hub(saved, "me/tiny")
    assert sum(method == "PUT" for method, _ in hub.requests) == before > 0


def test_a_file_that_the_hub_ignores_is_not_called_done(
    hub: FakeHub, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = huggingface_hub.HfApi.create_commit

    def loses(self: object, repo_id: str, operations: list, **options: object) -> object:
        return commit(self, repo_id, [o for o in operations if o.path_in_repo != "tokenizer.json"], **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", loses)
    with pytest.raises(HubError, match=r"tokenizer\.json did not arrive"):
        push_to_hub(saved, "me/tiny")


def test_a_name_that_is_none(hub: FakeHub, saved: Path) -> None:
    with pytest.raises(HubError, match="owner/name"):
        push_to_hub(saved, "a/b/c")


# -- what leaves the machine ------------------------------------------------------------------------------------------


def test_pickles_logs_and_hidden_files_stay_at_home(
    hub: FakeHub, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("training_args.bin", "optimizer.pt", "x.pkl", "x.ckpt", ".env", "trainer_state.json", "run.py"):
        (folder / name).write_bytes(b"secret")
    (folder / "checkpoint-10").mkdir()
    (folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"secret")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    with caplog.at_level(logging.INFO, "hf_adaprune"):
        push_to_hub(folder, "me/tiny")
    files = hub.repositories["me/tiny"].files
    assert b"secret" not in hub.sent()
    assert {"chat_template.jinja", "additional_chat_templates/tools.jinja"} <= set(files)
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pkl", ".py")) or "checkpoint" in name]
    assert "training_args.bin" in caplog.text


def test_other_files_are_published_without_folders_too(hub: FakeHub, folder: Path) -> None:
    (folder / "evaluation.json").write_text(json.dumps({"model": "/private/place/tiny", "results": {}, "speed": {}}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    changed = tokenizer | {"name_or_path": "/private/place/dense", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(changed))
    push_to_hub(folder, "me/tiny")
    files = hub.repositories["me/tiny"].files
    assert json.loads(files["evaluation.json"])["model"] == "tiny"
    assert json.loads(files["tokenizer_config.json"]) == changed | {"name_or_path": "dense"}


@pytest.mark.parametrize("remote_code", [False, True])
def test_a_config_says_no_place_on_this_machine(hub: FakeHub, folder: Path, remote_code: bool) -> None:
    plain = json.loads((folder / "config.json").read_text())
    cache = "/private/hub/models--big--dense/snapshots/0123456789abcdef"
    shown = {"/private/place/dense": None, "..\\private\\x": None, "private": None, "big/dense": "big/dense"}
    for name, expected in {**shown, cache: "big/dense"}.items():
        asked = {"_name_or_path": name, "name_or_path": name, "extra": {"_name_or_path": name}}
        (folder / "config.json").write_text(json.dumps(plain | asked))
        push_to_hub(folder, "me/tiny", remote_code=remote_code)
        said = json.loads(hub.repositories["me/tiny"].files["config.json"])
        assert b"private" not in hub.repositories["me/tiny"].files["config.json"]
        own = {} if expected is None else {"_name_or_path": expected}
        assert said.pop("extra") == own
        assert {key: said.pop(key, None) for key in ("_name_or_path", "name_or_path")} == {
            "_name_or_path": expected,
            "name_or_path": expected,
        }
        assert remote_code or said == plain
    (folder / "config.json").write_text(json.dumps(plain | {"_name_or_path": {"private": 1}}))
    push_to_hub(folder, "me/tiny", remote_code=remote_code)
    assert "_name_or_path" not in json.loads(hub.repositories["me/tiny"].files["config.json"])


def test_files_are_named_without_their_folders(hub: FakeHub, tmp_path: Path) -> None:
    places = {}
    for name in ("sources", "selection", "report"):
        places[name] = tmp_path / "private place" / name / "words.txt"
        places[name].parent.mkdir(parents=True)
        seed = {"sources": 1, "selection": 2000, "report": 4000}[name]
        places[name].write_text("\n\n".join(calibration_prose(seed + n, 60) for n in range(60)))
    texts = {name: (str(place),) for name, place in places.items()}
    texts |= {"evaluation_tokens": 256, "evaluation_length": 32, "samples": 24, "sequence_length": 16}
    config = config_of(calibration=texts, search={"trials": 3, "strategy": ("random",)})
    journal = tmp_path / "private place" / "tiny.journal.jsonl"
    result = prune(tiny_model("llama"), tiny_tokenizer(), config, journal=journal)
    result.push_to_hub("me/tiny")
    folder = result.save_pretrained(tmp_path / "private place" / "tiny")
    push_to_hub(folder, "me/beside")
    # At home the record names the files as the user did, so that a run can be repeated.
    assert str(places["sources"]) in (folder / "pruning_config.json").read_text()
    for name in ("me/tiny", "me/beside"):
        files = hub.repositories[name].files
        assert "private place" not in b"".join(files.values()).decode(errors="replace")
        assert str(Path.home()).encode() not in b"".join(v for n, v in files.items() if n.endswith(".json"))
        config_there = json.loads(files["pruning_config.json"])["config"]["calibration"]
        assert config_there["sources"] == ["words.txt"]
        there = tmp_path / "there.jsonl"
        there.write_bytes(files["pruning_journal.jsonl"])
        assert len(Journal.load(there).trials) == 3
        text = files["README.md"].decode()
        assert "search: 3 trials (random)" in text
    assert b"private place" not in hub.sent()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "README.md", "pruning_config.json", "merges.txt"])
@pytest.mark.parametrize("secret", [TOKEN, "hf_" + "A1b2" * 9])
def test_a_token_in_a_file_stops_the_push(hub: FakeHub, folder: Path, name: str, secret: str) -> None:
    place = folder / name
    if name.endswith(".json"):
        place.write_text(json.dumps({**json.loads(place.read_text()), "token": secret}))
    else:
        place.write_text(f"---\nlicense: mit\n---\ntoken {secret}")
    with pytest.raises(CheckpointError, match=name) as caught:
        push_to_hub(folder, "me/tiny")
    assert secret not in str(caught.value)
    assert not hub.bodies


# -- what is no checkpoint --------------------------------------------------------------------------------------------


def test_folders_that_are_refused_before_anything_is_sent(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no pruning_config"):
        push_to_hub(tmp_path / "nowhere", "me/tiny")
    plan = (folder / "pruning_plan.json").read_text()
    other = PruningPlan("llama", 3, {}, (1,))
    other.save(folder / "pruning_plan.json")
    with pytest.raises(CheckpointError, match="is not the plan"):
        push_to_hub(folder, "me/tiny")
    (folder / "pruning_plan.json").unlink()
    with pytest.raises(PlanError, match="no plan"):
        push_to_hub(folder, "me/tiny")
    (folder / "pruning_plan.json").write_text(plan)
    record = json.loads((folder / "pruning_config.json").read_text())
    other.save(folder / "pruning_plan.json")
    changed = record | {"plan": other.to_dict(), "plan_digest": other.digest}
    (folder / "pruning_config.json").write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="not as wide"):
        push_to_hub(folder, "me/tiny")
    (folder / "pruning_plan.json").write_text(plan)
    (folder / "pruning_config.json").write_text(json.dumps(record))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        push_to_hub(folder, "me/tiny")
    (folder / "pytorch_model.bin").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="lacks model-00002"):
        push_to_hub(folder, "me/tiny")
    assert not hub.requests


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_a_trainer_that_prunes_pushes_a_model_that_loads(hub: FakeHub, tmp_path: Path) -> None:
    from trainings import progressive, training
    from transformers import AutoModelForCausalLM

    options = {"push_to_hub": True, "hub_model_id": "me/trained", "save_strategy": "steps", "save_steps": 5}
    trainer = training(tmp_path / "run", progressive(), **options)
    trainer.train()
    trainer.push_to_hub()
    files = hub.repositories["me/trained"].files
    assert {"pruning_plan.json", "pruning_config.json", "model.safetensors", "README.md"} <= set(files)
    loaded = AutoModelForCausalLM.from_pretrained("me/trained")
    assert torch.equal(logits_of(loaded, tokens()), logits_of(trainer.model.eval(), tokens()))
    push_to_hub(tmp_path / "run" / "checkpoint-10", "me/checkpoint", token=TOKEN)
    again = AutoModelForCausalLM.from_pretrained("me/checkpoint")
    assert torch.equal(logits_of(again, tokens()), logits_of(loaded, tokens()))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "processor_config.json"])
def test_code_that_files_beside_the_config_name_is_not_published(hub: FakeHub, folder: Path, name: str) -> None:
    place = folder / name
    data = json.loads(place.read_text()) if place.exists() else {}
    place.write_text(json.dumps(data | {"auto_map": {"AutoTokenizer": ["someone/else--code.Tokenizer", None]}}))
    with pytest.raises(CheckpointError, match="auto_map"):
        push_to_hub(folder, "tiny")
    assert "me/tiny" not in hub.repositories or not hub.commits("me/tiny")


def test_adapters_beside_a_checkpoint_are_not_published(hub: FakeHub, folder: Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/private/place"}))
    push_to_hub(folder, "tiny")
    assert "adapter_config.json" not in hub.repositories["me/tiny"].files
