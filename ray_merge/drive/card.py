"""README.md of a result: what was merged, how, and what rounding took. Deterministic: no times, no hosts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ray_merge.methods.registry import get
from ray_merge.plan import Plan
from ray_merge.plan.emr import is_emr
from ray_merge.spec import Merge, SiteReport

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

WARN_LOST_SHARE = 0.05
"""More than 5 % of an update lost to rounding is worth a sentence to whoever uses the model."""


def model_card(
    plan: Plan,
    merge: Merge,
    merge_id: str,
    inputs: Mapping[str, Any],
    reports: Mapping[str, Sequence[SiteReport]],
    more: Sequence[str] = (),
) -> bytes:
    """A Hugging Face model card with front matter.

    Inputs are named by content and not by place: the merge id does not know where they lay, so a merge that is
    finished after they moved must get the same card. `more` are lines about the method.
    """
    method = get(merge.method)
    base = base_name(plan, merge)
    front = {
        "base_model": base,
        "library_name": "peft" if merge.export == "adapter" else "transformers",
        "tags": ["merge", "lora", "ray-merge"],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        f"# {merge.name}",
        "",
        f"{len(merge.adapters)} LoRA adapter(s) merged into `{base}` by `{merge.method}` with ray-merge.",
        "",
        f"Method: {method.summary} ({method.reference}).",
        "",
        "| parameter | value |",
        "|---|---|",
        *[f"| {key} | `{_cell(value)}` |" for key, value in sorted(merge.parameters.items())],
        f"| arithmetic | `{plan.recipe.dtype}` |",
        f"| stored as | `{plan.recipe.out_dtype or 'as the base'}` |",
        "",
        "| adapter | weights | sites | ranks | heads |",
        "|---|---|---|---|---|",
        *[_adapter_row(plan, item["name"], item["files"]) for item in inputs["adapters"]],
        "",
        *_head(plan, merge),
        *more,
        *_rounding(reports.get("checkpoint", ())),
        *_diagnostics(merge, reports),
        *_emr(merge, base),
        f"Merge id `{merge_id}`. What went in and every file that came out: `ray_merge/MANIFEST.json`; per site: "
        "`ray_merge/sites.parquet`.",
        "",
    ]
    return "\n".join(lines).encode()


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|")  # a filter such as `q_proj|v_proj` would end the cell


def base_name(plan: Plan, merge: Merge) -> str:
    """What people call the base: the hub name that every adapter gives it, else the last part of its place."""
    configs = [plan.adapters[name].config for name in merge.adapters]
    named = {str(config.get("base_model_name_or_path") or "") for config in configs}
    only = named.pop() if len(named) == 1 else ""
    return only if HUB_NAME.fullmatch(only) else plan.recipe.base_model.rstrip("/").rpartition("/")[2]


def _adapter_row(plan: Plan, name: str, files: Mapping[str, str]) -> str:
    adapter = plan.adapters[name]
    version = files[adapter.file]
    ranks = sorted({factor.rank for factor in adapter.factors.values()})
    # An adapter may hold trained tokens or saved modules alone.
    shown = " to ".join(str(rank) for rank in dict.fromkeys((*ranks[:1], *ranks[-1:])))
    head = f"`heads/{name}.safetensors`" if adapter.heads else ""
    return f"| {name} | `{_cell(version[:23])}` | {len(adapter.factors)} | {shown} | {head} |"


def _head(plan: Plan, merge: Merge) -> list[str]:
    """What the checkpoint is where it has an adapter's head."""
    if merge.name not in plan.headed:
        return []
    headed = plan.headed[merge.name]
    return [
        f"The checkpoint is a `{headed.model_class}` with the head of `{headed.adapter}` ({headed.n_labels} label(s)): "
        "`AutoModelForSequenceClassification.from_pretrained` loads it.",
        "",
    ]


def _emr(merge: Merge, base: str) -> list[str]:
    """What a result of emr is by itself, and how an adapter is had back."""
    if not is_emr(merge):
        return []
    what = "This adapter adds" if merge.export == "adapter" else "This checkpoint is the base plus"
    return [
        f"{what} lambda times the unified update of all adapters. `emr/` holds that update, one mask per adapter and "
        "the rescalers, which give each adapter back on the base model:",
        "",
        "```python",
        "import ray_merge",
        f"model = ...  # {base}, loaded with transformers; not this folder",
        f'ray_merge.load_emr(model, "this folder", "{merge.adapters[0]}")  # or {_others(merge)}',
        "```",
        "",
    ]


def _others(merge: Merge) -> str:
    return ", ".join(merge.adapters[1:]) or "another one of the recipe"


PAIR_FIGURES = {
    "interference": "What adapter j (column) adds to the outputs of a site on the tokens of task i (row), over those "
    "of the base weight alone",
    "projection": "What the lora_A of adapter j (column) takes up of the inputs of a site on the tokens of task i "
    "(row), over |A| |h|",
}
"""In this order, what the card shows of pairs: the first that is known."""


def _diagnostics(merge: Merge, reports: Mapping[str, Sequence[SiteReport]]) -> list[str]:
    """A table of every adapter on the tokens of every task, as a mean over sites."""
    some = [report for kind in reports.values() for report in kind if report.figures]
    if not some:
        return []
    known = [figure for figure in PAIR_FIGURES if any(report.figures.get(figure) for report in some)]
    if not known:
        return [f"Diagnostics: none of the {len(some)} site(s) has moments.", ""]
    lists = [value for report in some if isinstance(value := report.figures.get(known[0]), list)]
    means = [_mean([one[place] for one in lists]) for place in range(len(lists[0]))]
    names, n_tasks = merge.adapters, len(merge.adapters)
    rows = [means[start : start + n_tasks] for start in range(0, len(means), n_tasks)]
    without = len(some) - len(lists)
    return [
        f"{PAIR_FIGURES[known[0]]}: root mean squares, mean over {len(lists)} site(s)"
        + (f"; {without} more have no moments." if without else "."),
        "",
        f"| {known[0]} | " + " | ".join(names) + " |",
        "|---" * (n_tasks + 1) + "|",
        *[f"| {name} | " + " | ".join(row) + " |" for name, row in zip(names, rows, strict=True)],
        "",
    ]


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{math.fsum(known) / len(known):.4g}" if known else "unknown"


def _rounding(reports: Sequence[SiteReport]) -> list[str]:
    if not reports:
        return []
    worst = max(reports, key=lambda report: report.lost_share)
    text = (
        f"Rounding to the stored dtype took at most {worst.lost_share:.2%} of an update (at `{worst.site}`)."
    )
    if worst.lost_share > WARN_LOST_SHARE:
        text += " Use `out_dtype: float32` or `export: adapter` to keep it."
    return [text, ""]
