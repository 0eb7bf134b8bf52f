"""adapter_config.json of an exported merge, in the layout that PEFT, vLLM and Ray Serve LLM load.

It is written afresh: settings of the inputs (rsLoRA, patterns) must not leak into a result whose scale is
already in its factors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from ray_merge.plan import Plan
from ray_merge.plan.export_class import leading
from ray_merge.spec import HEADED_TASKS, Merge, SiteReport


def exported_config(plan: Plan, merge: Merge, reports: Mapping[str, SiteReport]) -> dict[str, Any]:
    """adapter_config.json of an exported merge: r = alpha = rank, so that PEFT's scale is 1 everywhere.

    Args:
        plan: the run's plan.
        merge: the merge that was exported.
        reports: site name -> what was made there.
    """
    modules = {site: plan.module(merge, site) for site in reports}
    ranks = {modules[site]: report.rank for site, report in sorted(reports.items())}
    common = Counter(ranks.values()).most_common(1)[0][0]
    uneven = {_pattern(name, ranks): rank for name, rank in ranks.items() if rank != common}
    kind = leading(merge, plan.adapters).config.get("task_type")
    configs = [plan.adapters[name].config for name in merge.adapters]
    bases = {str(config.get("base_model_name_or_path") or "") for config in configs}
    return {
        "peft_type": "LORA",
        # For a headed task PEFT adds a head to modules_to_save, and fails to load an adapter without one. Heads of
        # several adapters are not merged, so their export names no task and loads into any class of the base.
        "task_type": None if kind in HEADED_TASKS else kind,
        # Not the recipe's place of the base: the merge id does not know it.
        "base_model_name_or_path": (bases.pop() if len(bases) == 1 else "") or None,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": uneven,
        "alpha_pattern": uneven,
        "target_modules": target_modules(plan, merge, modules),
        "modules_to_save": None,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": any(plan.layout(merge, site) == "conv1d" for site in reports),
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def _pattern(name: str, names: Collection[str]) -> str:
    """The key of a rank_pattern that means this module alone: PEFT matches `conv1` to `layer1.conv1` as well."""
    ambiguous = any(other.endswith(f".{name}") for other in names)
    return f"^{re.escape(name)}" if ambiguous else name


def target_modules(plan: Plan, merge: Merge, modules: Mapping[str, str]) -> list[str]:
    """The last name of each module where it means these modules only (`q_proj`), else the whole runtime name.

    PEFT adapts every module whose path ends in `.<target>`, and servers read short names only. Where the class
    calls its modules otherwise than the disk does, the other modules' names are not known, and whole names are safe.

    Args:
        plan: the run's plan.
        merge: the merge that was exported.
        modules: site name -> runtime name of its module.
    """
    last = {module: module.rpartition(".")[2] for module in modules.values()}
    if any(plan.sites[site].name.rpartition(".")[2] != last[module] for site, module in modules.items()):
        return sorted(modules.values())
    adapted = {plan.sites[site].tensor for site in modules}
    others = {
        name.removesuffix(".weight").rpartition(".")[2]
        for name in plan.base.tensors
        if name.endswith(".weight") and name not in adapted
    }
    heads = [head.name for name in merge.adapters for head in plan.adapters[name].heads]
    others |= {name.rpartition(".")[0].rpartition(".")[2] for name in heads}  # `classifier.dense` is no site
    return sorted({module if last[module] in others else last[module] for module in modules.values()})
