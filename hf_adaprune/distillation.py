"""A `Trainer` that learns from a teacher: a model in memory, one on disk, or outputs that were cached."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer

from .adapters import base_of
from .distillation_loss import (
    DistillationTerms,
    FullTeaching,
    Teaching,
    TopTeaching,
    distill_hidden,
    distill_logits,
)
from .documents import eval_mode, input_device
from .errors import ConfigError, UnsupportedModelError
from .teacher_cache import CachedTeacher, vocabulary_of
from .token_blocks import TokenBlocks

__all__ = ["DistillationTrainer", "Windows"]

INDEX = "sample_index"
_TIED = "tie_last_hidden_states"  # a field of every config in transformers, which few have


class Windows(torch.utils.data.Dataset):
    """Token blocks as rows of a `Trainer`: ids, labels, the index that a cached teacher is asked by."""

    def __init__(self, blocks: TokenBlocks) -> None:
        self.blocks = blocks
        self.padded = not bool(blocks.attention_mask.all())

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, mask = self.blocks.input_ids[index], self.blocks.attention_mask[index]
        row = {"input_ids": ids, "labels": ids.masked_fill(~mask, -100), INDEX: torch.tensor(index)}
        # Without padding no mask is passed: kernels are faster without.
        return {**row, "attention_mask": mask.long()} if self.padded else row


@dataclass(frozen=True, eq=False)
class _Split:
    """A causal language model as what makes hidden states and the linear head on them."""

    base: Any
    head: torch.nn.Linear


def _split(model: Any, ids: torch.Tensor) -> _Split | None:
    """The two parts of a model, where running them one after the other is what the model does; else `None`."""
    inner = base_of(model)  # what peft puts around it has another base_model
    head, base = inner.get_output_embeddings(), inner.base_model
    # A head that is quantised, has an adapter, or whose logits are squashed is left to the model.
    squashed = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if type(head) is not torch.nn.Linear or base is inner or squashed or not hasattr(inner, "get_decoder"):
        return None
    with eval_mode(model), torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        found = head(base(input_ids=ids, use_cache=False).last_hidden_state)
    return _Split(base, head) if torch.equal(expected.float(), found.float()) else None


@contextmanager
def _before_the_last_norm(models: Iterable[Any]) -> Iterator[None]:
    """The last of all hidden states is what the last layer gives; transformers has it normed in its place otherwise.

    Raises:
        ConfigError: a model whose code does not tell them apart.
    """
    configs: dict[int, Any] = {}
    for model in models:
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else model.base_model
        if "hidden_states" not in (getattr(decoder, "_can_record_outputs", None) or {}):
            raise ConfigError(
                f"{type(model).__name__} gives its last hidden states normed only, and no other layer's are. Compare "
                "its last layer with the last layer, or leave `hidden_layers` out ('last' in a RecoveryConfig)."
            )
        configs[id(decoder.config)] = decoder.config
    before = [(config, vars(config).get(_TIED)) for config in configs.values()]
    try:
        for config, _ in before:
            setattr(config, _TIED, False)
        yield
    finally:
        for config, own in before:
            if own is None:
                delattr(config, _TIED)
            else:
                setattr(config, _TIED, own)


class DistillationTrainer(Trainer):
    r"""A [`~transformers.Trainer`] whose loss is the divergence from a teacher, mixed with the language-model loss.

    `alpha T^2 KL(teacher || student) + (1 - alpha) CE`, the mean over all next-token positions of a step (labels of
    -100 are none), whatever the batch size and the gradient accumulation.

    Args:
        teacher (`PreTrainedModel`, `str` or [`CachedTeacher`]): the dense model, its folder or id on the Hub (loaded on
            first use, in its own dtype), or what [`cache_teacher`] wrote. A cached teacher needs a column
            `sample_index` in the data set, which [`Windows`] brings.
        temperature (`float`, *optional*, defaults to 1.0): of both distributions.
        alpha (`float`, *optional*, defaults to 1.0): share of the divergence.
        hidden_weight (`float`, *optional*, defaults to 0.0): weight of the squared distance between hidden states,
            relative to the squared length of the teacher's.
        hidden_layers (`dict[int, int]`, *optional*): layers of the student and those of the teacher that their outputs
            are compared with, counted from 0; the last hidden states alone where not given. The last layers of both
            are compared behind the final norm, unless the last layer of one has another partner: then all are compared
            as the layers give them.
        fused (`bool`, *optional*): compute head and loss together, so that full logits never exist. Where it is not
            given, it is done for every model for which it is the same.
        args, kwargs: those of the `Trainer`.

    Raises:
        ConfigError: numbers out of range, layers that are not there, smoothed labels, or a teacher of another
            vocabulary.

    Example:

    ```python
    trainer = DistillationTrainer(student, args, train_dataset=Windows(blocks), teacher=dense, alpha=0.9)
    trainer.train()
    ```
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | str | os.PathLike[str] | CachedTeacher,
        temperature: float = 1.0,
        alpha: float = 1.0,
        hidden_weight: float = 0.0,
        hidden_layers: Mapping[int, int] | None = None,
        fused: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self.terms = DistillationTerms(temperature, alpha)
        if hidden_weight < 0:
            raise ConfigError(f"`hidden_weight` should be at least 0. Found {hidden_weight!r}.")
        self.hidden_weight, self.hidden_layers = hidden_weight, dict(hidden_layers or {})
        self.fused = fused
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ConfigError(
                "`label_smoothing_factor` is no part of this loss: the teacher's distribution is what softens labels. "
                f"Set it to 0, and lower `alpha` to mix in the labels. Found {self.args.label_smoothing_factor!r}."
            )
        self._student = self.accelerator.unwrap_model(self.model)
        if hasattr(self._student, "get_base_model"):
            self._student = self._student.get_base_model()
        self._check_layers("student", self._student, self.hidden_layers)
        # Positions are counted here, over the labels moved by one, whatever the model's class is known for.
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, True
        self._splits: dict[int, _Split | None] = {}
        self.tokens_seen = 0
        self._terms_seen = torch.zeros(3, dtype=torch.float64)
        self.teacher = teacher
        if isinstance(teacher, CachedTeacher):
            self._check_cache(teacher)
            self._check_windows(self.train_dataset)
            self._check_windows(self.eval_dataset)
        elif isinstance(teacher, torch.nn.Module):
            self._take_teacher(teacher)

    def _check_cache(self, teacher: CachedTeacher) -> None:
        self._check_vocabulary(int(teacher.facts["vocabulary"]))
        if teacher.facts["temperature"] != self.terms.temperature:
            raise ConfigError(
                f"the teacher was cached at temperature {teacher.facts['temperature']:g} and the loss asks for "
                f"{self.terms.temperature:g}. Cache it at that temperature, or use the cache's."
            )
        if self.hidden_weight:
            raise ConfigError("`hidden_weight` needs a teacher in memory: a cache holds no hidden states. Set it to 0.")

    def _check_windows(self, dataset: Any) -> None:
        """A cache answers by a window's number; of other windows it would say what it saw in its own."""
        for own in dataset.values() if isinstance(dataset, Mapping) else [dataset]:
            blocks = getattr(own, "blocks", None)
            if not isinstance(self.teacher, CachedTeacher) or blocks is None:
                continue
            if blocks.digest != self.teacher.facts["sha256"] and not self._begins_with(blocks):
                raise ConfigError(
                    "these windows are not those that the teacher was cached for. Cache it for them, or evaluate with "
                    "a DistillationTrainer that has the teacher itself."
                )

    def _begins_with(self, blocks: TokenBlocks) -> bool:
        """Whether windows are the first of those that were cached: their numbers are the same."""
        known = self.teacher.blocks if isinstance(self.teacher, CachedTeacher) else None
        return known is not None and known.select(slice(0, len(blocks))).digest == blocks.digest

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Those of the `Trainer`, of windows that a cached teacher knows."""
        self._check_windows(eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Those of the `Trainer`, of windows that a cached teacher knows."""
        self._check_windows(test_dataset)
        return super().get_test_dataloader(test_dataset)

    def _check_vocabulary(self, size: int) -> None:
        own = vocabulary_of(self._student)
        if size != own:
            raise ConfigError(
                f"teacher and student should have one vocabulary. Found {size} tokens (teacher) and {own} (student). "
                "Name the model that the student was pruned from."
            )

    def _check_layers(self, role: str, model: Any, layers: Iterable[Any]) -> int:
        """Refuse layers that a model does not have; the number of those that it has."""
        count = int(model.config.get_text_config().num_hidden_layers)
        for layer in layers:
            if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < count:
                raise ConfigError(
                    f"`hidden_layers` should name layers of the {role} from 0 to {count - 1}. Found {layer!r}."
                )
        return count

    def _comparable(self) -> AbstractContextManager[None]:
        """For forward passes: a last layer shows itself before the final norm where its partner is an inner one."""
        if not self.hidden_weight or not self.hidden_layers:
            return nullcontext()
        student, teacher = self._student, self._dense()
        own = self._check_layers("student", student, self.hidden_layers) - 1
        other = self._check_layers("teacher", teacher, self.hidden_layers.values()) - 1
        alike = all((mine == own) == (theirs == other) for mine, theirs in self.hidden_layers.items())
        return nullcontext() if alike else _before_the_last_norm((student, teacher))

    def _take_teacher(self, teacher: Any) -> Any:
        self._check_vocabulary(vocabulary_of(teacher))
        self._check_layers("teacher", teacher, self.hidden_layers.values())
        if self.place_model_on_device and not hasattr(teacher, "hf_device_map"):
            teacher.to(self.args.device)
        self.teacher = teacher.eval()
        return self.teacher

    def _dense(self) -> Any:
        assert not isinstance(self.teacher, CachedTeacher)
        if isinstance(self.teacher, torch.nn.Module):
            return self.teacher
        from transformers import AutoModelForCausalLM

        try:
            return self._take_teacher(AutoModelForCausalLM.from_pretrained(self.teacher, dtype="auto"))
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(f"the teacher {self.teacher} could not be loaded: {error}") from error

    def _parts(self, model: Any, ids: torch.Tensor) -> _Split | None:
        if self.fused is False:
            return None
        if id(model) not in self._splits:
            self._splits[id(model)] = _split(model, ids[:1, :8])
        return self._splits[id(model)]

    def _asked(self, parts: _Split | None) -> dict[str, bool]:
        # Without a split the last hidden states are only among all of them.
        needed = self.hidden_weight and (self.hidden_layers or not parts)
        return {"output_hidden_states": True} if needed else {}

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # transformers initialises it with None, so its type says that it never is a list.
        columns: Any = self._signature_columns
        if INDEX not in columns:
            columns.append(INDEX)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; see the class. Arguments as in [`~transformers.Trainer.compute_loss`]."""
        inputs = dict(inputs)
        index, labels = inputs.pop(INDEX, None), inputs.pop("labels", None)
        if labels is None:
            raise ConfigError("the data should bring `labels`: the input ids, with -100 where nothing is predicted.")
        inputs["use_cache"] = False
        chosen = labels[:, 1:] != -100
        targets = labels[:, 1:][chosen]
        with self._comparable(), self.accelerator.autocast():
            whole = model is self._student or getattr(model, "get_base_model", lambda: None)() is self._student
            # A wrapped model (several processes) has to be entered by its front door.
            parts = self._parts(self._student, inputs["input_ids"]) if whole and not return_outputs else None
            outputs = (parts.base if parts else model)(**inputs, **self._asked(parts))
        with self._comparable():
            teaching, dense = self._teach(inputs, chosen, index)
        with self.accelerator.autocast():
            if parts:
                hidden = outputs.last_hidden_state[:, :-1][chosen]
                sums = distill_hidden(hidden, parts.head.weight, parts.head.bias, teaching, targets, self.terms)
            else:
                sums = distill_logits(outputs.logits[:, :-1][chosen], teaching, targets, self.terms)
        loss = sums[0]
        if self.hidden_weight:
            loss = loss + self.hidden_weight * self._distance(outputs, dense, chosen)
        count = len(targets) if num_items_in_batch is None else num_items_in_batch
        if model.training:
            own = [sums[1].detach(), sums[2].detach(), torch.tensor(len(targets))]
            self.tokens_seen += int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else labels.numel()
            self._terms_seen += torch.stack([value.cpu().double() for value in own])
        loss = loss / max(count, 1) if isinstance(count, int) else loss / count.clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _teach(
        self, inputs: Mapping[str, Any], chosen: torch.Tensor, index: torch.Tensor | None
    ) -> tuple[Teaching | None, Any]:
        """What the teacher says at the chosen positions, and its own outputs where there are any."""
        if not self.terms.alpha and not self.hidden_weight:
            return None, None
        if isinstance(self.teacher, CachedTeacher):
            if index is None:
                raise ConfigError(
                    f"a cached teacher needs a column `{INDEX}` in the data set; hf_adaprune's Windows has it."
                )
            tokens, values = self.teacher.read(index)
            if tokens.shape[1] != chosen.shape[1]:
                raise ConfigError(
                    f"batches should be as long as the windows that were cached ({tokens.shape[1] + 1}). Found "
                    f"{chosen.shape[1] + 1}."
                )
            where = chosen.to(tokens.device)
            return TopTeaching(tokens[where].to(chosen.device), values[where].to(chosen.device)), None
        dense = self._dense()
        device = input_device(dense)
        own = {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
        # The teacher's precision is its own.
        with torch.no_grad(), torch.autocast(device.type, enabled=False) if device.type != "mps" else nullcontext():
            parts = self._parts(dense, own["input_ids"])
            outputs = (parts.base if parts else dense)(**own, **self._asked(parts))
            if not parts:
                return FullTeaching(outputs.logits[:, :-1][chosen].to(chosen.device)), outputs
            hidden = outputs.last_hidden_state[:, :-1][chosen].to(chosen.device)
            return FullTeaching(hidden, parts.head.weight, parts.head.bias), outputs

    def _distance(self, student: Any, teacher: Any, chosen: torch.Tensor) -> torch.Tensor:
        """Summed squared distance of hidden states over the squared length of the teacher's, mean over layers."""
        if self.hidden_layers:
            pairs = [
                (student.hidden_states[own + 1], teacher.hidden_states[other + 1])
                for own, other in self.hidden_layers.items()
            ]
        else:
            pairs = [(_last(student), _last(teacher))]
        total = torch.zeros((), device=chosen.device)
        for own, other in pairs:
            mine, theirs = own[:, :-1][chosen].float(), other[:, :-1].to(own.device)[chosen].float()
            lengths = theirs.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            total = total + ((mine - theirs).square().sum(-1) / lengths).sum().to(total.device)
        return total / len(pairs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the `Trainer` does, with the mean divergence and cross entropy since the last time."""
        divergence, entropy, count = self._terms_seen.tolist()
        if "loss" in logs and count:
            logs |= {"kl": divergence / count} if self.terms.alpha else {}
            logs |= {"cross_entropy": entropy / count} if self.terms.alpha < 1 else {}
            self._terms_seen.zero_()
        super().log(logs, start_time)


def _last(outputs: Any) -> torch.Tensor:
    found: torch.Tensor | None = getattr(outputs, "last_hidden_state", None)
    return outputs.hidden_states[-1] if found is None else found
