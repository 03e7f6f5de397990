"""The model card of a pruned checkpoint, from its folder alone: every number in it was measured by a run.

The text names texts and models as they may be published: repositories by their ids, files without their folders.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import CONFIG_NAME
from .description import Description, describe_checkpoint, final_measure
from .errors import CheckpointError
from .model_config import MODEL_TAGS, PROVENANCE_KEY
from .public import is_repo_id, linked_name, public

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

__all__ = ["EVALUATION_NAME", "PICTURE_NAME", "form_of", "model_card", "read_run"]

PICTURE_NAME = "pruned_widths.png"
# What `hf-adaprune evaluate DIR --json` printed, if somebody keeps it beside the checkpoint.
EVALUATION_NAME = "evaluation.json"
_FORMS = {
    "uniform": "All layers are equally wide: the model loads in anything that loads the dense one.",
    "plugin": "Layers differ in size, so `hf_adaprune` has to be imported before loading (`pip install hf_adaprune`). "
    "Without it transformers refuses to load the model.",
    "remote": "Layers differ in size. Either `import hf_adaprune` before loading, or let transformers run the short "
    "Python file in this repository, which needs no other package:",
}


def read_run(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """What a run wrote about itself, in the form that may be published.

    Args:
        folder (`str`): a checkpoint.

    Raises:
        CheckpointError: the folder holds no record of a run.
    """
    file = Path(folder) / CONFIG_NAME
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {CONFIG_NAME}, which tells how a model was pruned. Name a folder that "
            "PruningResult.save_pretrained or `hf-adaprune prune` wrote."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    if not isinstance(data, dict) or not isinstance(data.get("config"), dict):
        raise CheckpointError(f"{file} should hold the record of a run, with its `config`. Was it written by hand?")
    return public(data)


def form_of(folder: str | os.PathLike[str]) -> str:
    """How a checkpoint loads: `uniform` everywhere, `plugin` with this package, `remote` with it or remote code.

    Args:
        folder (`str`): a checkpoint.
    """
    config = _config_of(Path(folder))
    if not config.get("per_layer_config") and not (config.get(PROVENANCE_KEY) or {}).get("added_biases"):
        return "uniform"
    return "remote" if "AutoModelForCausalLM" in (config.get("auto_map") or {}) else "plugin"


def model_card(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    base_model: str | None = None,
    license: Mapping[str, str] | str | None = None,
    picture: bool = False,
) -> ModelCard:
    """The card of a checkpoint.

    Args:
        folder (`str`): the checkpoint, with the `pruning_config.json` of its run.
        repo_id (`str`): where it goes; stands in the loading example.
        base_model (`str`, *optional*): id of the dense model, where the run does not know it.
        license (`str` or a mapping, *optional*): the license, or several fields of it (`license`, `license_name`,
            `license_link`); left out where nothing is given.
        picture (`bool`, *optional*, defaults to `False`): a picture of the widths goes with the card.

    Returns:
        `huggingface_hub.ModelCard`: whose text is `str(card)`.

    Raises:
        CheckpointError: the folder is no checkpoint of this package, or its record is not as this package writes it.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run, description = read_run(folder), describe_checkpoint(folder)
    extra = _evaluation_file(Path(folder))
    known = str(run.get("base_model") or "")
    linked = base_model or linked_name(known) or None
    name = repo_id.rsplit("/", 1)[-1]
    licensed = {"license": license} if isinstance(license, str) else dict(license or {})
    try:
        results = _eval_results(run, extra)
        data = ModelCardData(
            base_model=linked,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=list(MODEL_TAGS),
            model_name=name if results else None,
            eval_results=results or None,
            **licensed,  # type: ignore[arg-type]
        )
        body = _body(run, extra, description, form_of(folder), repo_id, linked, known, picture)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{Path(folder) / CONFIG_NAME} is not as this package writes it ({error!r}). Restore the file of the run."
        ) from error
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def _config_of(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return data if isinstance(data, dict) else {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder} is no checkpoint: its config.json cannot be read ({error}).") from error


def _evaluation_file(folder: Path) -> dict[str, Any]:
    file = folder / EVALUATION_NAME
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Measure again, or remove it.") from error
    if not isinstance(data, dict) or not isinstance(data.get("results", {}), dict):
        raise CheckpointError(f"{file} should hold what `hf-adaprune evaluate DIR --json` prints.")
    return public(data)


# -- measured numbers -------------------------------------------------------------------------------------------------


def _eval_results(run: Mapping[str, Any], extra: Mapping[str, Any]) -> list[EvalResult]:
    """The pruned or recovered model's measurements for the `model-index`; what is not finite stays out."""
    from huggingface_hub import EvalResult

    measured = [(source, final_measure(pair)[1]) for source, pair in run.get("evaluation", {}).items()]
    measured += [(source, value) for source, found in extra.get("results", {}).items() for value in found.values()]
    sets = _data_sets(run["config"]["calibration"]["report"])
    length = _evaluation_length(run)
    results, seen = [], set()
    for source, value in measured:
        if not _finite(value["value"]) or (source, value["name"]) in seen:
            continue
        seen.add((source, value["name"]))
        protocol = {"tokens": value.get("tokens"), "samples": value.get("samples")}
        if value["name"] == "perplexity":
            protocol["sequence_length"] = length
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="Text generation",
                dataset_type=sets.get(source, source),
                dataset_name=source,
                metric_type=value["name"],
                metric_name=value["name"],
                metric_value=value["value"],
                metric_args={key: entry for key, entry in protocol.items() if entry},
            )
        )
    return results


def _evaluation_length(run: Mapping[str, Any]) -> int | None:
    """Tokens of a window of report text; a recovery has its own."""
    asked: int | None = run["config"]["calibration"].get("evaluation_length")
    return (run.get("recovery") or {}).get("evaluation_length", asked)


def _data_sets(sources: Iterable[Any]) -> dict[str, str]:
    """Ids of data sets on the Hub by the names that reports give them."""
    named = (source.split(":")[0] for source in sources if isinstance(source, str))
    return {name.rsplit("/", 1)[-1]: name for name in named if is_repo_id(name)}


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# -- text -------------------------------------------------------------------------------------------------------------


def _body(
    run: Mapping[str, Any],
    extra: Mapping[str, Any],
    description: Description,
    form: str,
    repo_id: str,
    linked: str | None,
    known: str,
    picture: bool,
) -> str:
    config = run["config"]
    ratio = 100 * float(run["pruning_ratio"])
    dense = f"[{linked}](https://huggingface.co/{linked})" if linked else _plain(known) or "A dense model"
    parts = [
        f"# {repo_id.rsplit('/', 1)[-1]}",
        f"{dense} with {ratio:.1f} % of its decoder-layer parameters removed by structured pruning with "
        f"hf_adaprune {_plain(config.get('version', ''))}: a smaller model, no masks and no quantisation.",
        "## How to load it",
        _FORMS[form],
        _snippet(form, repo_id),
        "## Size",
        _size_table(run["before"], run["after"]),
        "## Measured quality",
        _quality(run, extra, description),
        "## How it was pruned",
        *_method(run),
        "## Widths by layer",
        *_widths(description, picture),
        "## Limits",
        *_limits(run, extra),
    ]
    return "\n\n".join(part for part in parts if part)


def _snippet(form: str, repo_id: str) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    option = ""
    if form == "plugin":
        lines.insert(0, "import hf_adaprune  # teaches transformers to build layers of different sizes")
    elif form == "remote":
        option = ", trust_remote_code=True"
    lines.append(f'model = AutoModelForCausalLM.from_pretrained("{repo_id}"{option})')
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")')
    return "```python\n" + "\n".join(lines) + "\n```"


def _size_table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    names = {"decoder": "parameters of the decoder layers", "total": "parameters in all", "bytes": "bytes of weights"}
    rows = [
        (label, f"{before[name]:,}", f"{after[name]:,}", f"{100 * (1 - after[name] / before[name]):.1f} %")
        for name, label in names.items()
    ]
    return _table(("", "dense", "pruned", "removed"), rows)


def _quality(run: Mapping[str, Any], extra: Mapping[str, Any], description: Description) -> str:
    evaluation, results, speed = run.get("evaluation", {}), extra.get("results", {}), extra.get("speed", {})
    parts = []
    dtype = f" in {', '.join(description.dtypes)}" if description.dtypes else ""
    if evaluation:
        rows = []
        is_recovered = any("before" in pair for pair in evaluation.values())
        name = "recovered" if is_recovered else "pruned"
        for source, pair in evaluation.items():
            old, (_, new) = pair["dense"], final_measure(pair)
            share = f"{new['value'] / old['value']:.3f}" if _finite(new["value"]) and old["value"] else "-"
            between = (_value(pair["before"]),) if is_recovered else ()
            row = (_value(old), *between, _value(new), share, f"{new['tokens']:,}")
            rows.append((f"{_plain(new['name'])}, {_plain(source)}", *row))
        header = ("", "dense", *(("before recovery",) if is_recovered else ()), name, f"{name} / dense", "tokens")
        parts.append(_table(header, rows))
        length = _evaluation_length(run)
        parts.append(
            f"Dense and {name} model were measured in one run{dtype}, on text that was neither calibrated nor selected "
            f"on, in windows of at most {length:,} tokens. ± is the standard error over windows."
        )
    if results:
        alone = [
            (f"{_plain(value['name'])}, {_plain(source)}", _value(value), f"{value.get('samples') or '-'}")
            for source, found in results.items()
            for value in found.values()
        ]
        parts += ["The pruned model, measured by itself:", _table(("", "pruned", "windows or rows"), alone)]
    if speed:
        speeds = [(_plain(key).replace("_", " "), f"{value:,.1f}") for key, value in speed.items() if _finite(value)]
        parts.append(_table(("measured on the machine of the run", "pruned"), speeds))
    return "\n\n".join(parts) or "No report text was given to the run, so nothing was measured."


def _value(measured: Mapping[str, Any]) -> str:
    value, error = measured["value"], measured.get("standard_error")
    return f"{value:,.4g}" + (f" ± {error:.2g}" if _finite(error) else "")


def _method(run: Mapping[str, Any]) -> list[str]:
    config, calibration = run["config"], run.get("calibration") or {}
    asked = config["calibration"]
    importance, allocation, repair = config["importance"], config["allocation"], config["repair"]
    lines = [
        f"recipe `{_plain(config['recipe_name'])}`, removing {', '.join(map(_plain, config['units']))}"
        + (", every layer equally wide" if config.get("uniform") else "")
        + (f", widths multiples of {config['channel_multiple']}" if config.get("channel_multiple", 1) > 1 else ""),
        f"importance: {_mixture(importance['metrics'])}, normalisation `{_plain(importance['normalization'])}`",
        f"allocation: `{_plain(allocation['method'])}`",
        f"repair: `{_plain(repair['method'])}`, {_plain(run.get('repair', {}).get('schedule', ''))}",
    ]
    if calibration:
        weights = asked.get("domain_weights") or ()
        domains = [_plain(domain) for domain in calibration["domains"]]
        if len(weights) == len(domains):
            domains = [
                f"{name} {100 * weight / sum(weights):.1f} %" for name, weight in zip(domains, weights, strict=True)
            ]
        lines.append(
            f"calibration: {calibration['tokens']:,} tokens in {calibration['windows']:,} windows of "
            f"{calibration['sequence_length']:,}, from {', '.join(domains)}"
        )
    seconds = run.get("seconds") or {}
    if search := run.get("search"):
        cost = f" in {_time(seconds['search'])}" if "search" in seconds else ""
        lines.append(
            f"search: {search['trials']} trials ({', '.join(map(_plain, search['strategy']))}){cost} for "
            f"{_sought(search['objective'])}; trial {search['winner']['trial']} won"
        )
    for cut in run.get("cuts") or ():
        lines.append(
            f"cut after training step {cut['step']}: {100 * cut['pruning/ratio']:.1f} % removed in all, loss "
            f"{cut['pruning/loss_before']:.3f} before and {cut['pruning/loss_after']:.3f} after"
        )
    if recovery := run.get("recovery"):
        lines.append(
            f"recovery: {recovery['tokens']:,} tokens in {recovery['minutes']:.1f} minutes, "
            f"{100 * recovery['config']['alpha']:.0f} % divergence from the dense model, the rest language-model loss"
        )
    lines.append(f"seed {config['seed']}, plan `{_plain(run['plan_digest'])[:16]}`")
    if seconds:
        lines.append(f"time of the run, reading and reporting included: {_time(sum(seconds.values()))}")
    tail = "The whole config and every measurement are in `pruning_config.json`, which units stayed in "
    return ["\n".join(f"- {line}" for line in lines), tail + "`pruning_plan.json`."]


def _sought(objective: Any) -> str:
    others = {"accuracy": "the highest accuracy on multiple-choice rows", "custom": "the lowest value of a function"}
    return others.get(str(objective), f"the lowest {_plain(objective)} on selection text")


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"


def _mixture(metrics: Mapping[str, float]) -> str:
    total = sum(metrics.values())
    shares = sorted(((weight / total, name) for name, weight in metrics.items() if weight > 0), reverse=True)
    if len(shares) == 1:
        return f"`{_plain(shares[0][1])}`"
    return ", ".join(f"`{_plain(name)}` {100 * share:.1f} %" for share, name in shares)


def _widths(description: Description, picture: bool) -> list[str]:
    table = str(description).partition("\n\n")[2]
    if not table:
        return ["The family of this model has no table of widths."]
    shown = f"![What every layer keeps]({PICTURE_NAME})" if picture else "No picture: matplotlib was not installed."
    return [shown, f"<details><summary>As a table</summary>\n\n```\n{table.replace('`', '')}\n```\n\n</details>"]


def _limits(run: Mapping[str, Any], extra: Mapping[str, Any]) -> list[str]:
    lines = ["It inherits the limits and biases of the dense model, and pruning may add to them: check your own use."]
    if run.get("evaluation") or extra.get("results"):
        lines.append("Quality on other text and tasks than those above was not measured.")
    if run.get("calibration"):
        lines.append("It was calibrated on the texts named above; text of another kind may lose more.")
    if not extra.get("speed"):
        lines.append("Speed was not measured.")
    return ["\n".join(f"- {line}" for line in lines)]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _plain(text: Any) -> str:
    """A name from a file as one line of text that means nothing to Markdown or HTML."""
    return re.sub(r"[|<>`\[\]\\\x00-\x1f\x7f]+", " ", str(text)).strip()[:200]
