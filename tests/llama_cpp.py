"""The real llama.cpp, in a process of its own: reads jobs as JSON, answers as JSON, and is gone.

Its threads, its log and its sockets stay out of the tests' process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def job(file: Path, prompts: Sequence[Any], vocabulary: int = 0, **options: Any) -> dict[str, Any]:
    """Prompts for one GGUF file, answered greedily with a float32 cache.

    Args:
        file: the GGUF file.
        prompts: token ids or texts.
        vocabulary: how many log-probabilities of the first new token to return; 0 for none.
        options: `new_tokens` (1), `tokenize` (False: also say the ids of text prompts), `cache` ("f32"),
            `say` (the id that is chosen first, whatever is probable), `most_probable` (log-probabilities of so
            many tokens only; the others are not a number).
    """
    return {"file": str(file), "prompts": list(prompts), "vocabulary": vocabulary, **options}


def ask(*jobs: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """Run jobs in one process. Every prompt's answer has `text`, `logprobs` (a tensor `[vocabulary]`) and `ids`."""
    # Not at the top: the other process needs neither, and torch takes seconds.
    import pytest
    import torch

    if not os.environ.get("CI"):
        pytest.importorskip("xllamacpp")
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(jobs), capture_output=True, text=True, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp failed ({done.returncode}): {done.stderr[-2000:]}")
    answers = json.loads(done.stdout.splitlines()[-1])
    for asked, answered in zip(jobs, answers, strict=True):
        for answer in answered:
            row = torch.full((asked["vocabulary"],), float("nan"))
            for number, value in answer["logprobs"]:
                row[number] = value
            answer["logprobs"] = row
    return answers


def load(asked: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = asked["file"]
    params.n_ctx = asked.get("context", 512)
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.fit_params = False
    params.verbosity = asked.get("verbosity", 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = asked.get("threads", 1)
    kind = {"f32": xllamacpp.ggml_type.GGML_TYPE_F32, "f16": xllamacpp.ggml_type.GGML_TYPE_F16}
    params.cache_type_k = params.cache_type_v = kind[asked.get("cache", "f32")]
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def post(server: Any, path: str, data: dict[str, Any]) -> dict[str, Any]:
    wanted = urllib.request.Request(
        f"{server.listening_address}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(wanted, timeout=60) as reply:
        return json.loads(reply.read())


def answer(server: Any, prompt: Any, asked: dict[str, Any]) -> dict[str, Any]:
    found = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": asked.get("new_tokens", 1),
            "n_probs": asked.get("most_probable", asked["vocabulary"]),
            "temperature": 0.0,
            "cache_prompt": False,
            # Half a character as the first token would not be told. The probabilities are those before this bias.
            "logit_bias": [[asked["say"], 1000.0]] if "say" in asked else [],
        }
    )
    if "choices" not in found:
        raise RuntimeError(str(found)[:2000])
    choice = found["choices"][0]
    first = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs", [])
    ids = []
    if asked.get("tokenize"):
        ids = post(server, "/tokenize", {"content": prompt, "add_special": True})["tokens"]
    return {"text": choice["text"], "logprobs": [(entry["id"], entry["logprob"]) for entry in first], "ids": ids}


def main() -> None:
    answers = []
    for asked in json.loads(sys.stdin.read()):
        try:
            server = load(asked)
        except RuntimeError as error:
            raise RuntimeError(f"{asked['file']}: {error}") from error
        answers.append([answer(server, prompt, asked) for prompt in asked["prompts"]])
        del server  # stops its threads
    sys.stdout.write("\n" + json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
