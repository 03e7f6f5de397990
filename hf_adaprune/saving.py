"""Checkpoints: weights, plan and provenance in one folder, checked by loading it again before it is handed over.

Everything is written to a folder beside the target and moved there when the check has passed, so a target folder either
holds a checkpoint that reloads or does not exist.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import CONFIG_NAME
from .errors import CheckpointError
from .model_config import check_configs
from .names import rename
from .quiet import quiet_global_values
from .remote_code import add_remote_code, load_class, module_name
from .run_folder import SPARE_BYTES, locked_output
from .whole_files import check_writable, is_taken, place_of, room_for, whole_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .pipeline import PruningResult
    from .recovery_result import RecoveryResult

__all__ = ["check_output", "check_round_trip", "save_pruned", "write_records"]

logger = logging.getLogger(__name__)

PLAN_NAME = "pruning_plan.json"
_PROMPT, _NEW = 16, 8  # tokens that the check reads and generates
_PROBE = "A tokenizer that reloads gives 1,234 equal ids: naïve, 日本語.\n\tdone"


def check_output(output_dir: str | os.PathLike[str], needed_bytes: int = 0) -> Path:
    """Refuse an output folder that cannot take a checkpoint, before any work is done.

    Args:
        output_dir (`str`): must not exist, or be an empty folder (or a link to one, or a mount point).
        needed_bytes (`int`, *optional*): size of the weights.

    Raises:
        CheckpointError: not empty, not writable, or too little space on the disk.
    """
    target = Path(output_dir)
    if is_taken(target):
        raise CheckpointError(f"{target} exists and is not empty. Name another output folder, or remove it first.")
    parent = check_writable(room_for(target) / place_of(target).name)
    free = shutil.disk_usage(parent).free
    if needed_bytes and free < needed_bytes + SPARE_BYTES:
        raise CheckpointError(
            f"{parent} has {free / 2**20:,.0f} MiB free, the checkpoint needs about "
            f"{(needed_bytes + SPARE_BYTES) / 2**20:,.0f} MiB. Free some space or name another disk."
        )
    return target


def save_pruned(
    result: PruningResult | RecoveryResult,
    output_dir: str | os.PathLike[str],
    *,
    check: bool = True,
    max_shard_size: str = "50GB",
    remote_code: bool = False,
) -> Path:
    """Save a pruned model so that `AutoModelForCausalLM.from_pretrained` opens it.

    The folder holds the checkpoint as transformers writes it, `pruning_config.json` (the config and everything that was
    measured) and `pruning_plan.json`. The model's `name_or_path` is the folder from then on, so that adapters of peft
    name a base that they fit. Of several processes one should call it: `if PartialState().is_main_process`.

    Args:
        result ([`PruningResult`] or [`RecoveryResult`]): what [`prune`] or [`recover`] returned.
        output_dir (`str`): a folder that does not exist or is empty.
        check (`bool`, *optional*, defaults to `True`): load the checkpoint again and compare weights and logits bit by
            bit and a cached generation token by token. Needs memory for a second copy of the pruned model.
        max_shard_size (`str`, *optional*, defaults to `"50GB"`): as in `PreTrainedModel.save_pretrained`.
        remote_code (`bool`, *optional*, defaults to `False`): write a Python file beside the weights with which
            `trust_remote_code=True` loads the model where this package is not installed. A model whose layers are all
            equal needs none and gets none.

    Returns:
        `Path`: the folder.

    Raises:
        UnsupportedModelError: remote code for a model class that is not transformers' own.
        CheckpointError: the folder cannot be written, is being written by another run, transformers does not save the
            model's configs as they are, or what was written does not reload to the same model. Nothing is left behind
            then.
    """
    target = check_output(output_dir, result.after.bytes)
    check_configs(result.model)
    with locked_output(target), whole_folder(target) as partial:
        with quiet_global_values():
            result.model.save_pretrained(partial, max_shard_size=max_shard_size)
        write_records(result, partial)
        if remote_code:
            add_remote_code(partial, type(result.model), result.model.config)
        if check:
            with quiet_global_values():
                check_round_trip(result.model, partial, result.tokenizer)
    rename(result.model, os.path.abspath(output_dir))
    return target


def write_records(result: PruningResult | RecoveryResult, folder: Path) -> None:
    """Write what stands beside the weights: tokenizer, plan, and the record of the run; remote code goes.

    Args:
        result ([`PruningResult`] or [`RecoveryResult`]): the run.
        folder (`Path`): with a `config.json`.
    """
    if result.tokenizer is not None:
        result.tokenizer.save_pretrained(folder)
    _drop_remote_code(folder)
    text = json.dumps(result.to_dict(), indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
    if result.plan is not None:
        result.plan.save(folder / PLAN_NAME)


@torch.no_grad()
def check_round_trip(
    model: Any, folder: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Load a checkpoint with `AutoModelForCausalLM` and compare it with the model in memory; by its remote code, too.

    Only for a folder that was written just now: remote code in it is run.

    Args:
        model (`PreTrainedModel`): the model.
        folder (`str`): its checkpoint.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): checked to reload to the same vocabulary.

    Raises:
        CheckpointError: what differs.
    """
    from transformers import AutoModelForCausalLM

    from .loading import install

    install()
    _compare(model, folder, AutoModelForCausalLM, "the checkpoint")
    by_its_code = load_class(Path(folder))
    if by_its_code is not None:
        try:
            _compare(model, folder, by_its_code, "the checkpoint by its remote code")
        finally:
            del sys.modules[by_its_code.__module__]
    if tokenizer is not None and type(tokenizer).from_pretrained(folder).encode(_PROBE) != tokenizer.encode(_PROBE):
        raise CheckpointError("the tokenizer does not reload to the same token ids. Save the one the model came with.")


def _compare(model: Any, folder: str | os.PathLike[str], kind: Any, what: str) -> None:
    try:
        loaded: Any = kind.from_pretrained(
            folder,
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            output_loading_info=True,
        )
    except Exception as error:
        raise CheckpointError(f"{what} does not reload: {error}. Please report this model's architecture.") from error
    again, info = loaded
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if wrong:
        raise CheckpointError(f"{what} does not reload to the same model: {wrong}.")
    mine, theirs = model.state_dict(), again.state_dict()
    for name, value in mine.items():
        if name not in theirs or not torch.equal(value.cpu(), theirs[name]):
            raise CheckpointError(f"{what} does not reload to the same model: {name} differs.")
    if len({parameter.device for parameter in model.parameters()}) == 1:
        _take_rounded_buffers(model, again, mine)
        try:
            _compare_outputs(model, again.to(model.device))
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{what} has the same weights, but could not be run to compare its outputs "
                f"({type(error).__name__}: {error}). Where the model itself runs, save it with check=False."
            ) from error
    # A model spread over devices computes other last bits than one that is not; its weights were compared.


def _take_rounded_buffers(model: Any, again: Any, saved: Mapping[str, Any]) -> None:
    """Give the reloaded model the buffers that no checkpoint holds as the model has them, where they are but rounded.

    `model.to(torch.bfloat16)` and `model.half()` cast rotary frequencies and scales of embeddings, too, which loading
    makes anew in full. Other differences stay, and show in the outputs.
    """
    theirs, rounded = dict(again.named_buffers()), []
    for name, value in model.named_buffers():
        other = theirs.get(name)
        if name in saved or other is None or not value.is_floating_point() or value.shape != other.shape:
            continue
        full = other.to(value.device)
        if value.dtype == other.dtype and torch.equal(value, full):
            continue
        if torch.allclose(value.double(), full.double(), rtol=2**-7, atol=2**-24):
            owner, _, own = name.rpartition(".")
            setattr(again.get_submodule(owner), own, value.detach().clone())
            rounded.append(name)
    if rounded:
        logger.warning(
            "this model was cast with `.to(dtype)` or `.half()`, which rounded %s. Loading makes them anew in full, so "
            "the reloaded model computes slightly other numbers; from_pretrained(..., dtype=...) rounds weights alone.",
            ", ".join(rounded),
        )


def _compare_outputs(model: Any, again: Any) -> None:
    from .evaluation import eval_mode

    vocabulary = model.get_input_embeddings().num_embeddings
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = positions if isinstance(positions, int) and positions > 0 else _PROMPT + _NEW
    ids = torch.randint(0, vocabulary, (1, min(_PROMPT, room)), generator=torch.Generator().manual_seed(0))
    ids = ids.to(model.device)
    with eval_mode(model), eval_mode(again):
        if not torch.equal(model(input_ids=ids, use_cache=False).logits, again(input_ids=ids, use_cache=False).logits):
            raise CheckpointError("the reloaded model computes other logits.")
        new = min(_NEW, max(1, room - 1))
        prompt = ids[:, : max(1, room - new)]
        expected, found = _generate(model, prompt, new), _generate(again, prompt, new)
    if expected != found:
        raise CheckpointError(
            f"the reloaded model generates other tokens with its cache: {found}, expected {expected}."
        )


def _drop_remote_code(folder: Path) -> None:
    """Take out remote code that a model brought from its own checkpoint: what is written here is written anew."""
    for file in folder.glob(f"{module_name('*')}.py"):
        file.unlink()
    place = folder / "config.json"
    data = json.loads(place.read_text(encoding="utf-8"))
    references = data.get("auto_map", {})
    kept = {key: value for key, value in references.items() if not str(value).startswith(module_name(""))}
    if kept != references:
        data.pop("auto_map")
        data.update({"auto_map": kept} if kept else {})
        place.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _generate(model: Any, ids: torch.Tensor, count: int) -> list[int]:
    """Tokens that a model adds greedily, with its cache; whatever its own generation config asks for."""
    from transformers import GenerationConfig

    own = model.generation_config
    # `generate` takes from the model's own config what a given one leaves open, so the model gets another one.
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=count, pad_token_id=0)
    try:
        generated = model.generate(ids, attention_mask=torch.ones_like(ids))
    finally:
        model.generation_config = own
    return generated[0, ids.shape[1] :].tolist()
