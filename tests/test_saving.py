"""Checkpoints reload to the same model, or do not exist."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MIXTURES, logits_of, tokens
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors import SafetensorError
from test_pipeline import config_of, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_adaprune import PruningConfig, PruningPlan, prune, prune_to_disk, recover, saving, whole_files
from hf_adaprune.errors import CheckpointError


def test_save_load_bit_equal(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    units = ("channel", "expert", "kv_group")
    result = prune(model, tiny_tokenizer(), config_of(units=units, repair={"intercept": family == "llama"}))
    folder = result.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits_of(again, tokens()), logits_of(model, tokens()))
    assert PruningPlan.load(folder / "pruning_plan.json") == result.plan
    again = type(tiny_tokenizer()).from_pretrained(folder)
    assert again.encode("a river") == tiny_tokenizer().encode("a river")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_mixture_pruned_in_float32_runs_in_narrower_dtypes(mixture: str, tmp_path: Path) -> None:
    model = tiny_model(mixture)
    assert model.dtype == torch.float32
    folder = prune(model, None, config_of("magnitude", units=("expert_channel",))).save_pretrained(tmp_path / "out")
    for dtype in (torch.bfloat16, torch.float16):
        narrow: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert logits_of(narrow, tokens()).isfinite().all()


def test_the_folder_tells_where_the_model_came_from(tmp_path: Path) -> None:
    config = config_of("magnitude", calibration={"sources": ("python",)})
    result = prune(tiny_model("llama"), None, config)
    folder = result.save_pretrained(tmp_path / "out")
    assert PruningConfig.from_pretrained(folder) == config
    data = json.loads((folder / "pruning_config.json").read_text())
    assert data["plan_digest"] == result.plan.digest
    assert data["after"]["total"] == result.after.total
    assert "pruning_config" not in json.loads((folder / "config.json").read_text())


def test_the_uniform_form_leaves_no_trace_and_needs_no_plugin(tmp_path: Path) -> None:
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    result = prune(tiny_model("llama"), tiny_tokenizer(), config_of(uniform=True))
    folder = result.save_pretrained(tmp_path / "out")
    written = json.loads((folder / "config.json").read_text())
    before = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert set(written) - set(before) <= {"head_dim"}
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})\n"
        "assert not any(name.startswith('hf_adaprune') for name in sys.modules)\n"
        "print(float(model(torch.arange(3, 12)[None]).logits.double().sum()))"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    mine = float(logits_of(result.model, torch.arange(3, 12)[None]).double().sum())
    assert float(out.stdout) == pytest.approx(mine, rel=1e-5)


def test_a_checkpoint_that_does_not_reload_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = prune(tiny_model("llama"), None, config_of("magnitude"))
    save = type(result.model).save_pretrained

    def spoiled(self: object, folder: Path, **options: object) -> None:
        weight = self.model.layers[0].mlp.down_proj.weight
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(2)
        save(self, folder, **options)
        with torch.no_grad():
            weight.copy_(kept)

    monkeypatch.setattr(type(result.model), "save_pretrained", spoiled)
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj\.weight differs"):
        result.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


GENERATION = {
    "stop strings": {"stop_strings": ["\n\n"]},
    "a dict": {"return_dict_in_generate": True, "output_scores": True},
    "several sequences": {"num_return_sequences": 2, "do_sample": True},
    "a quantised cache": {"cache_implementation": "quantized"},
    "dola": {"dola_layers": "low"},
    "groups of beams": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "no cache": {"use_cache": False},
    "an end at once": {"eos_token_id": list(range(320)), "max_time": 1e-4},
    "a length": {"max_length": 3},
}


@pytest.mark.parametrize("name", GENERATION)
def test_a_generation_config_of_the_models_own_is_saved_and_not_in_the_way(name: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    for field, value in GENERATION[name].items():
        setattr(model.generation_config, field, value)
    own, said = model.generation_config, model.generation_config.to_dict()
    folder = prune(model, tiny_tokenizer(), config_of("magnitude")).save_pretrained(tmp_path / "out")
    assert model.generation_config is own and own.to_dict() == said
    written = json.loads((folder / "generation_config.json").read_text())
    assert {field: written.get(field) for field in GENERATION[name]} == GENERATION[name]


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("generation_config", {"do_sample": False, "temperature": 0.7}),
        ("generation_config", {"num_beams": 1, "early_stopping": True}),
        ("generation_config", {"note": object()}),
        ("config", {"temperature": 0.7}),
    ],
    ids=["temperature", "early stopping", "no JSON", "temperature in the config"],
)
def test_configs_that_transformers_does_not_save_are_told_before_any_text_is_read(
    where: str, changes: dict, tmp_path: Path
) -> None:
    def broken() -> Any:
        model = tiny_model("llama")
        for name, value in changes.items():
            setattr(getattr(model, where), name, value)
        return model

    config = config_of().with_changes(calibration={"sources": str(tmp_path / "missing.txt")})
    told = f"does not save `model.{where}` as it is .*{[*changes][-1] if where == 'config' else ''}"
    with pytest.raises(CheckpointError, match=told):
        prune(broken(), tiny_tokenizer(), config)
    with pytest.raises(CheckpointError, match=told):
        prune_to_disk(broken(), tiny_tokenizer(), config, tmp_path / "out")
    with pytest.raises(CheckpointError, match=told):
        recover(broken(), tiny_tokenizer(), tiny_model("llama"), sources=str(tmp_path / "missing.txt"))
    result = prune(tiny_model("llama"), None, config_of("magnitude"))
    setattr(result.model, where, getattr(broken(), where))
    with pytest.raises(CheckpointError, match=told):
        result.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_generation_config_that_is_as_it_was_published_is_saved(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    place = tmp_path / "dense" / "generation_config.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "do_sample": False, "temperature": 0.7}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    prune(model, None, config_of("magnitude")).save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.7


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("cast", ["bfloat16", "float16", "bfloat16 and back"])
def test_a_model_that_was_cast_as_a_whole_is_saved(
    family: str, cast: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A cast rounds rotary frequencies too, which a checkpoint does not hold; weights must be equal all the same."""
    dtype = getattr(torch, cast.split()[0])
    model = tiny_model(family).to(dtype)
    model = model.float() if cast.endswith("back") else model
    result = prune(model, None, config_of("magnitude"))
    before = {name: value.clone() for name, value in model.named_buffers()}
    folder = result.save_pretrained(tmp_path / "out", remote_code=True)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert ("inv_freq" in caplog.text) == (family != "gpt2")
    again = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert again.dtype == model.dtype
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_buffers_that_are_more_than_rounded_are_noticed(tmp_path: Path) -> None:
    result = prune(tiny_model("llama"), None, config_of("magnitude"))
    result.model.model.rotary_emb.inv_freq.mul_(1.05)
    with pytest.raises(CheckpointError, match="other logits"):
        result.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("positions", [2, 9, 16, 23])
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_models_of_few_positions_are_checked_within_them(family: str, positions: int, tmp_path: Path) -> None:
    field = "n_positions" if family == "gpt2" else "max_position_embeddings"
    prune(tiny_model(family, **{field: positions}), None, config_of("magnitude")).save_pretrained(tmp_path / "out")


def test_a_model_that_cannot_be_run_is_told_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = prune(tiny_model("llama"), None, config_of("magnitude"))
    own = result.model.generation_config

    def breaks(*args: object, **options: object) -> None:
        raise IndexError("index out of range in self")

    with monkeypatch.context() as patch:
        patch.setattr(type(result.model), "generate", breaks)
        with pytest.raises(CheckpointError, match=r"IndexError: index out of range.*check=False"):
            result.save_pretrained(tmp_path / "out")
        assert result.model.generation_config is own and not list(tmp_path.iterdir())
        result.save_pretrained(tmp_path / "out", check=False)


def test_a_disk_that_fills_up_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = prune(tiny_model("llama"), None, config_of("magnitude"))

    def full(*args: object, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(type(result.model), "save_pretrained", full)
    with pytest.raises(CheckpointError, match="No space left"):
        result.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = prune(tiny_model("llama"), None, config_of("magnitude"))

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saving, "check_round_trip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        result.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_folder_a_read_only_one_and_a_full_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        saving.check_output(tmp_path / "full")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
        with pytest.raises(CheckpointError, match="1 MiB free"):
            saving.check_output(tmp_path / "new", 2**30)

    def refuses(**options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(whole_files.tempfile, "TemporaryFile", refuses)
    with pytest.raises(CheckpointError, match=r"not writable \(Permission denied\)"):
        saving.check_output(tmp_path / "new")


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prune(tiny_model("llama"), None, config_of("magnitude")).save_pretrained(tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_working_directory_is_filled_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = prune(tiny_model("llama"), tiny_tokenizer(), config_of("magnitude"))
    result.save_pretrained(".")
    assert os.getcwd() == str(tmp_path / "here") == result.model.name_or_path and Path("config.json").is_file()
    AutoModelForCausalLM.from_pretrained(".")


@pytest.mark.parametrize("there", [True, False])
def test_a_link_to_a_folder_is_taken_and_its_disk_counts(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "here").mkdir()
    if there:
        (tmp_path / "disk" / "out").mkdir()
    link = tmp_path / "here" / "out"
    link.symlink_to(tmp_path / "disk" / "out", target_is_directory=True)
    result = prune(tiny_model("llama"), tiny_tokenizer(), config_of("magnitude"))
    usage = shutil.disk_usage

    def full(path: Path) -> object:
        return usage(path)._replace(free=2**20 if "disk" in Path(path).parts else 2**40)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", full)
        with pytest.raises(CheckpointError, match="1 MiB free"):
            saving.check_output(link, 2**30)
    with pytest.raises(CheckpointError, match="is not empty"):
        (tmp_path / "file").symlink_to(__file__)
        saving.check_output(tmp_path / "file")
    assert result.save_pretrained(link) == link
    assert link.is_symlink() and [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["out"]
    AutoModelForCausalLM.from_pretrained(link)
    shutil.rmtree(tmp_path / "disk" / "out")
    streamed = prune_to_disk(tiny_model("llama"), None, config_of("magnitude"), link)
    assert streamed.folder == link and link.is_symlink()
    AutoModelForCausalLM.from_pretrained(link)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # read by peft
def test_an_adapter_names_the_model_that_it_fits(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    result = prune(model, tiny_tokenizer(), config_of("magnitude", units=("channel",)))
    assert result.base_model == "dense"

    def adapted(folder: Path) -> torch.Tensor:
        options: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        tuned: Any = get_peft_model(result.model, LoraConfig(r=4, task_type="CAUSAL_LM", **options)).eval()
        tuned.save_pretrained(folder)
        logits = logits_of(tuned, tokens())
        tuned.unload()
        return logits

    adapted(tmp_path / "early")
    with pytest.raises(Exception):  # noqa: B017 - peft's and the Hub's, by version
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "early")
    folder = result.save_pretrained(tmp_path / "out")
    expected = adapted(tmp_path / "adapter")
    loaded: Any = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(loaded.eval(), tokens()), expected)
    assert result.model.name_or_path == str(folder)
    assert result.model.config.name_or_path == str(tmp_path / "dense")
    again = result.save_pretrained(tmp_path / "again")
    for place in (folder, again):
        assert str(tmp_path) not in (place / "config.json").read_text()


def test_a_second_run_knows_what_the_first_began_with(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    results = [prune(model, None, config_of("magnitude", calibration={"sources": ("python",)})) for _ in range(2)]
    assert [result.base_model for result in results] == ["dense", "dense"]
    results[1].save_pretrained(tmp_path / "once")
    assert prune(model, None, config_of("magnitude", calibration={"sources": ("python",)})).base_model == "dense"
