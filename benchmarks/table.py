"""Render a results file of `recipes.py` as a Markdown table.

python benchmarks/table.py [RESULTS.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def table(path: Path) -> str:
    """Recipes by ratios, one column per ratio and text, best in bold."""
    results = json.loads(path.read_text())
    rows = {(row["recipe"], row["asked"]): row for row in results["rows"]}
    dense = rows["dense", 0.0]
    texts = list(dense["perplexity"])
    ratios = sorted({asked for recipe, asked in rows if recipe != "dense"})
    recipes = sorted({recipe for recipe, _ in rows if recipe != "dense"})
    columns = [(text, ratio) for text in texts for ratio in ratios]
    best = {
        (text, ratio): min(rows[r, ratio]["perplexity"][text] for r in recipes if (r, ratio) in rows)
        for text, ratio in columns
    }
    lines = [
        "| recipe | "
        + " | ".join(f"{text} {ratio:.0%}" if len(texts) > 1 else f"{ratio:.0%}" for text, ratio in columns)
        + " |",
        "|---|" + "---|" * len(columns),
    ]
    order = sorted(recipes, key=lambda r: rows.get((r, 0.2), {"perplexity": {texts[0]: 1e99}})["perplexity"][texts[0]])
    for recipe in order:
        cells = []
        for text, ratio in columns:
            row = rows.get((recipe, ratio))
            value = row["perplexity"][text] if row else None
            shown = "" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.0f}"
            cells.append(f"**{shown}**" if value == best[text, ratio] else shown)
        lines.append(f"| `{recipe}` | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append("Dense: " + ", ".join(f"{name} {value:.2f}" for name, value in dense["perplexity"].items()) + ".")
    return "\n".join(lines)


if __name__ == "__main__":
    default = Path(__file__).parent / "results" / "recipes.json"
    print(table(Path(sys.argv[1]) if len(sys.argv) > 1 else default))
