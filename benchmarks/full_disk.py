"""Fill the disk at every point of a command, and look at what is there.

    OMP_NUM_THREADS=1 python -m benchmarks.full_disk --out benchmarks/results/full_disk.json

A limit on the size of files stands for a full disk: the system then refuses to write on (EFBIG in the place of ENOSPC),
at any call of any library. Limits from one byte upwards hit one write after the other, until the command succeeds. At
every limit the command

- ends well, with the result of a run without limit, or says what to do, without a traceback, with exit code 2;
- leaves no output folder unless it is whole, and nothing unfinished beside it or in the temporary folder, but for what
  the next run goes on with: the journal, and the run's folder, which goes when that one ends well;
- succeeds when it is started again with room, with the same result; trials of a search that were journalled are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .kills import KINDS, describe_work, difference_of, entries_of, fork, prepared, run_kind, tell, wait_for
from .machine import commit, processor, versions

__all__ = ["measure"]

TOLD = 2
RUN = "out.run"  # the folder of a run, which the same command goes on with
KEPT = {RUN, "journal.jsonl"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=1.6, help="from one limit to the next")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--work", type=Path, help="an empty folder to work in; a temporary one where not given")
    parser.add_argument("--out", type=Path, help="JSON file of the results; of other kinds it keeps what it has")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        found = measure(Path(folder), args.kinds, args.factor)
    tell(found, args.out, args.kinds, ("limits", "told"))


def measure(folder: Path, kinds: list[str], factor: float) -> dict[str, Any]:
    """Run every kind of command under every limit, and count.

    Args:
        folder (`Path`): empty, to work in.
        kinds (`list[str]`): of [`KINDS`].
        factor (`float`): from one limit to the next.

    Returns:
        `dict[str, Any]`: counts by kind, in all, and everything that broke.
    """
    started = time.perf_counter()
    inputs = prepared(folder, kinds)
    broken: list[str] = []
    found = {}
    for name in kinds:
        wanted, _ = _run(name, inputs, folder, None, broken)
        counts = {"limits": 0, "told": 0, "finished": 0}
        limit = 1.0
        while not counts["finished"]:
            counts["limits"] += 1
            found_there, said = _run(name, inputs, folder, int(limit), broken)
            same = found_there == wanted
            if not same:
                broken.append(f"{name}, {int(limit)} bytes: {difference_of(found_there, wanted)}")
            counts["told" if said else "finished"] += 1
            limit *= factor
        found[name] = {**counts, "largest limit": int(limit / factor)}
    return {
        "kinds": found,
        "limits": sum(own["limits"] for own in found.values()),
        "told": sum(own["told"] for own in found.values()),
        "broken": broken,
        "seconds": round(time.perf_counter() - started, 1),
        "machine": {"commit": commit(), "versions": versions(), "cpu": processor(), "threads": 1},
    }


def _run(name: str, inputs: Path, folder: Path, limit: int | None, broken: list[str]) -> tuple[dict[str, Any], str]:
    """One command under a limit, and again without where it failed: what came of it, and what was said."""
    work, log = folder / "limited", folder / "limited.log"
    (work / "tmp").mkdir(parents=True)
    code, said = _under(name, inputs, work, limit)
    where = f"{name}, {limit} bytes"
    told = ""
    if code:
        told = said.strip().splitlines()[-1] if said.strip() else "nothing"
        if code != TOLD or "Traceback" in said:
            broken.append(f"{where}: ended with {code}: {said[-1500:]}")
        left = set(entries_of(work)) - KEPT
        if left:
            broken.append(f"{where}: left {sorted(left)}")
        journal = work / "journal.jsonl"
        data = journal.read_bytes() if journal.exists() else b""
        code, said = _under(name, inputs, work, None)
        if code:
            broken.append(f"{where}: ended with {code} when there was room again: {said[-1500:]}")
        if journal.exists() and not journal.read_bytes().startswith(data[: data.rfind(b"\n") + 1]):
            broken.append(f"{where}: journalled lines are lost")
    if RUN in entries_of(work):
        broken.append(f"{where}: {RUN} is there after the run")
    place = folder / "found.json"
    if wait_for(fork(lambda: describe_work(work, place), log))[0]:
        broken.append(f"{where}: the output does not load: {log.read_text(encoding='utf-8')[-1500:]}")
    found = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    place.unlink(missing_ok=True)
    shutil.rmtree(work)
    return found, told


def _under(name: str, inputs: Path, work: Path, limit: int | None) -> tuple[int, str]:
    """Exit code of a command under a limit, and what it said: through a pipe, which no limit holds for."""
    reads, writes = os.pipe()

    def limited() -> None:
        os.close(reads)
        os.dup2(writes, 1)
        os.dup2(writes, 2)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        raise SystemExit(_told(name, inputs, work))

    child = fork(limited, Path(os.devnull))
    os.close(writes)
    with os.fdopen(reads, encoding="utf-8", errors="replace") as pipe:
        said = pipe.read()
    return wait_for(child)[0], said


def _told(name: str, inputs: Path, work: Path) -> int:
    from hf_adaprune.errors import AdaPruneError

    try:
        return run_kind(KINDS[name], inputs, work)
    except AdaPruneError as error:  # a save has no command line that would say it
        print(error, file=sys.stderr)
        return TOLD


if __name__ == "__main__":
    main()
