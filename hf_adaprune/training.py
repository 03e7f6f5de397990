"""`AdaPrunerCallback`: pruning inside `Trainer`: before, during or after training.

On one process the model is cut while it trains; optimizer, schedule and precision go on. With several processes units
are masked until the end, and cut then: a wrapped model cannot change its shapes.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .adapters import base_of, is_peft
from .allocation_checks import tell_unread_fields
from .config import PruningConfig
from .costs import Costs
from .cut_schedule import CutSchedule
from .errors import BudgetError, CheckpointError, ConfigError
from .fields import check_whole
from .model_config import MODEL_TAGS, PROVENANCE_KEY
from .parallel import processes
from .plan import PruningPlan
from .public import base_model_name
from .restoring import Restorer
from .search_checks import check_reach, check_search
from .searching import shared_costs
from .selection import check_selection
from .stages import check_weights, even_plan
from .training_checks import check_config, check_engine, check_masked, has_budget
from .training_cuts import Cuts
from .training_files import known_plans, leave_result, plan_in, saves, tokenizer_of, write_checkpoint, write_record

if TYPE_CHECKING:
    from .architectures import Architecture

__all__ = ["AdaPrunerCallback"]

logger = logging.getLogger(__name__)

# In the trainer's state. The name of the class would have transformers make a callback of default arguments from it,
# where `restore_callback_states_from_checkpoint` is set.
STATE_NAME = "hf_adaprune"
_running: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class AdaPrunerCallback(TrainerCallback):
    """Prunes the model of a `Trainer` (also trl's `SFTTrainer`; all weights or LoRA).

    Mode `progressive` (Adapt-Pruner, arXiv 2502.03460): small cuts with training in between. Mode `once`: one cut
    before the first step, by any recipe or search. Mode `at_end`: one cut after the last step.

    On one process shapes change in flight: moments of the optimizer are cut with their parameters, schedule, gradient
    accumulation, gradient checkpointing and mixed precision go on. Under DDP the units are masked and the model is cut
    when training ends; FSDP and DeepSpeed are refused. A run that is resumed at any step ends with the weights of one
    that was not interrupted (a Trainer with `model_init` cannot resume after a cut: it loads the checkpoint before any
    event, into a model that nobody else has seen). What it did is in `state.log_history`, in `pruning_config.json` and
    `pruning_plan.json` of every checkpoint and, at the end, of `output_dir`.

    Args:
        config ([`PruningConfig`], `dict` or `str`, *optional*): what to prune and how, a config or the name of a
            recipe; the recipe `default` where not given. `pruning_ratio` is that of the end.
        mode (`str`, *optional*, defaults to `"progressive"`): `progressive`, `once` or `at_end`.
        cuts, share, every, at, spacing, targets: when progressive cuts happen and how far they go, see
            [`CutSchedule`].
        data (`str`, *optional*, defaults to `"train"`): where statistics come from: `train` (samples of the trainer's
            own data set, through its collator; `calibration.domain_weights` and `clusters` say nothing of them) or
            `calibration` (the config's sources).
        tokenizer (`PreTrainedTokenizerBase`, *optional*): for calibration sources and searches; the trainer's
            `processing_class` where not given.
        samples (`int`, *optional*): calibration windows per cut; the config's, but at most 64 (16 of them with
            gradients) per progressive cut, where not given.
        reset_best (`bool`, *optional*, defaults to `True`): a cut forgets the best checkpoint so far, so that
            `load_best_model_at_end` chooses among those of the final size. With `False` it may go back to a denser one.
        architecture ([`Architecture`], *optional*): of a family that is not built in.
        trainer (`Trainer`, *optional*): whose `log` also gets the numbers of every cut, which reach its reporters (such
            as tensorboard) then; without it they are in the trainer's state, and the console's next line shows those of
            the last cut before it (none of a cut at the end). Set `callback.trainer = trainer` after both are made.

    Raises:
        ConfigError, UnsupportedModelError, BudgetError: when the trainer is made, or when training begins.

    Example:

    ```python
    from hf_adaprune import AdaPrunerCallback, PruningConfig

    callback = AdaPrunerCallback(PruningConfig.recipe("adapt-pruner", pruning_ratio=0.4))
    Trainer(model, args, train_dataset=dataset, callbacks=[callback]).train()
    ```
    """

    def __init__(
        self,
        config: PruningConfig | Mapping[str, Any] | str | None = None,
        *,
        mode: str = "progressive",
        cuts: int | None = None,
        share: float = 0.05,
        every: int | None = None,
        at: tuple[float, ...] = (),
        spacing: str = "linear",
        targets: str = "geometric",
        data: str = "train",
        tokenizer: Any = None,
        samples: int | None = None,
        reset_best: bool = True,
        architecture: Architecture | None = None,
        trainer: Any = None,
    ) -> None:
        schedule = CutSchedule(mode, cuts, share, every, tuple(at), spacing, targets)
        config = PruningConfig.read("default" if config is None else config)
        self.data, self.reset_best = data, reset_best
        self.trainer, self.tokenizer = trainer, tokenizer
        if data not in ("train", "calibration"):
            raise ConfigError(f"`data` should be 'train' or 'calibration'. Found {data!r}.")
        if samples is not None:
            check_whole("samples", samples, 1, what="calibration windows per cut")
        check_config(config, mode)
        self._cuts = Cuts(config, schedule, samples, architecture)
        self._out_of_reach: BudgetError | None = None
        self.saves_base = True  # of adapters; `recover` merges its own, and its Trainer's folder goes
        self.done: list[dict[str, Any]] = []
        self.steps: tuple[int, ...] = ()
        self.ratios: tuple[float, ...] = ()
        self._restorer: Restorer | None = None
        self._text: dict[str, Any] = {}
        self._base_model = ""
        self._pending: list[dict[str, float]] = []
        self._folder = ""

    @property
    def config(self) -> PruningConfig:
        """What to prune and how, as it was given; its cuts are made by it, so it stays."""
        return self._cuts.config

    @property
    def schedule(self) -> CutSchedule:
        """When cuts happen and how far they go, as it was given."""
        return self._cuts.schedule

    @property
    def first(self) -> dict[str, int]:
        """Elements of decoder and model, and bytes, before the first cut."""
        return self._cuts.first

    @property
    def plan(self) -> PruningPlan | None:
        """Everything that has been removed so far, as one plan for the model that was given."""
        return self._cuts.plan

    # -- events -------------------------------------------------------------------------------------------------------

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Refuse what cannot be pruned, and let checkpoints of other sizes be loaded."""
        base = base_of(model)
        check_engine(args, model, base, self.schedule.mode)
        sites = self._cuts.sites(base)
        check_weights(sites)
        if self.config.search is not None:
            check_search(self.config)
            check_selection(self.config)
        tell_unread_fields(self.config)
        self._out_of_reach = None  # of another Trainer
        try:
            check_reach(sites, self.config, Costs.of(sites, self.config))
        except BudgetError as error:
            # A model that was cut already may be a checkpoint's own, with which its run goes on.
            if base.config.__dict__.get(PROVENANCE_KEY) is None:
                raise
            self._out_of_reach = error
        self._folder = args.output_dir
        self._watch(base, optimizer)

    def _watch(self, base: Any, optimizer: Any) -> None:
        """Let the model load checkpoints of other sizes, and an optimizer of the user's own follow it there."""
        if self._restorer is not None:
            self._restorer.close()
        architecture = self._cuts.sites(base).architecture
        self._restorer = Restorer(base, architecture, lambda: known_plans(Path(self._folder)), optimizer)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Make the schedule or take it from the checkpoint, read texts, and cut what is due."""
        base = base_of(model)
        other = _running.get(base)
        if other is not None and other[0]() is state and other[1] is not self:
            name = type(self).__name__
            raise ConfigError(f"this Trainer has {name} twice. Leave one of them; its schedule may have many cuts.")
        _running[base] = (weakref.ref(state), self)
        if self._restorer is not None and not self._restorer.watches(base):
            # `model_init` made another one since: when a run resumes, the Trainer loads its checkpoint into such a
            # model before any event, so that nobody can give it the sizes.
            self._watch(base, None)
            if saves(args) and state.global_step == 0:
                logger.warning(
                    "a Trainer with `model_init` cannot resume from checkpoints after a cut. Give it `model` for a run "
                    "that may have to; a run that began with model_init goes on with model=model_init()."
                )
        self._cuts.workers = processes()
        if self._cuts.workers.count > 1:
            check_masked(self.config, self.schedule.mode, args, model)
        self._take_state(state, base)
        if self._out_of_reach is not None and not self.done:
            raise self._out_of_reach
        state.stateful_callbacks[STATE_NAME] = self._state()
        if len(self.done) < len(self.steps):
            self._cuts.read(
                base, self.tokenizer or processing_class, train_dataloader,
                from_sources=self.data == "calibration" or self.config.search is not None,
            )  # fmt: skip
        self._cuts.mask(base)
        self._cut_what_is_due(state, model, optimizer, processing_class)

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Cut where the schedule says so."""
        progressive = self.schedule.mode == "progressive"
        if progressive and self._cut_what_is_due(state, model, optimizer, processing_class):
            control.should_log = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Let the console show the numbers of the last cut."""
        if logs is not None and self.trainer is None:
            for numbers in self._pending:
                logs.update({key: value for key, value in numbers.items() if key.startswith("pruning/")})
        self._pending = []

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Put plan and history beside the weights of a checkpoint; with LoRA also the base model they belong to."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or not folder.is_dir() or self.plan is None:
            return
        write_checkpoint(folder, model, self.plan, self.record(model))

    def on_train_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        optimizer: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Cut what was masked or was to be cut last, and leave plan, config and history in the output folder."""
        base = base_of(model)
        late = self.schedule.mode == "at_end" and len(self.done) < len(self.steps)
        # Of adapters the best factors alone come back: their shapes let them, and the base stays cut.
        whole = not self._cuts.is_masked and not is_peft(model)
        if args.load_best_model_at_end and state.best_model_checkpoint is not None and whole:
            self._take_plan_of(Path(state.best_model_checkpoint))
        if not late and len(self.done) < len(self.steps):
            logger.warning(
                "training ended after %d of %d cuts, with %.1f %% of the decoder removed and not %.1f %%.",
                len(self.done), len(self.steps),
                100 * next((cut["pruning/ratio"] for cut in reversed(self.done) if cut), 0.0), 100 * self.ratios[-1],
            )  # fmt: skip
        if late:
            self._cut(state, model, None, processing_class, self.ratios[-1])
        elif self._cuts.is_masked and self.plan is not None:
            self._cuts.finish(model)
        _running.pop(base, None)
        if self.plan is None or not state.is_world_process_zero:
            return
        # What was cut after the last step is in no checkpoint of the Trainer.
        leave_result(
            Path(args.output_dir), model, self.plan, self.record(model),
            weights=late or self._cuts.is_masked or saves(args),
            tokenizer=processing_class or tokenizer_of(kwargs.get("train_dataloader")),
            with_base=self.saves_base, hub_name=args.hub_model_id,
        )  # fmt: skip

    def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Plan and history go up with the model."""
        if self.plan is not None and state.is_world_process_zero:
            if is_peft(model):
                logger.warning(
                    "LoRA factors of a cut model fit the base in the folder `base` beside them alone, and name it by "
                    "its place on this machine. Push merge_and_unload() of the model for one that loads by its name."
                )
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            write_record(Path(args.output_dir), self.plan, self.record(model))
            base_of(model).add_model_tags(list(MODEL_TAGS))

    # -- the schedule -------------------------------------------------------------------------------------------------

    def _asked(self) -> dict[str, Any]:
        schedule = {
            key: list(value) if isinstance(value, tuple) else value for key, value in vars(self.schedule).items()
        }
        asked = {**self.config.to_dict(), "schedule": schedule, "data": self.data, "samples": self._cuts.samples}
        asked.pop("version")
        asked["calibration"].pop("report")
        return asked

    def _state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback, as JSON types."""
        return {
            "asked": self._asked(),
            "first": dict(self.first),
            "text": self._text_facts(),
            "base_model": self._base_model,
            "steps": list(self.steps),
            "ratios": list(self.ratios),
            "done": copy.deepcopy(self.done),
            "saved_plan": None if self.plan is None else self.plan.to_dict(),
        }

    def _take_state(self, state: Any, base: Any) -> None:
        """Begin anew, or go on as the checkpoint says."""
        kept = (state.stateful_callbacks or {}) if state.global_step > 0 else {}
        # Checkpoints of earlier commits have the same under the name of the class.
        saved = kept.get(STATE_NAME) or kept.get(type(self).__name__, {}).get("attributes", {})
        if saved.get("steps"):
            asked = self._asked()
            different = sorted(key for key in asked if saved["asked"].get(key) != asked[key])
            if different:
                raise CheckpointError(
                    f"the checkpoint was made with another recipe: {', '.join(different)} differ. Give the callback "
                    "the same arguments, or start a new run from the checkpoint's model."
                )
            self._cuts.begin(base)
            self._cuts.first, self.done = dict(saved["first"]), list(saved["done"])
            self._text, self._base_model = saved["text"], saved["base_model"]
            self.steps, self.ratios = tuple(saved["steps"]), tuple(saved["ratios"])
            plan = saved["saved_plan"]
            self._cuts.plan = None if plan is None else PruningPlan.from_dict(plan)
            return
        sites = self._cuts.sites(base)
        self.done = []
        self._cuts.begin(base)
        self._base_model = base_model_name(base)
        costs = shared_costs(sites, self.config, self._cuts.workers)  # all have to cut at the same steps
        whole = even_plan(sites, self.config, costs)
        ratio = (
            costs.removed(whole) / sites.decoder_parameters if has_budget(self.config) else self.config.pruning_ratio
        )
        self.ratios = self.schedule.ratios(ratio)
        self.steps = self.schedule.steps(ratio, state.max_steps)

    def _take_plan_of(self, best: Path) -> None:
        """The model is that of the best checkpoint again, which may be from before a cut."""
        step = int(best.name.rpartition("-")[2])
        self.done = [cut for cut in self.done if cut.get("step", 0) <= step]
        self._cuts.plan = plan_in(best)

    def _cut_what_is_due(self, state: Any, model: Any, optimizer: Any, tokenizer: Any) -> bool:
        if self.schedule.mode == "at_end":
            return False
        due = sum(step <= state.global_step for step in self.steps)
        if due <= len(self.done):
            return False
        # A run that goes on from a checkpoint without this callback may owe several: one cut goes as far.
        self._cut(state, model, optimizer, tokenizer, self.ratios[due - 1])
        while len(self.done) < due:
            self.done.insert(-1, {})
        state.stateful_callbacks[STATE_NAME] = self._state()
        return True

    def _cut(self, state: Any, model: Any, optimizer: Any, tokenizer: Any, ratio: float) -> None:
        numbers, plan = self._cuts.cut(
            model, optimizer, self.tokenizer or tokenizer, ratio, is_last=ratio == self.ratios[-1]
        )
        self._note(state, numbers, plan)

    # -- what is left behind ------------------------------------------------------------------------------------------

    def _note(self, state: Any, numbers: dict[str, float], plan: PruningPlan) -> None:
        self.done.append({"step": state.global_step, "plan": plan.digest, **numbers})
        logger.info(
            "step %d: %.1f %% of the decoder removed, loss %.4f -> %.4f", state.global_step,
            100 * numbers["pruning/ratio"], numbers["pruning/loss_before"], numbers["pruning/loss_after"],
        )  # fmt: skip
        if self.reset_best and state.best_metric is not None:
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None
        if self.trainer is not None:
            self.trainer.log(dict(numbers))
        else:
            state.log_history.append({**numbers, "epoch": state.epoch, "step": state.global_step})
            self._pending.append(numbers)

    def record(self, model: Any) -> dict[str, Any]:
        """What `pruning_config.json` says of the run so far, as JSON types.

        Args:
            model (`PreTrainedModel`): as it is now.
        """
        from . import __version__

        assert self.plan is not None
        after = self._cuts.sizes(base_of(model))
        return {
            "version": __version__,
            "config": self.config.to_dict(),
            "plan": self.plan.to_dict(),
            "plan_digest": self.plan.digest,
            "pruning_ratio": 1 - after["decoder"] / self.first["decoder"],
            "before": dict(self.first),
            "after": after,
            "calibration": self._text_facts(),
            "base_model": self._base_model,
            "schedule": self._asked()["schedule"],
            "cuts": [cut for cut in self.done if cut],
        }

    def _text_facts(self) -> dict[str, Any]:
        """What the calibration windows were, of this run or of the one that it goes on from."""
        blocks = (self._cuts.blocks or (None, None))[0]
        return self._text if blocks is None else blocks.facts()
