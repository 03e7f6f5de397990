"""What a Trainer cannot prune, refused when it is made or when training begins."""

from __future__ import annotations

from typing import Any

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from .config import PruningConfig
from .errors import ConfigError, UnsupportedModelError

__all__ = ["check_config", "check_engine", "check_masked", "has_budget"]

_WIDTHS = ("channel", "kv_group", "query_head", "expert", "expert_channel")


def has_budget(config: PruningConfig) -> bool:
    """Whether a config asks for a size in another way than by its pruning ratio."""
    return bool(config.budgets) or config.target_parameters is not None or config.target_bytes is not None


def check_config(config: PruningConfig, mode: str) -> None:
    """Refuse what a config asks for and training cannot do.

    Raises:
        ConfigError: with the field.
    """
    if config.layer_by_layer:
        raise ConfigError("`layer_by_layer` is for models that do not fit in memory, which cannot train. Leave it out.")
    if config.search is not None and mode == "progressive":
        raise ConfigError("a search needs the dense model at every trial. Use mode='once', or leave `search` out.")
    if config.search is not None and (config.search.pareto or config.search.ratios):
        raise ConfigError("`search.pareto` and `search.ratios` find many plans; the callback carries out one.")
    if mode == "progressive" and config.repair.regional_steps:
        raise ConfigError("`repair.regional_steps` trains layers, as the Trainer does after a cut anyway. Set it to 0.")


def check_engine(args: Any, model: Any, base: Any, mode: str) -> None:
    """Refuse engines, weights and adapters that cannot be cut.

    Args:
        args (`TrainingArguments`): the trainer's; accelerate's state is looked at, too.
        model (`nn.Module`): the trainer's model.
        base (`PreTrainedModel`): the same without adapters.
        mode (`str`): of the callback.

    Raises:
        ConfigError: DeepSpeed, FSDP, or a training that may begin twice.
        UnsupportedModelError: quantised weights, or adapters other than LoRA of matrices.
    """
    # A launcher's own config (`accelerate launch --use_fsdp`) is not in the trainer's arguments.
    launched = PartialState().distributed_type
    if getattr(args, "deepspeed", None) or launched == DistributedType.DEEPSPEED:
        raise ConfigError(
            "DeepSpeed partitions the weights, which can be neither cut nor masked under it. Prune before the Trainer "
            "is made, with hf_adaprune.prune()."
        )
    if getattr(args, "fsdp", None) or launched == DistributedType.FSDP:
        raise ConfigError(
            "FSDP shards the weights, which cannot be cut under it. Prune before the Trainer is made, with "
            "hf_adaprune.prune()."
        )
    if getattr(args, "auto_find_batch_size", False) and mode != "at_end":
        raise ConfigError(
            "`auto_find_batch_size` starts the training again with the model that is cut by then, and would cut it "
            "twice. Find the batch size first, and set per_device_train_batch_size."
        )
    if getattr(base, "is_quantized", False) or getattr(base.config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "quantised weights cannot be cut. Load the model in bfloat16 or float32, prune, and quantise afterwards."
        )
    for tuner in getattr(model, "peft_config", {}).values():
        if getattr(tuner.peft_type, "value", tuner.peft_type) != "LORA" or getattr(tuner, "use_dora", False):
            raise UnsupportedModelError(
                f"adapters of type {tuner.peft_type} cannot be cut with their weights. Use LoRA without DoRA."
            )
        for name in ("trainable_token_indices", "layer_replication", "alora_invocation_tokens"):
            if getattr(tuner, name, None) is not None:
                raise UnsupportedModelError(
                    f"adapters with `{name}` cannot be cut with their weights: they cannot be merged, or their base is "
                    "no model of its own. Leave it out of the LoraConfig."
                )
        if getattr(tuner, "lora_bias", False):
            bare = _without_bias(model)
            if bare:
                raise UnsupportedModelError(
                    f"`lora_bias` cannot be merged into {bare}, which has no bias, and a cut merges the factors while "
                    "it measures. Leave it out of the LoraConfig."
                )
    if any(type(module).__name__ == "ParamWrapper" for module in model.modules()):
        raise UnsupportedModelError(
            "LoRA factors of whole parameters, such as those of experts, cannot be cut with them. Name the attention's "
            "projections in `target_modules`, and leave `target_parameters` and 'all-linear' out."
        )


def _without_bias(model: Any) -> str:
    """The first matrix with factors that has no bias."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and getattr(module.get_base_layer(), "bias", None) is None:
            return str(name)
    return ""


def check_masked(config: PruningConfig, mode: str, args: Any, model: Any) -> None:
    """Refuse what cannot be masked while several processes train.

    Raises:
        ConfigError: with the field.
    """
    if mode == "at_end":
        return
    others = sorted(set(config.units) - set(_WIDTHS))
    if others:
        raise ConfigError(
            f"with several processes units are masked while training; {', '.join(others)} would leave "
            "parameters without gradients. Use channels and heads, or mode='at_end'."
        )
    if config.repair.method == "bias" or config.repair.intercept:
        raise ConfigError(
            "with several processes no parameter can be added while training, and this repair adds biases. Set "
            "repair.method to least_squares without intercept, or none, or use mode='at_end'."
        )
    if config.repair.regional_steps:
        raise ConfigError("`repair.regional_steps` is not possible with several processes. Set it to 0.")
    if getattr(args, "torch_compile", False):
        raise ConfigError("masks cannot change a compiled model. Leave out torch_compile, or use mode='at_end'.")
    if hasattr(model, "peft_config"):
        raise ConfigError("LoRA with several processes is not supported while training. Use mode='at_end'.")
