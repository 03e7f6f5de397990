"""Folders and files from strangers: nothing in them runs, and what is wrong with them is told."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzzing
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_hub import folder, hub, pruned, saved  # noqa: F401
from test_pipeline import config_of, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from hf_adaprune import ARCHITECTURES, Architecture, PruningConfig, PruningPlan, prune, push_to_hub
from hf_adaprune.architecture_json import architecture_from_dict, architecture_to_dict
from hf_adaprune.architectures import Experts
from hf_adaprune.cli import main
from hf_adaprune.description import describe
from hf_adaprune.errors import AdaPruneError, CheckpointError, UnsupportedModelError
from hf_adaprune.publication import check_checkpoint

# See test_hub.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
MARK = "hostile_code_ran"
HUGE = 10**30


@pytest.fixture(autouse=True)
def _nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Code of a stranger would leave a mark; nobody may be asked whether to run it."""

    def asked(*arguments: Any) -> str:
        raise AssertionError("a person was asked")

    monkeypatch.setattr("builtins.input", asked)
    yield
    assert not list(tmp_path.rglob(MARK))
    assert MARK not in os.environ


def code(folder: Path) -> str:  # noqa: F811
    return f"import os, pathlib\npathlib.Path({str(folder.parent / MARK)!r}).touch()\nos.environ[{MARK!r}] = '1'\n"


def edit(file: Path, change: Callable[[dict], Any]) -> None:
    data = json.loads(file.read_text())
    changed = change(data)
    file.write_text(json.dumps(data if changed is None else changed))


# -- a whole folder ---------------------------------------------------------------------------------------------------


def test_code_in_a_folder_never_runs_by_itself(hub: Any, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    for name in ("modeling_adaprune_llama.py", "conftest.py", "sitecustomize.py", "__init__.py"):
        (folder / name).write_text(code(folder) + "class LlamaForCausalLM: pass\n")
    reference = {"AutoModelForCausalLM": "modeling_adaprune_llama.LlamaForCausalLM"}
    edit(folder / "config.json", lambda data: data.update(auto_map=reference))
    AutoModelForCausalLM.from_pretrained(folder)
    describe(folder)
    assert main(["show", str(folder), "--quiet"]) == 0
    push_to_hub(folder, "me/tiny")
    # What is published is this package's own text, not what lay there.
    there = hub.repositories["me/tiny"].files
    assert [name for name in there if name.endswith(".py")] == ["modeling_adaprune_llama.py"]
    assert MARK.encode() not in there["modeling_adaprune_llama.py"]
    for foreign in ("other/repo--modeling.Evil", "modeling_evil.Evil", ["a"], 3):
        edit(folder / "config.json", lambda data, f=foreign: data.update(auto_map={"AutoModelForCausalLM": f}))
        with pytest.raises(CheckpointError, match="code of its own"):
            push_to_hub(folder, "me/other", remote_code=True)
    assert "me/other" not in hub.repositories


# A family that transformers has and this package has not: its checkpoints bring an architecture of their own.
FOREIGN = Architecture("granite", "GraniteDecoderLayer", heads_must_divide_hidden=True, experts=None)
GRANITE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
GRANITE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
WHOLE = dataclasses.replace(
    FOREIGN, experts=Experts(), layer_index_lists=("mlp_only_layers",), layer_refusals=(("flag", "a reason"),)
)


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with remote code, of a family that is not built in."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("granite", **GRANITE))
    result = prune(model, tiny_tokenizer(), config_of("magnitude"), architecture=FOREIGN)
    return result.save_pretrained(tmp_path_factory.mktemp("granite") / "out", remote_code=True)


def spots(data: Any, place: tuple = ()) -> list[tuple]:
    """Where the strings of an architecture are."""
    if isinstance(data, str):
        return [place]
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [found for key, value in entries for found in spots(value, (*place, key))]


def with_value(data: dict, place: tuple, value: Any) -> dict:
    data = json.loads(json.dumps(data))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return data


def test_a_checkpoint_of_a_family_that_is_not_built_in_is_published(hub: Any, granite: Path) -> None:  # noqa: F811
    push_to_hub(granite, "me/granite")
    there = hub.repositories["me/granite"].files
    assert there["modeling_adaprune_granite.py"] == (granite / "modeling_adaprune_granite.py").read_bytes()
    for own in (*ARCHITECTURES.values(), WHOLE):
        assert architecture_from_dict(architecture_to_dict(own)) == own
        # Places in a list of modules are paths, too.
        in_list = dataclasses.replace(own, mlp=dataclasses.replace(own.mlp, up=("mlp.0",), down="mlp.2"))
        assert architecture_from_dict(architecture_to_dict(in_list)) == in_list


@pytest.mark.parametrize("place", spots(architecture_to_dict(WHOLE)), ids=lambda place: ".".join(map(str, place)))
def test_an_architecture_that_a_config_brings_never_becomes_code(
    hub: Any, folder: Path, granite: Path, tmp_path: Path, place: tuple  # noqa: F811
) -> None:  # fmt: skip
    touch = f"__import__('pathlib').Path({str(tmp_path / MARK)!r}).touch()"
    foreign = Path(shutil.copytree(granite, tmp_path / "granite"))
    llama = json.loads(json.dumps(architecture_to_dict(WHOLE) | {"model_type": "llama"}))
    for own, data in ((folder, llama), (foreign, architecture_to_dict(WHOLE))):
        values = [f"x\n{touch}\n", f'x\\"\n{touch}\n', ["x"], {"x": 1}]
        if place[-1] != "refuse_heads" and place[0] != "layer_refusals":  # a reason is one line of any text
            values += [f'x" if {touch} else "x', "x y", "x\n", "__class__"]
        for value in values:
            hostile = with_value(data, place, value)
            name = f"modeling_adaprune_{data['model_type']}.{own.name}"
            edit(own / "config.json", lambda config, h=hostile: config["adaprune"].update(architecture=h))
            edit(own / "config.json", lambda config, n=name: config.update(auto_map={"AutoModelForCausalLM": n}))
            with pytest.raises(CheckpointError, match="describes no architecture"):
                push_to_hub(own, "me/mirror", remote_code=True)
            with pytest.raises(CheckpointError, match="describes no architecture"):
                AutoModelForCausalLM.from_pretrained(own)
            assert main(["show", str(own), "--quiet"]) != 0
    assert not hub.requests


@pytest.mark.parametrize(
    "change",
    [
        {"mlp": {"fused": "2"}},
        {"mlp": {"up": "mlp.up_proj"}},
        {"mlp": {"unknown": 1}},
        {"attention": {"query": "self_attn.__class__"}},
        {"attention": {"query": "self_attn..q_proj"}},
        {"explicit_head_dim": "False"},
        {"heads_read_globally": 1},
        {"heads_field": "_name_or_path"},
        {"layer_class": ""},
        {"layer_class": "os.system"},
        {"layers": ""},
        {"layer_lists": "layer_types"},
        {"removed_attention": ["num_key_value_heads", [1]]},
        {"removed_attention": ["num_key_value_heads"]},
        {"layer_refusals": [["flag"]]},
        {"experts": 3},
        {"unknown": 1},
    ],
    ids=str,
)
def test_an_architecture_of_other_types_is_refused(change: dict) -> None:
    data = architecture_to_dict(WHOLE)
    for name, value in change.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) else value
    with pytest.raises((TypeError, ValueError)):
        architecture_from_dict(data)


def test_a_built_in_family_follows_no_architecture_of_a_config(hub: Any, folder: Path) -> None:  # noqa: F811
    changed = {"layer_class": "LlamaRMSNorm", "layers": "lm_head", "width_field": "vocab_size"}
    other = architecture_to_dict(ARCHITECTURES["llama"]) | changed
    edit(folder / "config.json", lambda data: data["adaprune"].update(architecture=other))
    push_to_hub(folder, "me/tiny", remote_code=True)
    text = hub.repositories["me/tiny"].files["modeling_adaprune_llama.py"].decode()
    assert "LlamaRMSNorm" not in text and "lm_head" not in text
    assert prune(AutoModelForCausalLM.from_pretrained(folder), None, config_of("magnitude")).after.total > 0


@pytest.mark.parametrize(
    "name",
    ["GraniteRMSNorm", "GraniteMLP", "GraniteAttention", "GraniteModel", "nn", "Callable", "apply_rotary_pos_emb"],
)
def test_a_checkpoint_that_names_another_class_breaks_no_other_one(granite: Path, tmp_path: Path, name: str) -> None:
    """Whatever a stranger's config made of a class of transformers, later models are built as before."""
    bad, tall = (Path(shutil.copytree(granite, tmp_path / place)) for place in ("bad", "tall"))
    edit(bad / "config.json", lambda data: data["adaprune"]["architecture"].update(layer_class=name))
    edit(bad / "config.json", lambda data: data["adaprune"].update(added_biases={"0": ["mlp.down_proj"]}))
    plain = AutoConfig.for_model("granite", **GRANITE)
    before = AutoModelForCausalLM.from_config(plain).state_dict().keys()
    with pytest.raises((AdaPruneError, RuntimeError, AttributeError)):
        AutoModelForCausalLM.from_pretrained(bad)
    assert AutoModelForCausalLM.from_config(plain).state_dict().keys() == before
    assert AutoModelForCausalLM.from_pretrained(granite).state_dict().keys() == before
    edit(tall / "config.json", lambda data: data["adaprune"].update(added_biases={"0": ["mlp.down_proj"]}))
    assert AutoModelForCausalLM.from_pretrained(tall).model.layers[0].mlp.down_proj.bias is not None


def test_the_class_that_a_config_names_is_not_written_into_code(hub: Any, folder: Path) -> None:  # noqa: F811
    edit(folder / "config.json", lambda data: data.update(architectures=["torch"]))
    push_to_hub(folder, "me/tiny", remote_code=True)
    config = json.loads(hub.repositories["me/tiny"].files["config.json"])
    assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_adaprune_llama.LlamaForCausalLM"}


def test_links_out_of_the_folder_are_not_followed(hub: Any, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    secret = tmp_path / "secret.txt"
    secret.write_text("a private thing")
    (folder / "vocab.txt").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"vocab\.txt is a link"):
        push_to_hub(folder, "me/tiny")
    (folder / "vocab.txt").unlink()
    (folder / "additional_chat_templates").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(CheckpointError, match="is a link"):
        push_to_hub(folder, "me/tiny")
    (folder / "additional_chat_templates").unlink()
    (folder / "README.md").symlink_to(secret)
    with pytest.raises(CheckpointError, match="is a link"):
        push_to_hub(folder, "me/tiny")
    assert b"private thing" not in hub.sent()


def test_a_snapshot_of_the_hubs_cache_is_all_links_and_may_be_pushed(
    hub: Any, saved: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    snapshot = tmp_path / "models--me--tiny" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(saved, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    push_to_hub(snapshot, "me/tiny")
    assert len(hub.commits("me/tiny")) == 1


@pytest.mark.parametrize(
    "sizes",
    [
        {"0": {"intermediate_size": HUGE}},
        {"0": {"intermediate_size": -1}},
        {"0": {"intermediate_size": "39"}},
        {"0": {"intermediate_size": None}},
        {"0": {"num_attention_heads": 0}},
        {"0": {"skip": ["../../etc/passwd"], "intermediate_size": 7}},
        {"0": {"skip": ["attention", "mlp"]}},
        {"0": {"__class__": "os.system", "intermediate_size": 7}},
        {"../0": {"intermediate_size": 39}},
        {"99": {"intermediate_size": 39}},
        {"0": []},
        [1, 2],
        "x",
    ],
    ids=str,
)
def test_sizes_that_the_weights_do_not_have(folder: Path, sizes: Any) -> None:  # noqa: F811
    edit(folder / "config.json", lambda data: data.update(per_layer_config=sizes))
    # Some of it transformers refuses itself, field by field.
    with pytest.raises((AdaPruneError, StrictDataclassError, ValueError, TypeError, RuntimeError, AttributeError)):
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(AdaPruneError):
        push_to_hub(folder, "me/tiny")


@pytest.mark.parametrize("count", [3_000_000, 10**9, HUGE])
def test_layers_that_no_model_has_are_refused_at_once(folder: Path, count: int) -> None:  # noqa: F811
    edit(folder / "config.json", lambda data: data.update(num_hidden_layers=count))
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="16,384 are the most"):
        describe(folder)
    with pytest.raises(CheckpointError, match="16,384 are the most"):
        push_to_hub(folder, "me/tiny")
    assert time.perf_counter() - started < 5


def test_as_many_layers_as_may_be_are_described_soon(folder: Path) -> None:  # noqa: F811
    sizes = {str(number): {"intermediate_size": 7} for number in range(2**14)}
    edit(folder / "config.json", lambda data: data.update(num_hidden_layers=2**14, per_layer_config=sizes))
    started = time.perf_counter()
    assert len(str(describe(folder)).splitlines()) > 2**14
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize(
    "provenance",
    [
        {"added_biases": {"0": ["../../x"]}},
        {"added_biases": {"0": ["mlp.__class__"]}},
        {"added_biases": {"0": ["mlp"]}},
        {"added_biases": {"0": ["mlp.act_fn"]}},
        {"added_biases": {"0": 3}},
        {"added_biases": ["x"]},
        {"architecture": {"model_type": "llama"}},
        {"architecture": 7},
        "x",
        [1],
    ],
    ids=str,
)
def test_provenance_that_nobody_wrote(folder: Path, provenance: Any) -> None:  # noqa: F811
    edit(folder / "config.json", lambda data: data.update(adaprune=provenance))
    with pytest.raises(AdaPruneError, match=r"adaprune|describe"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan["sites"]["layers.0.mlp"].update(kept=[[0, HUGE]]),
        lambda plan: plan["sites"]["layers.0.mlp"].update(kept=[[0, 10**12]]),
        lambda plan: plan["sites"]["layers.0.mlp"].update(group_size=HUGE),
        lambda plan: plan["sites"]["layers.0.mlp"].update(groups="1e400"),
        lambda plan: plan["sites"].update({"../../x": {}}),
        lambda plan: plan["sites"].update({"layers.²³.mlp": {"groups": 1, "group_size": 1, "kept": []}}),
        lambda plan: plan.update(num_layers=HUGE),
        lambda plan: plan.update(num_layers=math.inf),
        lambda plan: plan.update(dropped_layers=[math.nan]),
        lambda plan: plan.update(model_type={"$ne": 1}),
        lambda plan: plan.update(sites=[]),
    ],
)
def test_a_crafted_plan_is_refused_at_once(folder: Path, change: Callable[[dict], Any]) -> None:  # noqa: F811
    edit(folder / "pruning_plan.json", change)
    with pytest.raises(AdaPruneError):
        check_checkpoint(folder)
    with pytest.raises(AdaPruneError):
        PruningPlan.load(folder / "pruning_plan.json")


def test_weights_that_are_not_finite_are_not_pruned(folder: Path) -> None:  # noqa: F811
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match="finite"):
        prune(model, None, config_of("magnitude"))


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 40,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 18) + b'{"a":{"shape":[1]}',
        struct.pack("<Q", 47) + b'{"a":{"dtype":"F32","shape":["x"],"data_offsets":[0]}}',
        b"",
        b"\x80\x04cos\nsystem\n",
    ],
    ids=repr,
)
def test_weight_files_that_are_none(folder: Path, header: bytes) -> None:  # noqa: F811
    (folder / "model.safetensors").write_bytes(header)
    with pytest.raises(AdaPruneError):
        check_checkpoint(folder)
    with pytest.raises(Exception, match=r"(?i)header|safetensors|json|incomplete|deseriali"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../../outside.safetensors", "/etc/hostname", "sub/x.safetensors", 3, None])
def test_an_index_that_names_files_elsewhere(folder: Path, name: Any) -> None:  # noqa: F811
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError):
        check_checkpoint(folder)


def test_a_record_of_a_run_is_data(folder: Path) -> None:  # noqa: F811
    """A recipe that names files elsewhere is read as a config, and opens nothing."""
    edit(folder / "pruning_config.json", lambda data: data["config"]["calibration"].update(report=["python"]))
    edit(folder / "pruning_config.json", lambda data: data["config"].update(recipe_name="__import__('os').system('x')"))
    edit(folder / "pruning_config.json", lambda data: data["config"]["calibration"].update(sources=["/etc/passwd"]))
    assert PruningConfig.from_pretrained(folder).calibration.sources == ("/etc/passwd",)


# -- anything ---------------------------------------------------------------------------------------------------------

QUICK = settings(
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("kind", fuzzing.KINDS)
@QUICK
@given(data=st.data())
def test_anything_is_read_or_refused(saved: Path, tmp_path: Path, kind: str, data: st.DataObject) -> None:  # noqa: F811
    own = fuzzing.KINDS[kind]
    assert sum(own.answers(tmp_path, data.draw(own.inputs(saved)), saved)) > 0


def test_torch_is_not_asked_to_unpickle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def unpickles(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a pickle was read")

    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'x'\ntR.")
    (folder / "training_args.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'x'\ntR.")
    monkeypatch.setattr(torch, "load", unpickles)
    check_checkpoint(folder)
    AutoModelForCausalLM.from_pretrained(folder)
