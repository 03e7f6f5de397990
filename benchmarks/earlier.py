"""Tables of results that were measured before the experiments were data; the files have forms of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

__all__ = ["EARLIER"]


def _rows(path: Path) -> dict[tuple[str, float], dict[str, float]]:
    """Perplexity by text, of every recipe and ratio."""
    return {(row["recipe"], row["asked"]): row["perplexity"] for row in json.loads(path.read_text())["rows"]}


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = "|---" * len(header) + "|"
    first, *rest = ["| " + " | ".join(line) + " |" for line in [header, *lines]]
    return "\n".join([first, rule, *rest])


def recipes(folder: Path) -> str:
    """Recipes by ratio on one text, the best of a column in bold."""
    rows = _rows(folder / "recipes.json")
    (text,) = rows["dense", 0.0]
    ratios = sorted({ratio for _, ratio in rows if ratio})
    names = sorted({recipe for recipe, _ in rows} - {"dense"}, key=lambda name: rows[name, 0.2][text])
    best = {ratio: min(rows[name, ratio][text] for name in names) for ratio in ratios}
    lines = []
    for name in names:
        values = ((rows[name, ratio][text], ratio) for ratio in ratios)
        cells = [f"**{_number(value)}**" if value == best[ratio] else _number(value) for value, ratio in values]
        lines.append([f"`{name}`", *cells])
    return _table(["recipe, ratio", *(f"{ratio:.0%}" for ratio in ratios)], lines)


def calibration_windows(folder: Path) -> str:
    """The recipe `default` by number of calibration windows."""
    files = {64: "recipes.json", 256: "in_domain_256.json", 448: "more_calibration.json"}
    rows = {count: _rows(folder / name) for count, name in files.items()}
    lines = [
        [f"{100 * ratio:.0f} %", *(_number(own["default", ratio]["wikitext2_test"]) for own in rows.values())]
        for ratio in (0.2, 0.5)
    ]
    return _table(["WikiText-2 test, removed", *(f"{count} windows" for count in files)], lines)


def other_text(folder: Path) -> str:
    """The recipe `default` on text it was not calibrated on."""
    rows = _rows(folder / "out_of_domain.json")
    lines = []
    for text, name in (("wikitext2_test_raw", "WikiText-2 test, raw"), ("c4", "C4, other pages")):
        dense = rows["dense", 0.0][text]
        cells = [f"{dense:.2f}"]
        for ratio in (0.2, 0.5):
            value = rows["default", ratio][text]
            times = value / dense
            shown = f"{value:.2f}" if value < 100 else f"{value:.1f}"
            cells.append(f"{shown} ({times:.2f}x)" if times < 2 else f"{shown} ({times:.1f}x)")
        lines.append([name, *cells])
    return _table(["`default`", "dense", "20 % removed", "50 % removed"], lines)


def search_report(folder: Path) -> str:
    """A search's winner beside trial 0 on report text, and on selection text that no trial saw."""
    found = json.loads((folder / "search_20.json").read_text())
    lines = []
    for text, name in (("wikitext2_test_raw", "WikiText-2 test, raw"), ("c4_report", "C4, other pages")):
        plain, searched = (found[key]["evaluation"][text] for key in ("default", "search"))
        before, after = plain["pruned"]["value"], searched["pruned"]["value"]
        change = f"{100 * (after / before - 1):+.1f} %"
        lines.append([name, f"{plain['dense']['value']:.2f}", f"{before:.2f}", f"**{after:.2f}** ({change})"])
    fresh, winner = found["search"]["on_fresh_text"], str(found["search"]["winner"]["trial"])
    lines.append(["KL on selection text that no trial saw", "0", f"{fresh['0']:.3f}", f"**{fresh[winner]:.3f}**"])
    header = ["20 % removed, 65,536 report tokens each", "dense", "`default`, equal domain weights", "search"]
    return _table(header, lines)


def search_strategies(folder: Path) -> str:
    """The best candidate so far against trial 0, by strategy and number of trials."""
    curves: dict[str, dict[str, list[float]]] = json.loads((folder / "search_curves.json").read_text())["curves"]
    order = ("gp-kept", "gp", "gp-anywhere", "tpe", "random", "sobol")
    named = sorted((name.split() for name in curves), key=lambda pair: (float(pair[0]), order.index(pair[1])))
    lines = []
    for ratio, strategy in named:
        runs = curves[f"{ratio} {strategy}"]
        cells = [_change([curve[trials - 1] for curve in runs.values()]) for trials in (15, 30, 60)]
        if strategy in ("gp", "gp-kept"):
            cells[-1] = f"**{cells[-1]}**"
        lines.append([f"{100 * float(ratio):.0f} %, `{strategy}`", str(len(runs)), *cells])
    return _table(["removed, strategy", "seeds", "15 trials", "30 trials", "60 trials"], lines)


def _change(logarithms: list[float]) -> str:
    values = [100 * math.expm1(value) for value in logarithms]
    if not any(values):
        return "0"
    deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):+.1f}{deviation} %"


def search_seeds(folder: Path) -> str:
    """Winners of searches with several seeds on report text."""
    rows = {row["journal"]: row for row in json.loads((folder / "search_report.json").read_text())["rows"]}
    texts = {"wikitext2_test_raw": "WikiText-2 test, raw", "c4_report": "C4, other pages"}
    lines = []
    for ratio in sorted({name.split("_")[0] for name in rows}, key=float):
        plain = rows[f"{ratio}_default"]
        for strategy in ("gp-kept", "gp"):
            own = [row for name, row in sorted(rows.items()) if name.startswith(f"{ratio}_{strategy}_")]
            for text, title in texts.items() if own else ():
                changes = [100 * (row[text] / plain[text] - 1) for row in own]
                cells = [f"{row[text]:.2f} ({change:+.1f} %)" for row, change in zip(own, changes, strict=True)]
                first = f"{100 * float(ratio):.0f} % removed, {title}, `{strategy}`"
                lines.append([first, f"{plain[text]:.2f}", ", ".join(cells), f"**{mean(changes):+.1f} %**"])
    return _table(["perplexity", "`default`", "seeds 0, 1, ...", "mean"], lines)


def given_up(folder: Path) -> str:
    """Winners on text that their selection speaks for, and on text that it does not."""
    rows = json.loads((folder / "given_up.json").read_text())["rows"]
    texts = [name for name in rows[0] if name != "model"]
    lines = [["`default`", *(f"{rows[0][text]:.1f}" for text in texts)]]
    for kept in (0.0, 0.25, 0.5):
        own = [row for row in rows[1:] if row.get("kept", 0.0) == kept and "with" not in row]
        cells = [", ".join(f"{row[text]:.1f}" for row in sorted(own, key=lambda row: row["model"])) for text in texts]
        label = "winners of `gp`" if not kept else f"the same, {kept:g} of the weights kept"
        lines.append([f"{label}, seeds 0, 1, 2", *cells])
    return _table(["40 % removed, perplexity", *texts], lines)


def predictor(folder: Path) -> str:
    """Ratios per layer that the accuracy predictor found, against uniform ones."""
    lines = []
    for row in json.loads((folder / "predictor.json").read_text())["rows"]:
        cells = []
        for text in ("wikitext2_test_raw", "c4_report"):
            before, after = row["uniform"][text], row["predictor"][text]
            cells.append(f"{before:.2f} to **{after:.2f}** ({100 * (after / before - 1):+.1f} %)")
        lines.append([f"{100 * row['ratio']:.0f} %", *cells, f"{row['held_out_pairs']['r2']:.2f}"])
    return _table(["removed", "WikiText-2 test, raw", "C4, other pages", "R² on held-out pairs"], lines)


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def forms(folder: Path) -> str:
    """What equal widths in all layers cost, and what they bring."""
    rows = {row["form"]: row for row in json.loads((folder / "forms_quality.json").read_text())["rows"]}
    speeds = {row["form"]: row for row in json.loads((folder / "forms_speed.json").read_text())["rows"]}
    names = {"adaptive": "adaptive", "adaptive_multiple_32": "adaptive, multiples of 32", "uniform": "uniform",
             "uniform_multiple_32": "uniform, multiples of 32"}  # fmt: skip
    dense = rows["dense"]
    lines = [["dense", f"{dense['wikitext2_test_raw']:.2f}", f"{dense['c4_report']:.2f}",
              *(_rate(speeds["dense"][f"{kind}_tokens_per_second"]) for kind in ("prefill", "decode"))]]  # fmt: skip
    for ratio in (20, 40):
        for form, title in names.items():
            own, speed = rows[f"{form}_{ratio}"], speeds[f"{form}_{ratio}"]
            cells = [f"{own['wikitext2_test_raw']:.2f}", f"{own['c4_report']:.2f}"]
            for kind in ("prefill", "decode"):
                share = f"{100 * speed[f'{kind}_share']:.0f} %"
                cells.append(f"{_rate(speed[f'{kind}_tokens_per_second'])} ({speed[f'{kind}_gain']:.2f}x, {share})")
            lines.append([f"{ratio} %, {title}", *cells])
    header = ["removed, form", "WikiText-2 test, raw", "C4, other pages", "prefill, tokens/s", "decode, tokens/s"]
    return _table(header, lines)


def llama_cpp_speed(folder: Path) -> str:
    """Tokens per second of exported files in llama.cpp."""
    rows = json.loads((folder / "forms_llama_cpp.json").read_text())["models"]
    dense = rows[0]
    lines = []
    for row in rows:
        cells = [
            row["model"].replace("_multiple_32", ", multiples of 32").replace("_", ", ") + " %" * (row is not dense)
        ]
        cells.append(f"{row['bytes'] / 1e6:.0f} MB")
        for kind in ("prefill", "decode"):
            own, before = (which[f"{kind}_tokens_per_second"] for which in (row, dense))
            cells.append(f"{own:.0f}" if row is dense else f"{own:.0f} ({own / before:.2f}x)")
        lines.append(cells)
    return _table(["model, removed", "file", "prefill, tokens/s", "decode, tokens/s"], lines)


def recovery(folder: Path) -> str:
    """A searched model before and after distillation."""
    found: dict[str, Any] = json.loads((folder / "recovery_20.json").read_text())
    lines = []
    texts = (("report/wikitext2_test_raw.txt", "WikiText-2 test, raw"),
             ("calibration/c4.jsonl rows 701-1000", "C4, other pages"))  # fmt: skip
    for text, name in texts:
        own = found["report"][text]
        times = {key: f"{own[key] / own['dense']:.2f}x" for key in own}
        cells = [f"{own['dense']:.2f}", f"{own['searched']:.2f} ({times['searched']})",
                 f"**{own['recovered']:.2f}** ({times['recovered']})"]  # fmt: skip
        lines.append([name, *cells])
    for task, name in (("piqa_val", "PIQA"), ("arc_easy_test", "ARC-easy")):
        own = found["acc_norm, first 600 rows"][task]
        cells = [f"{own[key][0]:.3f} ± {own[key][1]:.3f}" for key in ("dense", "recovered")]
        lines.append([f"{name}, first 600 rows, acc_norm", cells[0], "-", cells[1]])
    return _table(["20 % removed", "dense", "searched", "recovered"], lines)


def training(folder: Path) -> str:
    """One cut and then training against cuts while training, on the same windows."""
    rows = {row["run"].split(":")[0]: row for row in json.loads((folder / "training.json").read_text())["rows"]}
    once, progressive = rows["once"], rows["progressive"]
    lines = []
    for text, name in (("wikitext2_test_raw", "WikiText-2 test, raw"), ("c4_report", "C4, other pages")):
        before, *after = once["before"][text], once["after"][text], progressive["after"][text]
        cells = [f"**{value:.2f}**" if value == min(after) else f"{value:.2f}" for value in after]
        lines.append([name, f"{before:.2f}", *cells])
    for text, name in (("c4", "selection: C4"), ("wiki_selection", "selection: Wikipedia")):
        start, *ends = once["curves"][text][0], once["curves"][text][-1], progressive["curves"][text][-1]
        lines.append([name, *(f"{math.exp(loss):.2f}" for _, loss in (start, *ends))])
    return _table(["40 % removed", "cut, not trained", "cut, then trained", "cut while training"], lines)


def losses(folder: Path) -> str:
    """Distillation against the language-model loss, at equal tokens and at more of them."""
    rows = json.loads((folder / "losses.json").read_text())["rows"]
    names = {"kl": "KL to the dense model", "lm": "language-model loss"}
    lines = []
    for row in rows:
        _, ratio, loss, _ = row["run"].split(":")
        values = [f"{row['after'][text]:.2f}" for text in ("wikitext2_test_raw", "c4_report")]
        values += [f"{row['curves'][text][-1][1]:.3f}" for text in ("c4", "wiki_selection")]
        lines.append([f"{float(ratio):.0%}", names[loss], f"{row['tokens']:,}", *values])
    texts = ["WikiText-2 test, raw", "C4, other pages", "loss, selection: C4", "loss, selection: Wikipedia"]
    return _table(["removed", "loss", "tokens", *texts], lines)


EARLIER: dict[str, Callable[[Path], str]] = {
    "recipes": recipes,
    "calibration-windows": calibration_windows,
    "other-text": other_text,
    "search-report": search_report,
    "search-strategies": search_strategies,
    "search-seeds": search_seeds,
    "given-up": given_up,
    "predictor": predictor,
    "forms": forms,
    "llama-cpp-speed": llama_cpp_speed,
    "recovery": recovery,
    "training": training,
    "losses": losses,
}
