"""Kill commands at random moments, start them again, and look at what is there.

    OMP_NUM_THREADS=1 python -m benchmarks.kills --kills 30 --out benchmarks/results/kills.json

A tiny random model and the texts that come with CPython: neither network nor data. One process imports everything and
forks the commands, so that kills hit the work and not the imports. A command is killed (SIGKILL) up to three times, at
moments drawn from the whole of its usual time, and then left to finish; it is the same command every time. After every
kill and at the end:

- the output folder is absent, or whole and loads;
- what it holds at the end is what a run without kills made: plan, trials of the journal and weights, bit by bit;
- every line that was whole in the journal is still there, and none is torn once a run has finished;
- what a killed process left beside the output and in the temporary folder is counted, and gone when a later run has
  finished. Where the kill comes between the end of the output and the end of the process there is no later run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .machine import commit, processor, versions

__all__ = ["KINDS", "Kind", "measure", "prepared", "run_kind"]

KILLS_PER_ROUND = 3  # at most, before a command may finish
CLOCKS = ("seconds", "elapsed")


@dataclass(frozen=True)
class Kind:
    """Something that is killed.

    Args:
        words (`Callable`): of the command line, from the folder of inputs and the folder it works in; a save has none.
        journal (`bool`): whether it writes one.
    """

    words: Callable[[Path, Path], list[str]] | None
    journal: bool = False


def _prune(inputs: Path, work: Path) -> list[str]:
    calibration = ["--calibration", str(inputs / "calibration.txt"), "--samples", "32", "--sequence-length", "64"]
    return ["prune", str(inputs / "dense"), "--pruning-ratio", "0.3", *calibration, "--output", str(work / "out")]


def _by_layer(inputs: Path, work: Path) -> list[str]:
    return [*_prune(inputs, work), "--layer-by-layer", "--config", str(inputs / "spill.json")]


def _search(inputs: Path, work: Path) -> list[str]:
    selection = ["--selection", str(inputs / "selection.txt"), "--config", str(inputs / "search.json")]
    journal = ["--trials", "6", "--journal", str(work / "journal.jsonl"), "--resume"]
    return ["search", *_prune(inputs, work)[1:], *selection, *journal]


def _recover(inputs: Path, work: Path) -> list[str]:
    text = ["--calibration", str(inputs / "calibration.txt"), "--tokens", "6k", "--sequence-length", "64"]
    pair = [str(inputs / "pruned"), "--teacher", str(inputs / "dense")]
    return ["recover", *pair, *text, "--batch-size", "2", "--precision", "fp32", "--output", str(work / "out")]


KINDS = {
    "prune": Kind(_prune),
    "prune --layer-by-layer": Kind(_by_layer),
    "search": Kind(_search, journal=True),
    "recover": Kind(_recover),
    "save_pretrained": Kind(None),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="of every kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="an empty folder to work in; a temporary one where not given")
    parser.add_argument(
        "--out", type=Path, help="JSON file of the results; of kinds that were not killed now it keeps what it has"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        found = measure(Path(folder), args.kinds, args.kills, args.seed)
    tell(found, args.out, args.kinds, ("kills",))


def tell(found: dict[str, Any], out: Path | None, kinds: list[str], counts: tuple[str, ...]) -> None:
    """Print and write counts by kind; a file keeps what it has of other kinds.

    Args:
        found (`dict[str, Any]`): `kinds`, `broken`, `seconds` and the counts.
        out (`Path`, *optional*): the file.
        kinds (`list[str]`): those of this run.
        counts (`tuple[str, ...]`): what is summed over kinds.

    Raises:
        SystemExit: something broke.
    """
    if out and out.exists():
        before = json.loads(out.read_text(encoding="utf-8"))
        found["kinds"] = {**before["kinds"], **found["kinds"]}
        for count in counts:
            found[count] = sum(own[count] for own in found["kinds"].values())
        found["broken"] += [line for line in before["broken"] if re.split("[:,]", line)[0] not in kinds]
        found["seconds"] = round(before["seconds"] + found["seconds"], 1)
    text = json.dumps(found, indent=1)
    print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    if found["broken"]:
        raise SystemExit(f"{len(found['broken'])} things broke")


def measure(folder: Path, kinds: list[str], kills: int, seed: int) -> dict[str, Any]:
    """Kill every kind of command so often, and count.

    Args:
        folder (`Path`): empty, to work in.
        kinds (`list[str]`): of [`KINDS`].
        kills (`int`): of every kind; a command that is done before its kill comes does not count as one.
        seed (`int`): of the moments.

    Returns:
        `dict[str, Any]`: counts by kind, in all, and everything that broke.
    """
    started = time.perf_counter()
    inputs = prepared(folder, kinds)
    broken: list[str] = []
    found = {name: _Course(name, inputs, folder, seed, broken).run(kills) for name in kinds}
    machine = {"commit": commit(), "versions": versions(), "cpu": processor(), "threads": 1}
    found = {name: {**own, "seed": seed, "machine": machine} for name, own in found.items()}
    return {
        "kinds": found,
        "kills": sum(own["kills"] for own in found.values()),
        "broken": broken,
        "seconds": round(time.perf_counter() - started, 1),
    }


def prepared(folder: Path, kinds: list[str]) -> Path:
    """Import everything that commands need, and make what they work on.

    Args:
        folder (`Path`): to write in.
        kinds (`list[str]`): of [`KINDS`].

    Returns:
        `Path`: the folder of inputs.
    """
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    # A fork shares what is imported; the parent computes nothing, so it has no threads that a fork would lose.
    import torch

    from hf_adaprune import cli, recovery  # noqa: F401

    if "search" in kinds:
        import botorch  # noqa: F401

    torch.set_num_threads(1)
    inputs, log = folder / "inputs", folder / "log.txt"
    if inputs.exists():
        return inputs
    inputs.mkdir()
    if wait_for(fork(lambda: make_inputs(inputs), log))[0]:
        raise SystemExit(log.read_text(encoding="utf-8"))
    return inputs


def run_kind(kind: Kind, inputs: Path, work: Path) -> int:
    """Run a command in this process, and say its exit code."""
    tempfile.tempdir = str(work / "tmp")
    if kind.words is None:
        save_once(inputs, work / "out")
        return 0
    from hf_adaprune.cli import main as command

    return command([*kind.words(inputs, work), "--quiet"])


class _Course:
    """All rounds of one kind."""

    def __init__(self, name: str, inputs: Path, folder: Path, seed: int, broken: list[str]) -> None:
        self.name, self.kind, self.inputs, self.broken = name, KINDS[name], inputs, broken
        self.folder = folder / name.replace(" ", "")
        self.draw = random.Random(f"{seed} {name}")
        names = ("kills", "rounds", "output absent after a kill", "output whole after a kill", "kills that left files")
        self.counts = dict.fromkeys(names, 0)
        self.left: dict[str, int] = {}
        self.seconds: list[float] = []
        self.usual_entries: set[str] = set()
        self.lines = 0

    def run(self, kills: int) -> dict[str, Any]:
        seconds, wanted = [], []
        for _ in range(2):
            work = self._work("whole")
            began = time.perf_counter()
            self._run(work, None)
            seconds.append(time.perf_counter() - began)
            wanted.append(self._result(work))
            self.usual_entries = set(entries_of(work))
            shutil.rmtree(work)
        self._tell(wanted[0] == wanted[1], f"two runs without kills differ: {difference_of(*wanted)}")
        self.seconds = seconds
        while self.counts["kills"] < kills:
            self._round(min(kills - self.counts["kills"], self.draw.randint(1, KILLS_PER_ROUND)), wanted[0])
        counts = {**self.counts, "left by kills": self.left, "usual seconds": round(self._usual(), 2)}
        return {**counts, **({"whole journal lines looked for again": self.lines} if self.kind.journal else {})}

    def _usual(self) -> float:
        """What a run takes: the last few ones tell, for the machine may have other work, too."""
        return statistics.median(self.seconds[-3:])

    def _round(self, kills: int, wanted: dict[str, Any]) -> None:
        self.counts["rounds"] += 1
        work, known, done = self._work("killed"), b"", False
        for _ in range(kills):
            done = self._run(work, self.draw.uniform(0, self._usual()))
            if done:
                break
            self.counts["kills"] += 1
            there = (work / "out").exists()
            self.counts["output whole after a kill" if there else "output absent after a kill"] += 1
            if there:
                self._result(work)
            left = set(entries_of(work)) - self.usual_entries
            self.counts["kills that left files"] += bool(left)
            for kind in {entry.split("-")[0] for entry in left}:
                self.left[kind] = self.left.get(kind, 0) + 1
            known = self._lines_kept(work, known)
            if there:
                break  # the same command would find its output there
        ended_by_a_kill = not done and (work / "out").exists()
        if not (work / "out").exists():
            began = time.perf_counter()
            self._run(work, None)
            # A run that went on where a killed one was takes less than a whole one.
            if not self.kind.journal:
                self.seconds.append(time.perf_counter() - began)
        found = self._result(work)
        self._tell(found == wanted, f"the result differs: {difference_of(found, wanted)}")
        self._lines_kept(work, known)
        left = sorted(set(entries_of(work)) - self.usual_entries)
        self._tell(ended_by_a_kill or not left, f"left for good: {left}")
        shutil.rmtree(work)

    def _work(self, name: str) -> Path:
        work = self.folder / name
        (work / "tmp").mkdir(parents=True)
        return work

    def _run(self, work: Path, limit: float | None) -> bool:
        """Run the command, killed after so many seconds; whether it came to its end, which has to be a good one."""
        log = work.with_suffix(".log")
        child = fork(lambda: self._command(work), log)
        code, killed = wait_for(child, limit)
        if not killed:
            self._tell(code == 0, f"ended with {code}: {log.read_text(encoding='utf-8')[-2000:]}")
        return not killed

    def _command(self, work: Path) -> None:
        code = run_kind(self.kind, self.inputs, work)
        if code:
            raise SystemExit(code)

    def _result(self, work: Path) -> dict[str, Any]:
        """What is in the output folder and the journal, read in a process of its own."""
        place, log = work.with_suffix(".json"), work.with_suffix(".log")
        code, _ = wait_for(fork(lambda: describe_work(work, place), log))
        if code:
            self._tell(False, f"the output does not load: {log.read_text(encoding='utf-8')[-2000:]}")
            return {}
        return json.loads(place.read_text(encoding="utf-8"))

    def _lines_kept(self, work: Path, known: bytes) -> bytes:
        """The journal's whole lines, which have to begin with those that were known."""
        file = work / "journal.jsonl"
        if not self.kind.journal or not file.exists():
            self._tell(not known, "the journal is gone")
            return known
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        self._tell(whole.startswith(known), "journalled lines are lost")
        self.lines += known.count(b"\n")
        return whole

    def _tell(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(f"{self.name}: {what}")


# -- processes --------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], None], log: Path) -> int:
    """Start a process that does a piece of work, and says into a file what it says."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(child: int, limit: float | None = None) -> tuple[int, bool]:
    """Wait for a process, or kill it after so many seconds: exit code, and whether the kill came in time."""
    if limit is not None:
        end = time.perf_counter() + limit
        while (left := end - time.perf_counter()) > 0:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status), False
            time.sleep(min(left, 0.002))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return code, limit is not None and code == -signal.SIGKILL


# -- what is worked on ------------------------------------------------------------------------------------------------


def make_inputs(inputs: Path) -> None:
    """A model, the same one pruned, texts and configs."""
    from hf_adaprune import PruningConfig, prune

    from .smoke import python_texts, smoke_setting

    setting = smoke_setting()
    model, tokenizer = setting.model, setting.tokenizer
    model.save_pretrained(inputs / "dense")
    tokenizer.save_pretrained(inputs / "dense")
    for name, source in zip(("calibration", "selection"), python_texts(60_000), strict=False):
        (inputs / f"{name}.txt").write_text("\n\n".join(source.texts), encoding="utf-8")
    few = {"min_tokens_per_column": 1.0}
    search = {"selection_tokens": 512, "first_tokens": 256, "final_tokens": 512, "sequence_length": 64, "initial": 4}
    # All activations go to files.
    files = {"search": {"search": search, "repair": few}, "spill": {"activation_bytes": 1, "repair": few}}
    for name, config in files.items():
        (inputs / f"{name}.json").write_text(json.dumps(config), encoding="utf-8")
    result = prune(model, tokenizer, PruningConfig.recipe("magnitude", pruning_ratio=0.3))
    result.save_pretrained(inputs / "pruned")


def save_once(inputs: Path, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_adaprune import PruningConfig, prune

    model, tokenizer = (kind.from_pretrained(inputs / "dense") for kind in (AutoModelForCausalLM, AutoTokenizer))
    prune(model, tokenizer, PruningConfig.recipe("magnitude", pruning_ratio=0.3)).save_pretrained(output)


def describe_work(work: Path, place: Path) -> None:
    """Write down what the output loads to, and what the journal holds beside times."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_adaprune  # noqa: F401
    from hf_adaprune.search.journal import Journal

    found: dict[str, Any] = {}
    if (work / "out").exists():
        model = AutoModelForCausalLM.from_pretrained(work / "out")
        AutoTokenizer.from_pretrained(work / "out")
        digest = hashlib.sha256()
        for name, value in model.state_dict().items():
            digest.update(name.encode() + value.contiguous().numpy().tobytes())
        found["weights"] = digest.hexdigest()
        record = json.loads((work / "out" / "pruning_config.json").read_text(encoding="utf-8"))
        found["plan"] = record.get("plan_digest")
    if (work / "journal.jsonl").exists():
        Journal.load(work / "journal.jsonl")
        lines = (work / "journal.jsonl").read_bytes().splitlines(keepends=True)
        if (work / "out").exists() and not lines[-1].endswith(b"\n"):
            raise ValueError("the last line of a finished journal is torn")
        rows = [json.loads(line) for line in lines if line.endswith(b"\n")]
        found["journal"] = [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows]
    place.write_text(json.dumps(found), encoding="utf-8")


def entries_of(work: Path) -> list[str]:
    """Names of what lies in a work folder and its temporary folder, without random parts."""
    inside = [f"tmp/{path.name}" for path in (work / "tmp").iterdir()]
    return [path.name for path in work.iterdir() if path.name != "tmp"] + inside


def difference_of(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    parts = [name for name in {*found, *wanted} if found.get(name) != wanted.get(name)]
    if "journal" in parts and found.get("journal") and wanted.get("journal"):
        pairs = zip(found["journal"], wanted["journal"], strict=False)
        first = next(((a, b) for a, b in pairs if a != b), None)
        return f"{parts}, {len(found['journal'])} and {len(wanted['journal'])} lines, first {str(first)[:800]}"
    return str(parts)


if __name__ == "__main__":
    main()
