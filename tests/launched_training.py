"""What `test_training_parallel` starts as two processes: progressive pruning under DistributedDataParallel.

Every process writes the weights it ended with, and what the masked model computed before the cut, to its own file.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from conftest import logits_of, tokens
from trainings import progressive, pruning_config, training, weights

from hf_adaprune.training import AdaPrunerCallback


class Watched(AdaPrunerCallback):
    """Keeps the logits of the masked model, which is cut right after."""

    seen: torch.Tensor | None = None

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look, then do."""
        self.seen = logits_of(model.eval(), tokens())
        super().on_train_end(args, state, control, model=model, **kwargs)


def run(folder: Path, mode: str, resume: str | None) -> None:
    """Train, and write what was seen."""
    callback = Watched(pruning_config(), mode=mode, **({"at": (0.0, 0.5)} if mode == "progressive" else {}))
    trainer = training(folder / "run", callback, per_device_train_batch_size=2, save_steps=2)
    trainer.train(resume_from_checkpoint=resume)
    rank = trainer.args.process_index
    assert callback.plan is not None
    found = {
        "weights": weights(trainer.model),
        "plan": callback.plan.digest,
        "masked": callback.seen,
        "cut": logits_of(trainer.model.eval(), tokens()),
        "processes": trainer.args.world_size,
        "ratio": callback.done[-1]["pruning/ratio"],
    }
    torch.save(found, folder / f"rank{rank}{'_resumed' if resume else ''}.pt")


def refused(folder: Path) -> None:
    """A repair that adds biases cannot be masked."""
    callback = progressive(config=pruning_config(repair={"method": "bias", "min_tokens_per_column": 0}))
    training(folder / "run", callback).train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, what = Path(sys.argv[1]), sys.argv[2]
    if what == "refused":
        refused(where)
    else:
        run(where, what, sys.argv[3] if len(sys.argv) > 3 else None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
