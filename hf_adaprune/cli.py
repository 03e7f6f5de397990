"""The command line: prune, search, recover, evaluate, show, push, export, demo.

Results go to standard output, everything else to standard error. torch and transformers are imported by the commands
that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .cli_arguments import build_config, command_line
from .cli_model import Loader, layers_of
from .cli_publish import run_export
from .cli_recover import run_recover
from .cli_run import begin_afresh, check_run_place, disk_rooms, disk_table, goes_on, kept_beside, run_place
from .cli_search import carry_out, check_request, plans_table, search_table, write_plans
from .config import PruningConfig
from .errors import AdaPruneError, ConfigError
from .parts import CalibrationConfig, check_whole
from .plan import PruningPlan

__all__ = ["main"]

BAD, INTERRUPTED = 2, 130
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv (sequence of `str`, *optional*): arguments; those of the process where not given.

    Returns:
        `int`: 0; 2 for what the user can mend, told in one line on standard error; 130 after an interruption.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = command_line(COMMANDS).parse_args(words)
    with _manners(arguments.quiet or not _is_first()):
        try:
            arguments.run(arguments, words)
        except AdaPruneError as error:
            _complain(str(error))
            return BAD
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            _complain(f"{error}. Free some space, or name a place that can be written.")
            return BAD
        except KeyboardInterrupt:
            _complain("interrupted.")
            return INTERRUPTED
    return 0


def _is_first() -> bool:
    """Whether this process writes, saves and talks: of several that `accelerate launch` started, the first does."""
    return int(os.environ.get("WORLD_SIZE", "1")) < 2 or os.environ.get("RANK", "0") == "0"


def _write(text: str) -> None:
    if _is_first():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _complain(text: str) -> None:
    if _is_first():
        sys.stderr.write(f"hf-adaprune: {' '.join(text.split())}\n")


def _answer(arguments: argparse.Namespace, data: Mapping[str, Any], text: str) -> None:
    _write(json.dumps(_finite(data), sort_keys=True) if arguments.json else text)


def _finite(value: Any) -> Any:
    """The value with `None` for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def _manners(quiet: bool) -> Iterator[None]:
    """This package's log on standard error, progress bars unless quiet; everything as it was afterwards."""
    log = logging.getLogger("hf_adaprune")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("hf-adaprune: %(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.ERROR if quiet else logging.INFO)
    bars = None
    if quiet:
        from transformers.utils import logging as transformers_logging

        bars = transformers_logging.is_progress_bar_enabled()
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
        if quiet:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()


# -- commands ---------------------------------------------------------------------------------------------------------


def _prune(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    config = build_config(arguments)
    _need_output(arguments)
    plan = PruningPlan.load(arguments.plan) if arguments.plan else None
    if plan is not None:
        config = config.with_changes(search=None)
    elif config.search is not None:
        raise ConfigError("this config has a search. Run `hf-adaprune search`, or take `search` out of the file.")
    _check_before(arguments)
    _prepare_and_run(arguments, words, config, plan, None)


def _search(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    config = build_config(arguments)
    config = config.with_changes(search={}) if config.search is None else config
    assert config.search is not None
    _need_output(arguments)
    output = Path(arguments.output or "pruned")
    journal = Path(arguments.journal) if arguments.journal else output.with_name(output.name + ".journal.jsonl")
    _check_before(arguments, journal)
    resume = arguments.resume or arguments.dry_run or goes_on(arguments, journal)
    check_request(config, journal, resume, arguments.warm_start)
    if config.search.ratios:
        # The highest of them is what has to be reachable, and what the estimate is of.
        config = config.with_changes(pruning_ratio=max(config.search.ratios))
    _prepare_and_run(arguments, words, config, None, journal)


def _need_output(arguments: argparse.Namespace) -> None:
    if arguments.output is None and not arguments.dry_run:
        raise ConfigError("`--output` is missing: the folder of the pruned model. To write nothing, add --dry-run.")


def _check_before(arguments: argparse.Namespace, journal: Path | None = None) -> None:
    """Look at the output before anything is deleted for it, then begin afresh if that was asked for."""
    from .saving import check_output

    if arguments.dry_run:
        return
    check_output(arguments.output)
    check_run_place(arguments, journal)
    if _is_first():
        begin_afresh(arguments, journal)


def _prepare_and_run(
    arguments: argparse.Namespace,
    words: Sequence[str],
    config: PruningConfig,
    plan: PruningPlan | None,
    journal: Path | None,
) -> None:
    """Check everything and estimate; then prune, or find plans, and save."""
    from .estimate import estimate
    from .layer_scores import forward_only_config
    from .reporting import size_table
    from .saving import check_output

    output = None if arguments.output is None else Path(arguments.output)
    if output is not None:
        check_output(output)
    loader = Loader.of(arguments)
    sites = loader.skeleton()
    if plan is not None:
        sites.check(plan)
    if config.layer_by_layer:
        config = forward_only_config(config)
    expected = estimate(sites, config, is_kept=run_place(arguments) is not None)
    if output is not None:
        check_output(output, expected.after.bytes)
    rooms = disk_rooms(arguments, Path("pruned") if output is None else output, expected)
    if arguments.dry_run:
        parts = [size_table(expected.before, expected.after), str(expected), disk_table(rooms) if rooms else ""]
        data = {**expected.to_dict(), "disks": [room.to_dict() for room in rooms]}
        _answer(arguments, data, "\n\n".join(part for part in parts if part))
        return
    assert output is not None
    if not arguments.quiet:
        kept = f", {expected.run_bytes / 2**20:,.0f} MiB of disk for a restart" if rooms else ""
        _complain(f"about {expected.seconds:.0f} s, {expected.peak_bytes / 2**20:,.0f} MiB of memory{kept}.")
    with kept_beside(arguments, words, output, _complain, _is_first()) as run_dir:
        options: dict[str, Any] = {"run_dir": run_dir}
        if journal is not None:
            options |= {"journal": journal, "resume": arguments.resume, "warm_start": arguments.warm_start}
        try:
            if config.search is not None and (config.search.pareto or config.search.ratios):
                _find_plans(arguments, loader, config, output, sites, **options)
            else:
                _prune_and_save(arguments, loader, config, plan, output, sites, **options)
        except (AdaPruneError, KeyboardInterrupt):
            if run_dir is None and journal is not None and journal.is_file():
                again = shlex.join([*words, *([] if "--resume" in words else ["--resume"])])
                _complain(f"the trials so far are kept in {journal}; to go on: hf-adaprune {again}")
            raise


def _find_plans(
    arguments: argparse.Namespace,
    loader: Loader,
    config: PruningConfig,
    output: Path,
    dense: Any,
    *,
    journal: Path,
    **options: Any,
) -> None:
    """Search, and write the plans of all sizes; nothing is pruned."""
    from .search_stage import search_plan

    assert config.search is not None
    tokenizer = _tokenizer(loader, needed=True)
    result = search_plan(loader.model(), tokenizer, config, journal=journal, **options)
    rows = write_plans(result, output, dense) if _is_first() else []
    if not rows:
        return
    example = carry_out(arguments, output / rows[-1]["config"], output / rows[-1]["plan"], "DIR")
    parts = [
        f"{loader.name}: {len(rows)} plans in {output}",
        plans_table(rows, config.search.objective),
        search_table(result, journal),
        f"to carry one out: {example}",
    ]
    data = {**result.to_dict(), "output": str(output), "journal": str(journal), "points": rows}
    _answer(arguments, data, "\n\n".join(parts))


def _prune_and_save(
    arguments: argparse.Namespace,
    loader: Loader,
    config: PruningConfig,
    plan: PruningPlan | None,
    output: Path,
    dense: Any,
    *,
    journal: Path | None = None,
    **options: Any,
) -> None:
    from .pipeline import prune
    from .reporting import evaluation_table, plan_table, size_table
    from .stages import needs_text

    tokenizer = _tokenizer(loader, needed=needs_text(config) or journal is not None)
    if config.layer_by_layer:
        result = loader.prune_to_disk(dense, tokenizer, config, output, plan=plan, **options)
    else:
        options |= {} if journal is None else {"journal": journal}
        result = prune(loader.model(), tokenizer, config, plan=plan, **options)
        if _is_first():
            result.save_pretrained(output)
    if not _is_first():
        return
    after = layers_of(result.model, output)
    parts = [
        f"{loader.name} -> {output}, recipe {config.recipe_name}, pruning ratio {result.pruning_ratio:.4f}",
        size_table(result.before, result.after),
        plan_table(result.plan, dense, after),
        evaluation_table(result),
        "" if result.search is None or journal is None else search_table(result.search, journal),
        f"repair: {result.repair_schedule}" + "".join(f"; {k} {s:.0f} s" for k, s in result.seconds.items() if s >= 1),
    ]
    data = {**result.to_dict(), "output": str(output), **({} if journal is None else {"journal": str(journal)})}
    _answer(arguments, data, "\n\n".join(part for part in parts if part))


def _tokenizer(loader: Loader, needed: bool) -> Any:
    try:
        return loader.tokenizer()
    except AdaPruneError:
        if needed:
            raise
        logging.getLogger(__name__).warning("no tokenizer was found; the pruned model is saved without one.")
        return None


def _recover(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    run_recover(arguments, words, _answer, _complain)


def _evaluate(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    from .calibration import begin_token, report_blocks
    from .choices import multiple_choice, read_rows
    from .documents import distinct_names, read_source
    from .evaluation import perplexity
    from .harness import load_harness, run_tasks
    from .positions import check_lengths
    from .reporting import text_table
    from .throughput import throughput

    own = CalibrationConfig(report=arguments.report or ())
    tokens = own.evaluation_tokens if arguments.tokens is None else arguments.tokens
    length = own.evaluation_length if arguments.sequence_length is None else arguments.sequence_length
    check_whole("--tokens", tokens, 2, what="tokens per report source")
    check_whole("--sequence-length", length, 2, what="tokens per perplexity window")
    sources: Sequence[Any] = arguments.report or (own.sources if not arguments.tasks and not arguments.latency else ())
    named = [task for task in arguments.tasks if not Path(task).is_file()]
    missing = [task for task in named if task.endswith((".jsonl", ".json"))]
    if missing:
        raise ConfigError(f"there is no file of multiple-choice rows at {missing[0]}. Check the path.")
    if named:
        load_harness()
    rows = [(Path(task).stem, read_rows(task)) for task in arguments.tasks if task not in named]
    loader = Loader.of(arguments)
    model, tokenizer = loader.model(), loader.tokenizer()
    if sources:
        check_lengths(model, {"--sequence-length": length})
    measures: list[tuple[str, dict[str, Any]]] = []
    for source in sources:
        # The same third of the texts of CPython that `prune` reports on.
        part = (2, 3) if source.split(":")[0] == "python" else None
        documents = read_source(source, tokenizer=tokenizer, model=model, part=part)
        blocks = report_blocks(
            documents,
            tokenizer,
            tokens=tokens,
            sequence_length=length,
        )
        measures.append((documents.name, {"perplexity": perplexity(model, blocks)}))
    measures += [(name, dict(multiple_choice(model, tokenizer, questions))) for name, questions in rows]
    measures += [(task, dict(own)) for task, own in (run_tasks(model, tokenizer, named) if named else {}).items()]
    # Texts and tasks share one table, and files of one stem are several of them.
    names = distinct_names(name for name, _ in measures)
    found: dict[str, dict[str, Any]] = {
        name: {key: vars(value) for key, value in own.items()} for name, (_, own) in zip(names, measures, strict=True)
    }
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1024
    # As long a prompt as a small model has room for.
    speed = throughput(model, prefill=max(1, min(512, positions - 32))) if arguments.latency else {}
    lines = [
        (name, key, f"{value['value']:.4f}", f"{value['standard_error']:.4f}", str(value["samples"] or "-"))
        for name, measured in found.items()
        for key, value in measured.items()
    ]
    header = ("text or task", "measure", "value", "± standard error", "windows or rows")
    parts = [text_table(header, lines)] if lines else []
    answer: dict[str, Any] = {"model": loader.name, "results": found, "speed": speed}
    if sources:
        answer["begins_with"] = first = begin_token(tokenizer)
        parts += [] if first is None else [f"windows of text begin with {tokenizer.decode([first])}"]
    parts += [f"{key.removesuffix('_tokens_per_second')}: {value:,.1f} tokens/s" for key, value in speed.items()]
    _answer(arguments, answer, "\n".join(parts))


def _show(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    if _is_journal(Path(arguments.path)):
        from .journal_plot import plot_journal
        from .journal_report import describe_journal
        from .search.journal import Journal

        journal = Journal.load(arguments.path)
        if arguments.plot:
            plot_journal(journal, arguments.plot)
        summary = describe_journal(journal)
        _answer(arguments, summary.to_dict(), str(summary))
        return
    from .description import describe
    from .width_plot import plot_widths

    description = describe(arguments.path)
    if arguments.plot:
        plot_widths(description.layers, arguments.plot, description.title)
    _answer(arguments, description.to_dict(), str(description))


def _export(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    _answer(arguments, *run_export(arguments))


def _publish(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    if _is_first():
        _answer(arguments, *arguments.publish(arguments))


def _is_journal(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(32).startswith(b'{"kind":"search",')


def _demo(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    from .demo import run_demo

    ratio = PruningConfig().pruning_ratio if arguments.pruning_ratio is None else arguments.pruning_ratio
    report = run_demo(arguments.model, arguments.output, ratio)
    _answer(arguments, report.to_dict(), str(report))


COMMANDS = {
    "prune": _prune,
    "search": _search,
    "recover": _recover,
    "evaluate": _evaluate,
    "show": _show,
    "push": _publish,
    "export": _export,
    "demo": _demo,
}
