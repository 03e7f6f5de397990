"""The fuzz laws of the tests with as many examples as one likes, counted.

    python -m benchmarks.fuzz --examples 2000 --out benchmarks/results/fuzz.json

Every example stands in the place of a plan, a config, a journal, a checkpoint's records ...: it is read, or refused by
an error of the package; anything else is a failure, and listed. Needs the tests beside this folder and hypothesis.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .machine import commit, processor, versions

__all__ = ["count"]

TESTS = Path(__file__).parent.parent / "tests"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000, help="of every kind")
    parser.add_argument("--kinds", nargs="+", help="all where not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of the counts")
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        kinds = count(Path(folder), args.examples, args.seed, args.kinds)
    found = {
        "kinds": kinds,
        "inputs": sum(own["inputs"] for own in kinds.values()),
        "reads": sum(own["taken"] + own["refused"] for own in kinds.values()),
        "failures": sum(len(own["failures"]) for own in kinds.values()),
        "seconds": round(time.perf_counter() - started, 1),
        "seed": args.seed,
        "machine": {"commit": commit(), "versions": versions(), "cpu": processor()},
    }
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    if found["failures"]:
        raise SystemExit(f"{found['failures']} failures")


def count(folder: Path, examples: int, seed: int, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Draw examples of every kind and count what became of them.

    Args:
        folder (`Path`): empty, to write in.
        examples (`int`): of every kind.
        seed (`int`): of hypothesis.
        names (`list[str]`, *optional*): kinds; all where not given.

    Returns:
        `dict[str, dict[str, Any]]`: by kind the inputs, how many reads took one and how many refused it, and failures
            with the smallest input that shows each.
    """
    import hypothesis

    sys.path.insert(0, str(TESTS))
    from fuzzing import KINDS  # type: ignore[import-not-found]

    from hf_adaprune import PruningConfig, prune

    from .smoke import smoke_setting

    setting = smoke_setting()
    pruned = prune(setting.model, setting.tokenizer, PruningConfig.recipe("magnitude", pruning_ratio=0.3))
    checkpoint = pruned.save_pretrained(folder / "checkpoint")
    found = {}
    for name in names or KINDS:
        kind, own = KINDS[name], _Counted(KINDS[name], folder, checkpoint)
        quiet = hypothesis.settings(
            max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
        )
        law = quiet(hypothesis.given(given=kind.inputs(checkpoint))(own.law))
        failures = []
        try:
            hypothesis.seed(seed)(law)()
        except ExceptionGroup as group:
            failures = [_told(error) for error in group.exceptions]
        except Exception as error:
            failures = [_told(error)]
        found[name] = {"inputs": own.inputs, "taken": own.taken, "refused": own.refused, "failures": failures}
    return found


class _Counted:
    """A law of one kind, and how often it was asked."""

    def __init__(self, kind: Any, folder: Path, checkpoint: Path) -> None:
        self.inputs = self.taken = self.refused = 0

        def law(given: Any) -> None:
            self.inputs += 1
            taken, refused = kind.answers(folder, given, checkpoint)
            self.taken += taken
            self.refused += refused

        self.law = law


def _told(error: Exception) -> str:
    notes = " ".join(getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {error} {notes}"[:1000]


if __name__ == "__main__":
    main()
