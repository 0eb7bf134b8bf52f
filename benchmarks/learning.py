"""What a learning step costs beside PEFT, and whether memory grows with the number of tasks.

    python benchmarks/learning.py [--rounds 8] [--models minilm llama llama-8b] [--tables cost memory] [--device cpu]

Cost: one task's batch (16 rows of 32 tokens) through one stage, as learn/steps.py asks a worker for it, over forward +
backward + forward of the same batch through a PEFT model with one adapter of the summed rank and a trainable
coefficient behind every row of its A. Same process, one thread, float32, calls taking turns, medians of CPU seconds.
With `objective: entropy` ours is forward + backward; with `agreement` the own adapter goes forward besides. On a GPU
seconds are the wall's, with 16 rows of 512 tokens, and both sides run in float32 and under bfloat16 autocast besides;
llama-8b is two blocks of Llama 3 8B's shape.

Memory: the largest resident size of a process that takes three steps with 2, 4 and 8 tasks; the model and the eight
adapters are the same in each.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ray_merge.demo.suite import base_folder
from ray_merge.moments import Engines
from ray_merge.plan import make_plan, read_inputs
from ray_merge.pool import Turns
from ray_merge.prepared import lessons
from ray_merge.recipe import expand, load_recipe
from ray_merge.work.learn_job import Batched, GradUnit, LearnJob, PassUnit
from ray_merge.work.learn_worker import LearnWorker

ROWS, RANK = 16, 16
N_TOKENS = {"cpu": 32, "cuda": 512}
LLAMAS = {
    "llama": {
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
MORE = {"vocab_size": 4096, "max_position_embeddings": 1024, "pad_token_id": 0}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "minilm": ["query", "key", "value", "attention.output.dense", "intermediate.dense"],
    "llama": LINEARS,
    "llama-8b": LINEARS,
}


def main() -> None:
    """Print the tables that were asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--models", nargs="+", choices=tuple(TARGETS), default=["minilm", "llama"])
    parser.add_argument("--device", choices=tuple(N_TOKENS), default="cpu")
    parser.add_argument("--tables", nargs="+", choices=("cost", "memory"), default=["cost", "memory"])
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "TASKS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        print(json.dumps({"rss": _peak(Path(options.one[0]), int(options.one[1]))}))
        return
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            if "cost" in options.tables:
                cost(name, Path(folder) / "six", options.rounds, options.device)
            if "memory" in options.tables:
                _memory(name, make_adapters(name, Path(folder) / "eight", 8))


def make_adapters(name: str, folder: Path, count: int, tokens: int = N_TOKENS["cpu"]) -> Path:
    """A base, some random classifiers on it, and rows of token ids."""
    import transformers
    from peft import LoraConfig, get_peft_model

    folder.mkdir(parents=True)
    if name in LLAMAS:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**LLAMAS[name], **MORE)
        transformers.LlamaModel(config).save_pretrained(folder / "base")
    base = base_folder() if name == "minilm" else folder / "base"
    draw = torch.Generator().manual_seed(0)
    for number in range(count):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS[name], task_type="SEQ_CLS")
        wrapped = get_peft_model(model, config)
        with torch.no_grad():
            for key, value in wrapped.named_parameters():
                if "lora_B" in key:
                    value.copy_(0.02 * torch.randn(value.shape, generator=draw))
        wrapped.save_pretrained(folder / f"a{number}")
        ids = torch.randint(1, 1000, (ROWS, tokens), generator=draw).tolist()
        rows = "".join(json.dumps({"input_ids": row}) + "\n" for row in ids)
        (folder / f"a{number}.jsonl").write_text(rows)
    (folder / "about.json").write_text(json.dumps({"base": str(base), "adapters": count, "tokens": tokens}))
    return folder


def worker_for(
    folder: Path, objective: str, n_tasks: int, device: str = "cpu", precision: str = "float32"
) -> tuple[LearnWorker, dict[str, Any]]:
    """A worker of one stage that learns tara_a, and phi at its init."""
    about = json.loads((folder / "about.json").read_text())
    names = [f"a{number}" for number in range(about["adapters"])]
    adapters = {
        name: {
            "path": str(folder / name),
            "data": str(folder / f"{name}.jsonl"),
            **({} if place < n_tasks else {"task": "regression"}),
        }
        for place, name in enumerate(names)
    }
    parameters = {
        "objective": objective,
        "batch_size": ROWS,
        "without_entropy": "include",
        "precision": precision,
    }
    recipe = {
        "base_model": about["base"],
        "output": str(folder / "out"),
        "stages": 1,
        "calibration": {"max_length": about["tokens"]},
        "adapters": adapters,
        "merges": [{"name": "m", "merge_method": "tara_a", "parameters": parameters}],
    }
    parsed, source = load_recipe(recipe)
    merges = expand(parsed, source)
    plan = make_plan(parsed, merges, *read_inputs(parsed, merges))
    (learn,) = lessons(plan, merges, Engines(cache=folder / "cache", engine="local", workers=1))
    job = LearnJob(
        plan=learn,
        adapters=plan.adapters,
        sites=plan.sites,
        versions={},
        cache=str(folder / "cache"),
        device=device,
    )
    shapes = learn.learnings[0].shapes
    return LearnWorker(job, 0), {
        site: np.full(shape, 0.4, dtype=np.float32) for site, shape in shapes.items()
    }


def step_of(worker: LearnWorker, phi: dict[str, Any], task: str, *, compares: bool) -> None:
    """What learn/steps.py asks for one task in one step."""
    turn = Turns(1).queue()
    batch = Batched(0, task, tuple(range(ROWS)), f"0/{task}/0")
    given: list[Any] = []
    if compares:
        alone = Batched(0, task, tuple(range(ROWS)), f"0/{task}/0/own", alone=True)
        given.append(worker.run(PassUnit(alone, 0, {}, predict=True), [], turn)[1])
    unit = GradUnit(batch, 0, phi, from_above=False, hand_on=False, compared=compares)
    worker.run(unit, given, turn)


def _peer(folder: Path, name: str, device: str, precision: str) -> Callable[[], None]:
    """Forward, then forward and backward, of the PEFT model with the concatenated adapter."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification

    about = json.loads((folder / "about.json").read_text())
    rank = RANK * about["adapters"]
    model = AutoModelForSequenceClassification.from_pretrained(about["base"], num_labels=3)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS[name], task_type="SEQ_CLS")
    wrapped: PeftModel = get_peft_model(model, config).eval().to(device)
    wrapped.requires_grad_(False)
    leaves = []
    for path, module in wrapped.named_modules():
        if path.endswith("lora_A.default"):
            leaf = torch.full((rank,), 0.4, requires_grad=True, device=device)
            leaves.append(leaf)
            module.register_forward_hook(lambda _module, _args, out, leaf=leaf: out * leaf)
    rows = [json.loads(line)["input_ids"] for line in (folder / "a0.jsonl").read_text().splitlines()]
    ids = torch.tensor(rows, device=device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    half = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16")

    def run() -> None:
        with half:
            with torch.no_grad():
                wrapped(**given)
            logits = wrapped(**given).logits
        logp = logits.float().log_softmax(-1)
        torch.autograd.grad(-(logp.exp() * logp).sum(-1).mean(), leaves, allow_unused=True)

    return run


def cost(name: str, folder: Path, rounds: int, device: str) -> None:
    """Print the seconds of one task's step beside PEFT's, in each precision."""
    make_adapters(name, folder, 6, N_TOKENS[device])
    for precision in ("float32", "bfloat16") if device == "cuda" else ("float32",):
        calls: dict[str, Callable[[], None]] = {"PEFT": _peer(folder, name, device, precision)}
        for objective in ("entropy", "agreement"):
            worker, phi = worker_for(folder, objective, 6, device, precision)
            compares = objective == "agreement"

            def ours(worker: LearnWorker = worker, phi: Any = phi, compares: bool = compares) -> None:
                step_of(worker, phi, "a0", compares=compares)

            calls[objective] = ours
        for call in calls.values():
            call()  # loads weights and factors
        found = _alternating(calls, rounds, device)
        print(
            f"\n{name}: six adapters of rank {RANK}, {ROWS} x {N_TOKENS[device]} tokens, {precision}, seconds of "
            f"{device} of one task's step\n"
        )
        print("| what | median s | over PEFT's F + B + F |\n|---|---|---|")
        for key, values in found.items():
            median = statistics.median(values)
            print(f"| {key} | {median:.4f} | {median / statistics.median(found['PEFT']):.2f} |", flush=True)


def _alternating(calls: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {key: [] for key in calls}
    clock = time.process_time if device == "cpu" else time.perf_counter
    for _ in range(rounds):
        for key, call in calls.items():
            began = clock()
            call()
            if device != "cpu":
                torch.cuda.synchronize()
            found[key].append(clock() - began)
    return found


def _memory(name: str, folder: Path) -> None:
    print(f"\n{name}: largest resident size with eight adapters, three steps\n")
    print("| tasks with a loss | MB |\n|---|---|")
    for n_tasks in (2, 4, 8):
        command = [sys.executable, __file__, "--one", str(folder), str(n_tasks)]
        made = subprocess.run(command, capture_output=True, text=True, check=True)
        print(f"| {n_tasks} | {json.loads(made.stdout.splitlines()[-1])['rss'] / 1e6:.0f} |")


def _peak(folder: Path, n_tasks: int) -> int:
    worker, phi = worker_for(folder, "agreement", n_tasks)
    for _ in range(3):
        for number in range(n_tasks):
            step_of(worker, phi, f"a{number}", compares=True)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
