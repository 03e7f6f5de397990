"""Recovery and progressive pruning: what training gives back, with report text read once at the end.

A run is how a pruning ratio is reached (`once`, or `progressive` while training), the ratio, a loss and a number of
tokens. All read the same windows in the same order under the same schedule; curves are measured on selection text.

    python benchmarks/training.py MODEL --run once:0.4:kl:300000 progressive:0.4:kl:300000 --sources a.jsonl b.txt \
        --calibration a.jsonl b.txt --selection c.jsonl --report d.txt --rows e.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from machine import HERE, load, machine_line, short_names, versions, weights_digest  # beside this file
from texts import rows_digest
from transformers import AutoTokenizer, TrainerCallback

from hf_adaprune import AdaPrunerCallback, PruningConfig, PruningPlan, RecoveryConfig, prune, recover
from hf_adaprune.calibration import report_blocks
from hf_adaprune.choices import multiple_choice, read_rows
from hf_adaprune.documents import distinct_names
from hf_adaprune.evaluation import per_window_loss, perplexity
from hf_adaprune.quiet import quiet_model
from hf_adaprune.sites import find_sites

WINDOW = 1024  # tokens of a report window


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or hub id")
    parser.add_argument("--run", nargs="+", required=True, help="HOW:RATIO:LOSS:TOKENS, LOSS is kl, lm or mixed")
    parser.add_argument("--sources", nargs="+", required=True, help="training text")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--selection", nargs="+", default=[])
    parser.add_argument("--report", nargs="+", default=[])
    parser.add_argument("--rows", nargs="+", default=[])
    parser.add_argument("--tokens", type=int, default=65536, help="report tokens per source")
    parser.add_argument("--task-rows", type=int, help="questions per file (default: all)")
    parser.add_argument("--recipe", default="default", help="of a cut")
    parser.add_argument("--pruned", help="a model that `once` starts from, cut already; the ratio then only names it")
    parser.add_argument("--plan", help="a folder with pruning_plan.json and pruning_config.json, for `once`")
    parser.add_argument("--at", nargs="+", type=float, default=[0.0, 0.08, 0.16, 0.24, 0.32])
    parser.add_argument("--learning-rate", type=float, default=RecoveryConfig().learning_rate)
    parser.add_argument("--decay", type=float, default=RecoveryConfig().decay, help="share in which the rate falls")
    parser.add_argument("--batch-size", type=int, default=RecoveryConfig().batch_size)
    parser.add_argument("--cut-samples", type=int, default=32, help="calibration windows of a progressive cut")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="training", help="name of the results file")
    parser.add_argument("--title", help="of the rows in the README's table")
    parser.add_argument("--note", help="what the rows should say of themselves beside their numbers")
    parser.add_argument("--save", help="folder for the trained models")
    return parser.parse_args()


class Curve(TrainerCallback):
    """Loss on selection text while training goes on."""

    def __init__(self, blocks: Any, every: int) -> None:
        self.blocks, self.every, self.rows = blocks, every, []
        self.seconds = 0.0

    def measure(self, model: Any, step: int) -> None:
        """Measure, and keep the time it took apart."""
        started = time.perf_counter()
        with quiet_model(model):
            sums = per_window_loss(model, self.blocks).sum(0)
        self.rows.append([step, float(sums[0] / sums[1])])
        self.seconds += time.perf_counter() - started
        print("  step", *self.rows[-1], flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure where it is time."""
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            self.measure(model, state.global_step)


def main() -> None:
    args = arguments()
    path = HERE / "results" / f"{args.name}.json"
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    names = distinct_names(Path(source).stem for source in (*args.report, *args.rows))
    texts = {name: report_blocks(source, tokenizer, tokens=args.tokens, sequence_length=WINDOW)
             for name, source in zip(names, args.report, strict=False)}  # fmt: skip
    rows = {name: read_rows(source)[: args.task_rows]
            for name, source in zip(names[len(texts) :], args.rows, strict=True)}  # fmt: skip
    own = measured_on(args.model, texts, rows)
    if path.exists():
        results = json.loads(path.read_text())
        if results["protocol"].get("measured_on", own) != own:
            raise SystemExit(f"{path.name} was measured on another model, text or questions. Choose another --name.")
    else:
        results = {"protocol": {**facts(args), "measured_on": own}, "rows": []}
    selection = [report_blocks(source, tokenizer, tokens=8192, sequence_length=512) for source in args.selection]

    def evaluate(model: Any) -> dict[str, Any]:
        found: dict[str, Any] = {name: perplexity(model, own).value for name, own in texts.items()}
        for name, questions in rows.items():
            own = multiple_choice(model, tokenizer, questions)["acc_norm"]
            found[name] = [own.value, own.standard_error]
        return found

    for asked in args.run:
        own_rate = {"learning_rate": args.learning_rate}
        if args.decay != RecoveryConfig().decay:  # rows on file have the default and do not say so
            own_rate["decay"] = args.decay
        if any(same_run(row, {"run": asked, **own_rate}) for row in results["rows"]):
            continue
        how, ratio_text, loss, token_text = asked.split(":")
        ratio, tokens = float(ratio_text), int(token_text)
        model, _ = load(args.model)
        row: dict[str, Any] = {"run": asked, **own_rate}
        row |= {name: value for name in ("title", "note") if (value := getattr(args, name))}
        started = time.perf_counter()
        callbacks: list[TrainerCallback] = []
        if how == "once":
            plan = config = None
            if args.pruned:
                model, _ = load(args.pruned)
            elif args.plan:
                said = json.loads((Path(args.plan) / "pruning_config.json").read_text())
                config = PruningConfig.from_dict(said["config"]).with_changes(search=None)
                plan = PruningPlan.load(Path(args.plan) / "pruning_plan.json")
            else:
                config = pruning(args, ratio)
            if ratio and not args.pruned:
                prune(model, tokenizer, config, plan=plan)
            row["prune_seconds"] = time.perf_counter() - started
            if not (args.plan or args.pruned) or tokens == 0:
                row["before"] = evaluate(model)
        else:
            config = pruning(args, ratio).with_changes(calibration={"gradient_samples": max(4, args.cut_samples // 4)})
            callbacks.append(
                AdaPrunerCallback(
                    config, at=tuple(args.at), data="calibration", tokenizer=tokenizer, samples=args.cut_samples
                )
            )
        recovery = RecoveryConfig(
            tokens=tokens or 2, learning_rate=args.learning_rate, decay=args.decay, batch_size=args.batch_size,
            alpha={"kl": 1.0, "lm": 0.0, "mixed": 0.5}[loss], seed=args.seed, held_out=0,
        )  # fmt: skip
        if tokens:
            steps = -(-tokens // (args.batch_size * recovery.sequence_length))
            curves = [Curve(own, max(1, steps // 8)) for own in selection]
            for curve in curves:
                if how == "once":
                    curve.measure(model, 0)
            started = time.perf_counter()
            trained = recover(
                model, tokenizer, args.model, recovery, sources=args.sources, selection=args.selection,
                callbacks=[*callbacks, *curves],
            )  # fmt: skip
            row["seconds"] = time.perf_counter() - started - sum(curve.seconds for curve in curves)
            row["tokens"] = trained.tokens
            selected = distinct_names(Path(source).stem for source in args.selection)
            row["curves"] = {name: curve.rows for name, curve in zip(selected, curves, strict=True)}
            for callback in callbacks:
                row["cuts"] = callback.done  # type: ignore[attr-defined]
            if args.save:
                trained.save_pretrained(Path(args.save) / asked.replace(":", "_"))
        row["decoder_parameters"] = find_sites(model).decoder_parameters
        row["after"] = evaluate(model) if tokens else row["before"]
        results["rows"].append(row)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(row), flush=True)


def same_run(row: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Whether a row is of this way, learning rate and decay."""
    return all(row.get(name) == asked.get(name) for name in ("run", "learning_rate", "decay"))


def measured_on(model: str, texts: dict[str, Any], rows: dict[str, Any]) -> dict[str, Any]:
    """Model, report text and questions as the protocols of experiments say them: the headline compares the two."""
    found: dict[str, Any] = {
        "weights": weights_digest(load(model)[0])[:16],
        "report": {name: [blocks.tokens, blocks.digest[:16]] for name, blocks in texts.items()},
        "report_window": WINDOW,
    }
    return found | ({"rows": {name: [len(own), rows_digest(own)] for name, own in rows.items()}} if rows else {})


def pruning(args: argparse.Namespace, ratio: float) -> PruningConfig:
    return PruningConfig.recipe(args.recipe, pruning_ratio=ratio, calibration={"sources": args.calibration})


def facts(args: argparse.Namespace) -> dict[str, Any]:
    roles = ("sources", "calibration", "selection", "report", "rows")
    return {
        "model": Path(args.model).name,
        **{role: short_names(getattr(args, role)) for role in roles},
        "report_tokens": args.tokens,
        "task_rows": args.task_rows,
        "recipe": args.recipe,
        **versions(),
        "machine": machine_line(),
    }


if __name__ == "__main__":
    main()
