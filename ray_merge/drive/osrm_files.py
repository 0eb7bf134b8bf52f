"""adapter_config.json and README.md beside an adapter that `init` writes. Deterministic: no times, no hosts.

PEFT adds a head to modules_to_save where task_type is that of a headed class, and then fails to load an adapter that
saved none (KeyError, PEFT 0.21). An initial adapter has no head, so its config names no headed task: it loads into
any class of the base that has its module names, and the card says how the head is trained and saved along.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

import yaml

from ray_merge.plan.osrm import OsrmTask, required_init
from ray_merge.recipe import Recipe
from ray_merge.recipe.model import Init
from ray_merge.spec import HEADED_TASKS
from ray_merge.work.osrm_job import SiteInit


def initial_config(recipe: Recipe, task: OsrmTask, base_url: str) -> dict[str, Any]:
    """adapter_config.json of one adapter.

    Args:
        recipe: with an init.
        task: whose adapter.
        base_url: where the base lies, for a recipe that has no other name for it.
    """
    init = required_init(recipe)
    kind = None if task.task_type in HEADED_TASKS and not task.heads else task.task_type
    return {
        "peft_type": "LORA",
        "task_type": kind,
        "auto_mapping": _auto_mapping(task.class_name) if kind is None else None,
        "base_model_name_or_path": _base_name(recipe, base_url),
        "r": init.r,
        "lora_alpha": init.lora_alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": list(task.targets),
        "modules_to_save": list(task.modules_to_save) or None,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": any(site.conv1d for site in task.sites),
        "lora_dropout": 0.0,
        "inference_mode": False,
    }


def _auto_mapping(class_name: str) -> dict[str, str]:
    """How PEFT writes down the class of an adapter without a task."""
    import transformers

    return {"base_model_class": class_name, "parent_library": getattr(transformers, class_name).__module__}


def _base_name(recipe: Recipe, base_url: str) -> str:
    return recipe.base_model_names[0] if recipe.base_model_names else base_url


def initial_card(
    recipe: Recipe, task: OsrmTask, task_id: str, base_url: str, found: Mapping[str, SiteInit]
) -> bytes:
    """A model card with front matter: what it is, how to train from it, and what to know about its directions."""
    init = required_init(recipe)
    base = _base_name(recipe, base_url)
    front = {"base_model": base, "library_name": "peft", "tags": ["lora", "osrm", "ray-merge"]}
    what = "projected onto" if init.project else "to fine-tune from, with the rows of A in"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=True).strip(),
        "---",
        f"# {task.name}",
        "",
        f"A LoRA adapter of `{base}` ({task.class_name}) {what} the directions that the inputs of other tasks "
        f"({', '.join(task.others)}) reach least: OSRM (arXiv 2505.22934), written by ray-merge.",
        "",
        *_how_to_load(task, init),
        "| parameter | value |",
        "|---|---|",
        *[f"| {key} | `{value}` |" for key, value in _parameters(recipe, init).items()],
        "",
        *(f"{sentence}\n" for sentence in remarks(init, found)),
        f"Id `{task_id}`.",
        "",
    ]
    return "\n".join(lines).encode()


def _parameters(recipe: Recipe, init: Init) -> dict[str, Any]:
    calibration = recipe.calibration
    seen = {} if calibration is None else calibration.model_dump()
    return {
        "r": init.r,
        "lora_alpha": init.lora_alpha,
        "mode": init.mode,
        "row_scale": init.row_scale,
        **{f"calibration.{key}": value for key, value in seen.items()},
    }


def _how_to_load(task: OsrmTask, init: Init) -> list[str]:
    load = [f"model = ...  # {task.class_name}, loaded with transformers"]
    if task.task_type in HEADED_TASKS and not task.heads:
        lines = [
            "Its task has a head, which this adapter does not hold. So that PEFT trains and saves one as well:",
            "",
            "```python",
            "from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict",
            "from safetensors.torch import load_file",
            "",
            *load,
            'config = PeftConfig.from_pretrained("this folder")',
            f'config.task_type, config.auto_mapping = "{task.task_type}", None',
            "model = get_peft_model(model, config)",
            'initial = load_file("this folder/adapter_model.safetensors")',
            "set_peft_model_state_dict(model, get_peft_model_state_dict(model) | initial)",
            "```",
            "",
            '`PeftModel.from_pretrained(model, "this folder", is_trainable=True)` trains the factors alone.',
        ]
    else:
        trainable = "" if init.project else ", is_trainable=True"
        lines = [
            "```python",
            "from peft import PeftModel",
            "",
            *load,
            f'model = PeftModel.from_pretrained(model, "this folder"{trainable})',
            "```",
        ]
    return [*lines, ""]


def remarks(init: Init, found: Mapping[str, SiteInit]) -> list[str]:
    """What a person should know about the directions that were taken, in sentences."""
    ones = list(found.values())
    reach = median(one.reach for one in ones)
    sketched = any(one.sketched for one in ones)
    inputs, way_out = "others' inputs", "more samples"
    if init.mode == "means":
        inputs, way_out = "means of the others' inputs", "mode: covariance"
    elif sketched:
        inputs, way_out = "sketches of the others' inputs", "more sketch_rows"
    sentences = [
        f"At the median of {len(ones)} site(s) the {inputs} reach these rows with {'at most ' if sketched else ''}"
        f"{_share(reach)} of the energy that they have along random rows."
    ]
    free = [one for one in ones if one.null_space > init.r]
    if free:
        smallest = min(one.null_space for one in free)
        sentences.append(
            f"Rank-deficient: at {len(free)} of {len(ones)} site(s) the {inputs} leave more than {init.r} "
            f"directions untouched (at least {smallest}), and which {init.r} of these were taken is arbitrary (drawn "
            f"by a seed); {way_out} would tell them apart."
        )
    partly = sum(0 < one.null_space <= init.r for one in ones)
    if partly:
        sentences.append(f"At {partly} site(s) some of the rows are not reached at all.")
    lost = {site: one.lost for site, one in found.items() if one.lost is not None}
    if lost:
        worst = max(lost, key=lambda site: lost[site])
        sentences.append(
            f"Projecting lost {median(lost.values()):.1%} of the update's norm at the median site and "
            f"{lost[worst]:.1%} at the worst ({worst})."
        )
    return sentences


def _share(value: float) -> str:
    return "0" if value == 0 else f"{value:.2g}" if value < 0.01 else f"{value:.1%}"
