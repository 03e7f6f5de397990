"""Runs experiments: row after row, each on disk when it is measured, none measured twice."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_adaprune import PruningConfig, masked
from hf_adaprune.choices import multiple_choice
from hf_adaprune.costs import Costs
from hf_adaprune.errors import AdaPruneError
from hf_adaprune.evaluation import Measurement, perplexity
from hf_adaprune.pipeline import Decision, carry_out
from hf_adaprune.repairing import cached_repairs, choose_repairs
from hf_adaprune.searching import SearchResult
from hf_adaprune.sites import ModelSites, find_sites
from hf_adaprune.stages import decide, layer_by_layer_config
from hf_adaprune.throughput import throughputs

from .cost import measure_cost
from .experiments import COMPUTED, EXPERIMENTS, Case, Experiment, Shape, config_of, expand, search_of
from .machine import facts, forget_peak, peak_bytes
from .peers import load_torch_pruning, prune_with_torch_pruning
from .results import Book, Entry, claimed, digest_of
from .setting import Pool, Setting, pool_key

__all__ = ["Row", "rows_of", "run"]

_TIMED = "timed "
_PATIENCE = 2.0  # seconds between two looks at what other processes have


@dataclass(frozen=True, eq=False)
class Row:
    """One measurement to be made.

    Args:
        case ([`Case`] or [`Shape`]): the line.
        seed (`int`): of everything drawn.
        config ([`PruningConfig`], *optional*): with the first of its searches.
        measures (`tuple[str, ...]`): what is measured.
        key (`str`): digest of config, model, texts and measures.
        wider (`str`, *optional*): the key of the row that measures tasks besides.
    """

    case: Any
    seed: int
    config: PruningConfig | None
    measures: tuple[str, ...]
    key: str
    wider: str | None = None


Asked = tuple[Experiment, Book, Row]


def rows_of(experiment: Experiment, setting: Setting, seeds: tuple[int, ...] | None = None) -> list[Row]:
    """Every row of an experiment.

    Args:
        experiment ([`Experiment`]): the lines.
        setting ([`Setting`]): the model and its texts.
        seeds (`tuple[int, ...]`, *optional*): instead of the experiment's; cases that know no chance keep one.
    """
    rows = []
    if experiment.measures == ("cost",):
        for shape in experiment.cases:
            facts_of = [vars(shape), setting.scale.cost_divisor, setting.model_facts["dtype"]]
            rows.append(Row(shape, 0, None, experiment.measures, digest_of(["cost", facts_of])))
        return rows
    if experiment.measures == ("computed",):
        return [_computed_row(case, setting) for case in experiment.cases if isinstance(case, Case)]
    texts = setting.matrix if experiment.matrix else setting.texts
    for case in expand(experiment, len(texts.calibration)):
        first = (case.seeds or experiment.seeds)[0]
        for seed in case.seeds or seeds or experiment.seeds:
            config = config_of(case, seed, setting.scale, texts)
            # Tasks take minutes and their rows' standard error hides what a seed does.
            own = tuple(name for name in experiment.measures if name != "tasks" or seed == first)
            if case.searches:
                config = search_of(case, config, case.searches[0], setting.scale, texts)
            dense = case.ratio == 0 and case.peer is None
            # The last one keeps the keys of rows that were measured when it said something.
            whole = [None if dense else _said_by(config), case.searches, case.peer, None]
            key = _key(whole, setting.protocol(own, experiment.matrix))
            wider = None
            if own == ("perplexity",) and not experiment.matrix:
                wider = _key(whole, setting.protocol(("perplexity", "tasks"), False))
            rows.append(Row(case, seed, config, own, key, wider))
    return rows


def _computed_row(case: Case, setting: Setting) -> Row:
    # A search-free run of the defaults; the run's texts do not matter to arithmetic.
    config = layer_by_layer_config(PruningConfig.recipe(case.recipe, pruning_ratio=case.ratio, **case.changes))
    said = ["computed", _said_by(config), COMPUTED[_shape_of(case)], setting.model_facts["dtype"]]
    return Row(case, 0, config, ("computed",), digest_of(said))


def _shape_of(case: Case) -> str:
    return case.label.removesuffix(", layer by layer")


def _said_by(config: PruningConfig) -> dict[str, Any]:
    said = {**config.to_dict(), "version": None, "recipe_name": None}
    if config.repair.schedule == "cached" and not config.layer_by_layer:
        said["repair"] = {**said["repair"], "target_mix": 0.0}  # of walks alone, so it does not tell rows apart
    return said


def _key(said: list[Any], protocol: Mapping[str, Any]) -> str:
    # The weights' digest says which model it is, whatever its folder is called here.
    known = {**protocol, "model": {name: own for name, own in protocol["model"].items() if name != "name"}}
    return digest_of([*said, known])


def run(
    experiments: Sequence[tuple[Experiment, Book]],
    setting: Setting,
    *,
    seeds: tuple[int, ...] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, int]:
    """Measure the rows that are missing, and return how many those were, by experiment.

    Rows that read the same calibration windows share one pass of statistics, whatever experiment they belong to, and
    what several experiments ask for is measured once. Several processes that write into one folder share the passes.

    Args:
        experiments (sequence of [`Experiment`] with its [`Book`]): what to measure, and where rows are kept.
        setting ([`Setting`]): on what.
        seeds (`tuple[int, ...]`, *optional*): instead of the experiments'.
        say (`Callable`, *optional*): hears of every row.
    """
    counts = {experiment.name: 0 for experiment, _ in experiments}
    work = _Work(setting, counts, say)
    groups: dict[str, list[Asked]] = {}
    for experiment, book in experiments:
        work.failed |= {row["key"] for row in book.data["rows"] if row["status"] == "failed"}
        asked = rows_of(experiment, setting, seeds)
        if not {"cost", "computed"} & set(experiment.measures):  # of models of their own, which read none of its texts
            # Other seeds and cases of the same scale are of the same run, whether this one asks for them or not.
            whole = rows_of(EXPERIMENTS.get(experiment.name, experiment), setting)
            book.name_run(setting.run_facts, {row.key for row in (*asked, *whole)})
        for row in asked:
            if not work.is_there(experiment, book, row):
                groups.setdefault(_group(experiment, row), []).append((experiment, book, row))
    # What is timed waits until no process measures anything else.
    for timed in (False, True):
        waiting = {name: rows for name, rows in groups.items() if name.startswith(_TIMED) == timed}
        while waiting:
            refused = {}
            for name, rows in waiting.items():
                with claimed(experiments[0][1].path.parent, _TIMED if timed else name) as mine:
                    if mine:
                        work.measure(rows)
                    else:
                        refused[name] = rows
            # Asked for again until the others are done: one may have been killed, or measure other rows.
            if len(refused) == len(waiting):
                time.sleep(_PATIENCE)
            waiting = refused
    return counts


def _group(experiment: Experiment, row: Row) -> str:
    """What is measured in one go: rows share statistics, or a peer's gradients; others stand for themselves."""
    timed = _TIMED if {"cost", "speed"} & set(row.measures) else ""
    if row.config is None or "computed" in row.measures:
        return timed + experiment.name
    return f"{timed}{'peers ' if row.case.peer is not None else 'pass '}{pool_key(row.config)}"


class _Work:
    """What one process does of a run.

    Args:
        setting ([`Setting`]): on what.
        counts (`dict[str, int]`): of rows measured by experiment, counted on.
        say (`Callable`): hears of every row.
    """

    def __init__(self, setting: Setting, counts: dict[str, int], say: Callable[[str], None]) -> None:
        self.setting, self.counts, self.say = setting, counts, say
        self.failed: set[str] = set()  # before this run, which tries them again
        self.made: dict[str, Entry] = {}

    def is_there(self, experiment: Experiment, book: Book, row: Row) -> bool:
        """Whether a row need not be measured; one of another experiment is taken over."""
        keys = [row.key, row.wider] if row.wider else [row.key]
        entry = next((self.made[key] for key in keys if key in self.made), None)
        return book.has(row.key) or _taken_over(
            row, book, entry or book.elsewhere(keys), self.setting, experiment.matrix
        )

    def measure(self, rows: list[Asked]) -> None:
        """The rows of a group that no process has measured by now."""
        since: set[str] = set()
        for book in {id(book): book for _, book, _ in rows}.values():
            book.reread()
            since |= {row["key"] for row in book.data["rows"] if row["status"] == "failed"} - self.failed
        rows = [own for own in rows if own[2].key not in since and not self.is_there(*own)]
        # Rows that measure tasks come first, as they spare those that do not.
        rows.sort(key=lambda own: "tasks" not in own[2].measures)
        pooled = [row.config for _, _, row in rows if row.config is not None and row.case.peer is None]
        pool = Pool(self.setting, pooled) if pooled and "computed" not in rows[0][2].measures else None
        for number, (experiment, book, row) in enumerate(rows):
            if self.is_there(experiment, book, row):
                continue
            machine, protocol = facts(), self.setting.protocol(row.measures, experiment.matrix)
            found = _measured(row, self.setting, pool, experiment.matrix)
            book.add(found, protocol, machine)
            self.counts[experiment.name] += 1
            if found["status"] == "done":
                self.made[row.key] = found, protocol, machine
            mark = f"{found['label']}, {found['ratio']:g}, seed {row.seed}: {_said(found)}"
            self.say(f"{experiment.name}: {mark} ({number + 1} of {len(rows)})")


def _taken_over(row: Row, book: Book, entry: Entry | None, setting: Setting, matrix: bool) -> bool:
    """Keep a row that another experiment measured, under this one's label; without tasks where none are asked for."""
    if entry is None:
        return False
    measured, _, machine = entry
    protocol = setting.protocol(row.measures, matrix)
    # Seconds and memory stay those of the row that was measured.
    own = {**measured, "key": row.key, "label": _label(row, setting), "shared": True}
    if "results" in own:
        asked = set(protocol["report"]) | (set(own["results"]) if "tasks" in row.measures else set())
        own["results"] = {name: found for name, found in own["results"].items() if name in asked}
    book.add(own, protocol, machine)
    return True


def _label(row: Row, setting: Setting) -> str:
    """A case's label, or the name of the calibration domain that it takes alone."""
    domain = row.case.domain if isinstance(row.case, Case) else None
    return row.case.label if domain is None else setting.matrix.calibration[domain].name


def _said(row: Mapping[str, Any]) -> str:
    if row["status"] == "failed":
        return f"failed: {row['reason']}"
    named = [f"{name} {own['perplexity']['value']:.2f}" for name, own in row.get("results", {}).items()
             if "perplexity" in own]  # fmt: skip
    return ", ".join(named) or "done"


def _measured(row: Row, setting: Setting, pool: Pool | None, matrix: bool) -> dict[str, Any]:
    case = row.case
    said = {} if isinstance(case, Shape) else {"recipe": case.recipe, "changes": dict(case.changes)}
    if isinstance(case, Case) and case.searches:
        said["searches"] = [list(own) for own in case.searches]
    found: dict[str, Any] = {
        "key": row.key, "label": _label(row, setting), "ratio": 0.0 if isinstance(case, Shape) else case.ratio,
        "seed": row.seed, "status": "done", "config": vars(case) if isinstance(case, Shape) else said,
    }  # fmt: skip
    started = time.perf_counter()
    whole = forget_peak()
    try:
        if isinstance(case, Shape):
            found |= measure_cost(case, setting.scale.cost_divisor, setting.model_facts["dtype"])
        elif "computed" in row.measures:
            found |= _computed(row)
        elif case.peer is not None:
            found |= _peer(row, setting, matrix)
        elif not case.ratio:
            found |= {
                "parameters": setting.sites.total_parameters,
                "pruning_ratio": 0.0,
                "results": _results(setting.model, row, setting, matrix),
            }
        else:
            assert pool is not None
            found |= _config(row, setting, pool, matrix)
    except (AdaPruneError, ImportError) as error:
        found |= {"status": "failed", "reason": str(error)}
    found.setdefault("seconds", {})["all"] = round(time.perf_counter() - started, 3)
    found.setdefault("peak_bytes", peak_bytes())
    # Without this, the peak is that of everything the process did before.
    found["peak_is_of_the_row"] = whole
    return found


# -- configs ----------------------------------------------------------------------------------------------------------


def _config(row: Row, setting: Setting, pool: Pool, matrix: bool) -> dict[str, Any]:
    sites, seconds = setting.sites, {}
    statistics = pool.statistics
    seconds["statistics"] = round(pool.seconds, 3)
    started = time.perf_counter()
    searches: list[SearchResult] = []
    config = row.config
    assert config is not None
    if row.case.searches:
        searches, taken = _searched(row, setting, pool)
        config, plan = searches[-1].config, searches[-1].plan
        seconds["search"] = round(taken, 3)
    else:
        plan, kept = decide(sites, pool.blocks, config, statistics=statistics, costs=Costs.of(sites, config))
        statistics = statistics or kept
        seconds["plan"] = round(time.perf_counter() - started, 3)
    started = time.perf_counter()
    cached = cached_repairs(sites, plan, statistics, config)
    repairs, schedule, reports, blockwise = choose_repairs(sites, plan, cached, pool.blocks, pool.held_out, config)
    made = Decision(config, plan, repairs, schedule, reports, blockwise)
    seconds["repair"] = round(time.perf_counter() - started, 3)
    removed = sites.removed_parameters(plan, _biases(sites, made))
    found: dict[str, Any] = {
        "pruning_ratio": removed / sites.decoder_parameters,
        "parameters": sites.total_parameters - removed,
        "repair": schedule,
        "repairs_dropped": sum(not report.kept for report in reports),
        "plan_digest": plan.digest,
        "seconds": seconds,
    }
    if searches:
        found["search"] = [
            {"winner": result.winner.number, "trials": len(result.journal.trials), "point": dict(result.winner.point)}
            for result in searches
        ]
    started = time.perf_counter()
    with _as_pruned(setting, made, cut="speed" in row.measures or bool(blockwise)) as model:
        if "speed" in row.measures:
            found["speed"] = _speed(setting, model)
        found["results"] = _results(model, row, setting, matrix)
    seconds["evaluation"] = round(time.perf_counter() - started, 3)
    return found


def _searched(row: Row, setting: Setting, pool: Pool) -> tuple[list[SearchResult], float]:
    """The searches of a case, each from the winner of the one before, and the seconds that they took."""
    assert row.config is not None
    found: list[SearchResult] = []
    config, seconds = row.config, 0.0
    for number, free in enumerate(row.case.searches):
        if number:
            config = search_of(row.case, found[-1].config, free, setting.scale, setting.texts)
        result, own = pool.search(config)
        found.append(result)
        seconds += own
    return found, seconds


@contextlib.contextmanager
def _as_pruned(setting: Setting, made: Decision, cut: bool) -> Iterator[Any]:
    """The model as it is after a decision: masked, which equals the cut one, or a cut copy."""
    if cut:
        own = copy.deepcopy(setting.model)
        carry_out(find_sites(own), made)
        yield own
        return
    with masked(setting.sites, made.plan, made.repairs, narrow=True):
        yield setting.model


def _biases(sites: ModelSites, made: Decision) -> list[str]:
    """Sites whose reader gets a bias that it does not have."""
    given = (name for name, repair in made.repairs.items() if repair.bias is not None)
    return [name for name in given if sites.by_name[name].reader.bias is None]


# -- what is measured -------------------------------------------------------------------------------------------------


def _results(model: Any, row: Row, setting: Setting, matrix: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "perplexity" in row.measures:
        for name, blocks in setting.report(matrix).items():
            found[name] = {"perplexity": _plain(perplexity(model, blocks))}
    if {"tasks", "all tasks"} & set(row.measures):
        rows_of, limit = setting.questions(row.measures)
        for name, questions in rows_of.items():
            measured = multiple_choice(model, setting.tokenizer, questions)
            found[name] = {key: _plain(value) for key, value in measured.items()}
        if setting.texts.tasks:
            from .tasks import run_named

            named = run_named(model, setting.tokenizer, setting.texts.tasks, limit)
            found |= {task: {key: _plain(value) for key, value in own.items()} for task, own in named.items()}
    return found


def _plain(measured: Measurement) -> dict[str, float]:
    return {"value": measured.value, "standard_error": measured.standard_error, "samples": measured.samples}


def _speed(setting: Setting, model: Any) -> dict[str, Any]:
    """Tokens per second beside the dense model's, in turns, so that a machine that slows down slows both.

    The ideal is what parameters promise: those of the decoder layers in prefill (one position goes through the head),
    with those of the head in decoding.
    """
    scale = setting.scale
    models = [setting.model, model]
    speeds = throughputs(models, prefill=scale.prompt, new_tokens=scale.new_tokens, repeats=scale.runs)
    head = setting.model.get_output_embeddings().weight.numel()
    sizes = setting.sites.decoder_parameters, find_sites(model).decoder_parameters
    found: dict[str, Any] = {"decoder_parameters": sizes[1]}
    for kind, beside in (("prefill", 0), ("decode", head)):
        key = f"{kind}_tokens_per_second"
        dense, own = (speed[key] for speed in speeds)
        ideal = (sizes[0] + beside) / (sizes[1] + beside)
        found[kind] = {
            "dense": dense, "pruned": own, "gain": own / dense, "ideal": ideal,
            "share": (own / dense - 1) / (ideal - 1) if ideal > 1 else None,
        }  # fmt: skip
    return found


# -- rows that are no config ------------------------------------------------------------------------------------------


def _peer(row: Row, setting: Setting, matrix: bool) -> dict[str, Any]:
    assert row.config is not None
    load_torch_pruning()  # before minutes go into its gradients
    heads, ratio, started = row.case.peer == "torch-pruning", row.case.ratio, time.perf_counter()
    # One config per seed, so that ratios share its gradients.
    blocks, gradients = setting.peer_gradients(pool_key(row.config), row.config)
    taken = round(time.perf_counter() - started, 3)
    pruned, said = prune_with_torch_pruning(setting.model, blocks.input_ids[:1, :8], ratio, gradients, heads)
    said["seconds"]["gradients"] = taken
    started = time.perf_counter()
    results = _results(pruned, row, setting, matrix)
    said["seconds"]["evaluation"] = round(time.perf_counter() - started, 3)
    return {**said, "results": results}


def _computed(row: Row) -> dict[str, Any]:
    """What an estimate says of a large model; nothing is run, so memory and arithmetic, no time."""
    from transformers import AutoConfig

    from hf_adaprune.estimate import estimate
    from hf_adaprune.machine_speed import Speed
    from hf_adaprune.skeleton import bound_skeleton

    from .machine import DTYPE

    assert row.config is not None
    family, sizes = COMPUTED[_shape_of(row.case)]
    sites = bound_skeleton(AutoConfig.for_model(family, **sizes), dtype=DTYPE)
    found = estimate(sites, row.config, Speed(1.0, 1.0, 1.0))
    return {
        "pruning_ratio": found.pruning_ratio,
        "parameters": found.after.total,
        "computed": {
            "weights_bytes": found.before.bytes, "gram_bytes": found.gram_bytes, "peak_bytes": found.peak_bytes,
            "flops": found.calibration_flops + found.repair_flops,
        },
        "peak_bytes": found.peak_bytes,
    }  # fmt: skip
