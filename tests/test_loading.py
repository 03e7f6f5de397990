"""The keyword of `from_pretrained`, and what importing the package changes in transformers."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import tokens
from test_pipeline import SMALL, config_of, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from hf_adaprune import PruningConfig, result_of
from hf_adaprune.errors import ConfigError


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("cls", [AutoModelForCausalLM, LlamaForCausalLM])
def test_the_keyword_prunes_for_auto_and_concrete_classes(cls: type, dense: Path) -> None:
    model = cls.from_pretrained(dense, pruning_config=config_of())
    assert isinstance(model, LlamaForCausalLM)
    result = result_of(model)
    assert result is not None
    assert result.model is model
    assert result.pruning_ratio >= 0.25


def test_other_keywords_keep_their_meaning(dense: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        dense,
        pruning_config=config_of("magnitude"),
        output_loading_info=True,
        dtype=torch.bfloat16,
        device_map="cpu",
        revision="main",
        attn_implementation="eager",
    )
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    assert not info["missing_keys"]
    assert result_of(model).pruning_ratio >= 0.25


def test_a_config_given_beside_the_keyword_is_used(dense: Path) -> None:
    config = AutoConfig.from_pretrained(dense)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 123.0}
    model = AutoModelForCausalLM.from_pretrained(dense, config=config, pruning_config=config_of("magnitude"))
    assert model.config.rope_parameters["rope_theta"] == 123.0


def test_a_pruned_model_can_be_freed(dense: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, pruning_config="magnitude")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("given", ["magnitude", PruningConfig.recipe("magnitude").to_dict()])
def test_a_recipe_name_or_a_mapping_will_do(given: object, dense: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, pruning_config=given)
    assert result_of(model).pruning_ratio >= 0.2


def test_the_folder_or_the_file_of_a_config_will_do(dense: Path, tmp_path: Path) -> None:
    config = PruningConfig.recipe("magnitude", pruning_ratio=0.3)
    config.save_pretrained(tmp_path)
    for given in (tmp_path, str(tmp_path), tmp_path / "pruning_config.json"):
        model = AutoModelForCausalLM.from_pretrained(dense, pruning_config=given)
        assert result_of(model).config == config
    with pytest.raises(ConfigError, match=r"magnitude.*folder or JSON file.*Found 'no/such'"):
        AutoModelForCausalLM.from_pretrained(dense, pruning_config="no/such")


def test_anything_else_is_refused_before_the_model_loads() -> None:
    with pytest.raises(ConfigError, match="pruning_config"):
        AutoModelForCausalLM.from_pretrained(
            "there/is-no-such-model", pruning_config=3, config=tiny_model("llama").config
        )


def test_without_the_keyword_nothing_changes(dense: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert result_of(model) is None
    assert torch.equal(model(tokens()).logits, tiny_model("llama")(tokens()).logits)


def test_a_text_source_in_memory_survives_the_copies_of_the_auto_classes(dense: Path) -> None:
    assert SMALL["sources"].__deepcopy__({}) is SMALL["sources"]
    AutoModelForCausalLM.from_pretrained(dense, pruning_config=config_of("wanda-sp"))


@pytest.mark.parametrize(
    "order",
    [
        "import hf_adaprune; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM, PreTrainedModel; import hf_adaprune",
        "import transformers; import hf_adaprune; from transformers import AutoModelForCausalLM",
    ],
)
def test_the_order_of_imports_does_not_matter(order: str, dense: Path, tmp_path: Path) -> None:
    code = (
        f"{order}\nmodel = AutoModelForCausalLM.from_pretrained({str(dense)!r}, pruning_config='magnitude')\n"
        "print(hf_adaprune.result_of(model).pruning_ratio >= 0.2)"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "True"
