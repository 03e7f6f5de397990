"""What every measurement says of itself: commit, versions, processor, threads, memory; and how a model is loaded."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_adaprune

HERE = Path(__file__).parent
DTYPE = torch.bfloat16


def load(name: str, dtype: torch.dtype = DTYPE) -> tuple[Any, Any]:
    """A model and its tokenizer, from a folder or the Hub."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)


def short_names(sources: Iterable[str]) -> list[str]:
    """Sources without the folders of this machine."""
    return ["/".join(Path(source).parts[-2:]) for source in sources]


def versions() -> dict[str, str]:
    """Versions of what a number depends on."""
    return {
        "hf_adaprune": hf_adaprune.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def machine_line() -> str:
    """Processor family and threads, in one line."""
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def facts() -> dict[str, Any]:
    """Everything about code and machine that a row is filed under."""
    libraries = versions()
    for name in ("torch-pruning", "lm-eval"):
        try:
            libraries[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "commit": commit(),
        "versions": libraries,
        "python": platform.python_version(),
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def commit() -> str | None:
    """The commit of this checkout, with `+` where files differ from it; `None` outside of a checkout."""
    try:
        head, changed = (
            subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()
            # Results change while they are made, which does not make the code another.
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "..", ":!results"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def forget_peak() -> bool:
    """Let the peak of memory start again from here; whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Largest resident memory since `forget_peak` where the system can forget, else of the whole process."""
    try:
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if platform.system() == "Darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Resident memory now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_bytes()


def weights_digest(model: Any) -> str:
    """sha256 over names, shapes and bytes of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{list(parameter.shape)}{parameter.dtype}".encode())
        digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
