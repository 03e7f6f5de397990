"""What `test_training_parallel` starts as two processes: progressive pruning and recovery, DistributedDataParallel.

Every process writes the weights it ended with, and what the masked model computed before the cut, to its own file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from conftest import logits_of, tokens
from trainings import LENGTH, progressive, pruning_config, regional_config, training, weights

from hf_adaprune import recording, recover, sweeps
from hf_adaprune.training import AdaPrunerCallback

RECOVERY_TOKENS = 6 * 8 * 32  # six steps of eight windows
FORWARD_TOKENS = 2 * LENGTH  # two windows in a batch, so that there are batches to share


class Watched(AdaPrunerCallback):
    """Keeps the logits of the masked model, which is cut right after, and the calibration windows that ran here."""

    seen: torch.Tensor | None = None

    def watch(self) -> list[list[int]]:
        """From now on: indices of windows, batch by batch, of every pass for statistics."""
        ran: list[list[int]] = []
        run = recording._Recorder.run

        def seen(recorder: Any, indices: torch.Tensor, backward: bool) -> None:
            if recorder.blocks.digest == self._cuts.blocks[0].digest and not backward:
                ran.append(indices.tolist())
            run(recorder, indices, backward)

        recording._Recorder.run, sweeps.FORWARD_TOKENS = seen, FORWARD_TOKENS
        return ran

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look, then do."""
        self.seen = logits_of(model.eval(), tokens())
        super().on_train_end(args, state, control, model=model, **kwargs)


def run(folder: Path, mode: str, resume: str | None) -> None:
    """Train, and write what was seen."""
    if mode == "untrained":  # so that one process and two have the same weights at the end
        callback, changes = Watched(regional_config(), mode="at_end"), {"learning_rate": 0.0}
    else:
        callback = Watched(pruning_config(), mode=mode, **({"at": (0.0, 0.5)} if mode == "progressive" else {}))
        changes = {}
    trainer = training(folder / "run", callback, per_device_train_batch_size=2, save_steps=2, **changes)
    if mode == "progressive":
        callback.trainer = trainer  # which a copy of the model must not take with it
    ran = callback.watch()
    trainer.train(resume_from_checkpoint=resume)
    rank = trainer.args.process_index
    assert callback.plan is not None
    found = {
        "weights": weights(trainer.model),
        "plan": callback.plan.digest,
        "first": callback.done[0]["plan"],
        "ran": ran,
        "windows": len(callback._cuts.blocks[0]) if callback._cuts.blocks else 0,
        "masked": callback.seen,
        "cut": logits_of(trainer.model.eval(), tokens()),
        "parameters": sum(value.numel() for value in trainer.model.parameters()),
        "processes": trainer.args.world_size,
        "ratio": callback.done[-1]["pruning/ratio"],
    }
    torch.save(found, folder / f"rank{rank}{'_resumed' if resume else ''}.pt")


def refused(folder: Path) -> None:
    """A repair that adds biases cannot be masked."""
    callback = progressive(config=pruning_config(repair={"method": "bias", "min_tokens_per_column": 0}))
    training(folder / "run", callback).train()


def recovered(folder: Path, minutes: float | None = None) -> None:
    """A recovery of half the windows at once in each process."""
    from test_recovery import pruned, short, text, tiny_model, tiny_tokenizer

    length = {"tokens": RECOVERY_TOKENS} if minutes is None else {"tokens": None, "minutes": minutes}
    config = short(batch_size=4, **length)
    found = recover(pruned().model, tiny_tokenizer(), tiny_model("llama"), config, sources=text())
    rank = int(torch.distributed.get_rank())
    said = {"weights": weights(found.model), "tokens": found.tokens, "steps": found.steps, "log": found.log}
    torch.save({**said, "held_out": found.held_out}, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, what = Path(sys.argv[1]), sys.argv[2]
    if what == "refused":
        refused(where)
    elif what == "recover":
        recovered(where)
    elif what == "minutes":
        recovered(where, 0.1)
    else:
        run(where, what, sys.argv[3] if len(sys.argv) > 3 else None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
