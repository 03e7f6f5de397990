"""Tokens per second of checkpoints in llama.cpp: prefill and decode, on CPU, printed as JSON.

    python benchmarks/llama_cpp.py dense pruned-20 pruned-40 --type f16 --threads 1

Needs the extra `gguf` and `xllamacpp`. Every file is measured in a process of its own; runs of the files alternate, so
that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def measure(file: str, threads: int, prompt: int, new: int) -> dict[str, float]:
    """One run: tokens per second of reading a prompt and of writing."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = prompt + new + 8
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.verbosity = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    draw = random.Random(0)
    ids = [draw.randrange(100, 40000) for _ in range(prompt)]
    request: dict[str, Any] = {
        "prompt": ids, "n_predict": new, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True
    }  # fmt: skip
    found = server.handle_completions(request)
    if "timings" not in found:
        raise RuntimeError(str(found)[:500])
    timings = found["timings"]
    return {"prefill": timings["prompt_per_second"], "decode": timings["predicted_per_second"]}


def measure_apart(file: Path, arguments: argparse.Namespace) -> dict[str, float]:
    words = [sys.executable, __file__, "--one", str(file), "--threads", str(arguments.threads)]
    words += ["--prompt", str(arguments.prompt), "--new", str(arguments.new)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="DIR|FILE.gguf")
    parser.add_argument("--type", default="f16", help="of the files that are made of folders")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=256, help="tokens read")
    parser.add_argument("--new", type=int, default=64, help="tokens written")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--one", metavar="FILE.gguf", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print("\n" + json.dumps(measure(arguments.one, arguments.threads, arguments.prompt, arguments.new)))
        return
    from hf_adaprune.export import export_gguf

    with tempfile.TemporaryDirectory() as place:
        files = {}
        for name in arguments.models:
            made = Path(place) / f"{len(files)}.gguf"
            files[name] = export_gguf(name, made, type=arguments.type) if Path(name).is_dir() else Path(name)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in files}
        for _ in range(arguments.runs):
            for name, file in files.items():
                runs[name].append(measure_apart(file, arguments))
        rows = [
            {
                "model": Path(name).name,
                "bytes": files[name].stat().st_size,
                **{
                    f"{kind}_tokens_per_second": round(statistics.median(run[kind] for run in found), 1)
                    for kind in ("prefill", "decode")
                },
            }
            for name, found in runs.items()
        ]
    settings = {"threads": arguments.threads, "prompt": arguments.prompt, "new": arguments.new, "runs": arguments.runs}
    print(json.dumps({**settings, "type": arguments.type, "models": rows}, indent=2))


if __name__ == "__main__":
    main()
