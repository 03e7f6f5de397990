"""What a training that prunes leaves on disk: plan and history beside its checkpoints, and the folder of the result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .adapters import base_of, is_peft, save_base
from .card import model_card
from .config import CONFIG_NAME
from .model_config import MODEL_TAGS, name_layers
from .plan import PruningPlan
from .saving import PLAN_NAME
from .whole_files import write_whole

__all__ = [
    "PLAN_NAME",
    "known_plans",
    "leave_result",
    "plan_in",
    "saves",
    "tokenizer_of",
    "write_checkpoint",
    "write_record",
]


def saves(args: Any) -> bool:
    """Whether a Trainer saves anything while it trains.

    Args:
        args (`TrainingArguments`): the trainer's.
    """
    return str(getattr(args.save_strategy, "value", args.save_strategy)) != "no"


def plan_in(folder: Path) -> PruningPlan | None:
    """The plan of a checkpoint; `None` where nothing was cut yet.

    Args:
        folder (`Path`): of the checkpoint.
    """
    return PruningPlan.load(folder / PLAN_NAME) if (folder / PLAN_NAME).is_file() else None


def known_plans(folder: Path) -> Iterator[PruningPlan]:
    """Plans of the checkpoints that a Trainer left, by name.

    Args:
        folder (`Path`): its `output_dir`.
    """
    for path in sorted(folder.glob(f"checkpoint-*/{PLAN_NAME}")):
        yield PruningPlan.load(path)


def write_record(folder: Path, plan: PruningPlan, record: Mapping[str, Any]) -> None:
    """Write plan and history.

    Args:
        folder (`Path`): there already.
        plan ([`PruningPlan`]): everything that went.
        record (`dict`): JSON types.
    """
    plan.save(folder / PLAN_NAME)
    write_whole(folder / CONFIG_NAME, json.dumps(record, indent=2, sort_keys=True) + "\n")


def write_checkpoint(folder: Path, model: Any, plan: PruningPlan, record: Mapping[str, Any]) -> None:
    """Put plan and history beside the weights of a checkpoint; with LoRA also the base model they belong to.

    Args:
        folder (`Path`): of the checkpoint, with its weights.
        model (`nn.Module`): the trainer's.
        plan ([`PruningPlan`]): everything that went.
        record (`dict`): JSON types.
    """
    write_record(folder, plan, record)
    name_layers(folder / "config.json", base_of(model).config.num_hidden_layers)
    if is_peft(model):
        save_base(model, folder)


def leave_result(
    folder: Path,
    model: Any,
    plan: PruningPlan,
    record: Mapping[str, Any],
    *,
    weights: bool,
    tokenizer: Any,
    with_base: bool,
    hub_name: str | None,
) -> None:
    """Leave what opens as the result of a training: plan, history, config and card, and weights where asked for.

    Args:
        folder (`Path`): the trainer's `output_dir`, made where it is not there.
        model (`nn.Module`): the trainer's.
        plan ([`PruningPlan`]): everything that went.
        record (`dict`): JSON types.
        weights (`bool`): save the model and its tokenizer, too.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): to save.
        with_base (`bool`): save the base of adapters; factors that the user saves afterwards fit nothing else.
        hub_name (`str`, *optional*): what the card calls the model.
    """
    base = base_of(model)
    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        base.add_model_tags(list(MODEL_TAGS))
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    if is_peft(model) and with_base:
        save_base(model, folder)
    write_record(folder, plan, record)
    if is_peft(model):
        return  # with a config beside the factors, `from_pretrained` would look for weights there
    base.config.save_pretrained(folder)
    if (folder / "model.safetensors").exists():
        write_whole(folder / "README.md", str(model_card(folder, hub_name or folder.absolute().name)))


def tokenizer_of(dataloader: Any) -> Any:
    """The tokenizer of a Trainer that has it in its collator alone, which is the one that its checkpoints hold.

    Args:
        dataloader (`DataLoader`, *optional*): the trainer's.
    """
    collator = getattr(dataloader, "collate_fn", None)
    return getattr(getattr(collator, "data_collator", collator), "tokenizer", None)
