"""The real llama.cpp, in a process of its own: reads a request as JSON, answers as JSON, and is gone.

A process for every file keeps llama.cpp's threads, its log and its sockets out of the tests' process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch


def ask(file: Path, prompts: list[Any], vocabulary: int = 0, **options: Any) -> list[dict[str, Any]]:
    """Run prompts through llama.cpp, greedily, with a float32 cache.

    Args:
        file: the GGUF file.
        prompts: token ids or texts.
        vocabulary: how many log-probabilities of the first new token to return; 0 for none.
        options: `new_tokens` (1), `tokenize` (False: also say the ids of text prompts), `cache` ("f32"),
            `say` (the id that is chosen, whatever is probable).

    Returns:
        For every prompt `text`, `logprobs` (a tensor `[vocabulary]`) and `ids`.
    """
    if not os.environ.get("CI"):
        pytest.importorskip("xllamacpp")
    request = {"file": str(file), "prompts": prompts, "vocabulary": vocabulary, **options}
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(request), capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp failed ({done.returncode}): {done.stderr[-2000:]}")
    answers = json.loads(done.stdout.splitlines()[-1])
    for answer in answers:
        row = torch.full((vocabulary,), float("nan"))
        for number, value in answer["logprobs"]:
            row[number] = value
        answer["logprobs"] = row
    return answers


def load(request: dict[str, Any]) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["file"]
    params.n_ctx = request.get("context", 512)
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.warmup = False
    params.fit_params = False
    params.verbosity = request.get("verbosity", 1)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    kind = {"f32": xllamacpp.ggml_type.GGML_TYPE_F32, "f16": xllamacpp.ggml_type.GGML_TYPE_F16}
    params.cache_type_k = params.cache_type_v = kind[request.get("cache", "f32")]
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def post(server: Any, path: str, data: dict[str, Any]) -> dict[str, Any]:
    wanted = urllib.request.Request(
        f"{server.listening_address}{path}", json.dumps(data).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(wanted, timeout=60) as reply:
        return json.loads(reply.read())


def answer(server: Any, prompt: Any, request: dict[str, Any]) -> dict[str, Any]:
    found = server.handle_completions(
        {
            "prompt": prompt,
            "n_predict": request.get("new_tokens", 1),
            "n_probs": request["vocabulary"],
            "temperature": 0.0,
            "cache_prompt": False,
            "ignore_eos": True,
            # A first token that is half a character would not be told; the probabilities are those before this bias.
            "logit_bias": [[request["say"], 1000.0]] if "say" in request else [],
        }
    )
    if "choices" not in found:
        raise RuntimeError(str(found)[:2000])
    choice = found["choices"][0]
    first = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs", [])
    ids = []
    if request.get("tokenize") and isinstance(prompt, str):
        ids = post(server, "/tokenize", {"content": prompt, "add_special": True})["tokens"]
    return {"text": choice["text"], "logprobs": [(entry["id"], entry["logprob"]) for entry in first], "ids": ids}


def main() -> None:
    request = json.loads(sys.stdin.read())
    server = load(request)
    answers = [answer(server, prompt, request) for prompt in request["prompts"]]
    del server
    sys.stdout.write("\n" + json.dumps(answers) + "\n")


if __name__ == "__main__":
    main()
