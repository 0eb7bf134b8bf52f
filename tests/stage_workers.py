"""Tiny models and their moments: by stages in actors that serve any job, and by hooks on the whole model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ray_merge.calibration import load_batches
from ray_merge.drive.moments import MomentsResult, Work, ensure_moments
from ray_merge.models.skeleton import build_skeleton
from ray_merge.plan.moments import plan_moments, tasks_with_data
from ray_merge.pool import Done, Turn
from ray_merge.pool_steps import StepPool
from ray_merge.recipe import Recipe
from ray_merge.step_schedule import Step
from ray_merge.storage.checkpoint import read_checkpoint
from ray_merge.storage.store import Stores, open_store
from ray_merge.work.moments_file import AnyMoments, MomentsFile
from ray_merge.work.stage_job import StageJob
from ray_merge.work.stage_worker import StageWorker

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
DECODER = {**SMALL, "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64}
ENCODER = {**SMALL, "vocab_size": 96, "max_position_embeddings": 66}
IMAGES = {**SMALL, "image_size": 16, "patch_size": 4}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 96, "n_positions": 64}

FAMILIES: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", DECODER),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**DECODER, "head_dim": 8, "sliding_window": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**DECODER, "sliding_window": 8}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "bert": ("BertConfig", "BertModel", ENCODER),
    "roberta": ("RobertaConfig", "RobertaModel", {**ENCODER, "pad_token_id": 1}),
    "vit": ("ViTConfig", "ViTModel", IMAGES),
    "clip_vision": ("CLIPVisionConfig", "CLIPVisionModel", {**IMAGES, "projection_dim": 16}),
}


def make_model(name: str, folder: Path) -> Path:
    """A random model of one family, saved."""
    import transformers

    config_class, model_class, sizes = FAMILIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**sizes)
    getattr(transformers, model_class)(config).save_pretrained(folder)
    return folder


def write_tokens(path: Path, seed: int, rows: int = 10) -> Path:
    """Rows of token ids of different lengths, so that every batch has padding."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(5, 25, (rows,), generator=generator).tolist()
    ids = [torch.randint(5, 96, (size,), generator=generator).tolist() for size in sizes]
    path.write_text("".join(json.dumps({"input_ids": one}) + "\n" for one in ids))
    return path


def write_pixels(path: Path, seed: int, rows: int = 10) -> Path:
    """Small random images."""
    images = torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    path.write_text("".join(json.dumps({"pixel_values": one.tolist()}) + "\n" for one in images))
    return path


def recipe_for(
    base: Path, output: Path, data: Mapping[str, Path], targets: Sequence[str], **more: Any
) -> Recipe:
    """A recipe without adapters that needs moments of some modules."""
    calibration = {"samples": 8, "max_length": 24, "batch_size": 4, **more.pop("calibration", {})}
    return Recipe.model_validate(
        {
            "base_model": str(base),
            "output": str(output),
            "adapters": {name: {"data": str(path)} for name, path in data.items()},
            "init": {"method": "osrm", "target_modules": list(targets), "output": str(output / "init")},
            "calibration": calibration,
            **more,
        }
    )


def linears(base: Path) -> list[str]:
    """Names of all linear layers of a base, as target modules."""
    skeleton = _skeleton(base)
    return sorted(
        {
            path.rpartition(".")[2]
            for path, one in skeleton.model.named_modules()
            if (isinstance(one, nn.Linear) or type(one).__name__ == "Conv1D")
            and skeleton.blocks.block_of(path) is not None
        }
    )


def _skeleton(base: Path) -> Any:
    checkpoint = read_checkpoint(open_store(str(base)))
    return build_skeleton(checkpoint.config, {k: v.shape for k, v in checkpoint.tensors.items()})


def moments_by_stages(
    recipe: Recipe, store: Path, cache: Path, make_pool: Callable[[StageJob], StepPool]
) -> MomentsResult:
    """What `calibrate` does, with a pool of the test's choice."""
    base = read_checkpoint(open_store(recipe.base_model))
    tasks = tasks_with_data(recipe, list(recipe.adapters), "the test")
    plan = plan_moments(recipe, base, tasks, {}, recipe.init.target_modules)
    work = Work(store=str(store), adapters={}, sites={}, cache=cache, device="cpu", make_pool=make_pool)
    return ensure_moments(plan, work)


def moments_of(result: MomentsResult, task: str) -> Iterator[tuple[str, AnyMoments]]:
    """Site and stored moments of one task."""
    for site, info in result.index.objects[task].items():
        yield site, MomentsFile(Path(result.index.store) / info.path).moments(site)


def inputs_by_hooks(recipe: Recipe, task: str) -> dict[str, torch.Tensor]:
    """Site -> (N, I) float64 rows of its inputs, from transformers' own forward of the whole model."""
    import transformers

    base = read_checkpoint(open_store(recipe.base_model))
    model_class = getattr(transformers, base.config["architectures"][0])
    model = model_class.from_pretrained(recipe.base_model, dtype=torch.float32).eval()
    rows: dict[str, list[torch.Tensor]] = {}
    mask: list[torch.Tensor | None] = [None]

    def saw(path: str, _module: nn.Module, args: Any) -> None:
        x = args[0]
        if x.dim() == 3:  # a pooler takes one row for each example
            x = x.flatten(0, 1) if mask[0] is None else x[mask[0].bool()]
        rows.setdefault(path, []).append(x.double())

    slots = _skeleton(Path(recipe.base_model)).slots
    sites = {name.removesuffix(".weight"): slots[name][0].tensor.removesuffix(".weight") for name in slots}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in recipe.init.target_modules:
            module.register_forward_pre_hook(partial(saw, path))
    data = recipe.adapters[task].data
    loaded = load_batches(data, recipe.calibration, task, base, Path("unused"), Stores())
    with torch.no_grad():
        for batch in loaded.batches:
            mask[0] = batch.attention_mask
            given = {
                "input_ids": batch.input_ids,
                "attention_mask": mask[0],
                "pixel_values": batch.pixel_values,
            }
            model(**{name: value for name, value in given.items() if value is not None})
    return {sites[path]: torch.cat(found) for path, found in rows.items()}


@dataclass(frozen=True)
class Kill:
    """Where an actor kills itself with SIGKILL, once: before, after, or at the n-th batch of a unit."""

    marker: str
    when: str
    batch: int = 0

    def due(self) -> bool:
        """True the first time."""
        try:
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def at(self, when: str) -> None:
        """Die here, if it is here."""
        if when == self.when and self.due():
            os.kill(os.getpid(), signal.SIGKILL)


class KillingTurn:
    """A turn whose n-th check is the end of its process."""

    def __init__(self, turn: Turn, kill: Kill) -> None:
        self._turn, self._kill, self._checks = turn, kill, 0

    def check(self) -> None:
        self._checks += 1
        if self._checks == self._kill.batch:
            self._kill.at("batch")
        self._turn.check()

    def end(self) -> None:
        self._turn.end()


class AnyJobWorker:
    """A place that serves units of any job, so that one set of actors does for all tests of a file."""

    def __init__(self, place: int) -> None:
        self._place = place
        self._workers: dict[str, StageWorker] = {}

    def run(self, unit: Any, given: Sequence[Any], turn: Turn) -> tuple[Any, Any]:
        """The unit of one job; or die on the way, as its kill says."""
        job, one, kill = unit
        if job.attempt not in self._workers:
            self._workers = {job.attempt: StageWorker(job, self._place)}
        worker = self._workers[job.attempt]
        if kill is None:
            return worker.run(one, given, turn)
        kill.at("before")
        made = worker.run(one, given, KillingTurn(turn, kill))
        kill.at("after")
        return made


class JobOnPool:
    """One job's steps on a pool of `AnyJobWorker`s, which outlives it.

    Args:
        pool: of at least as many places as the job has stages.
        job: whose units.
        kills: unit id -> where its actor dies.
    """

    def __init__(self, pool: StepPool, job: StageJob, kills: Mapping[str, Kill] | None = None) -> None:
        self._pool, self._job, self._kills = pool, job, kills or {}
        self.n_places = pool.n_places

    def run(self, steps: Sequence[Step]) -> Iterator[Done]:
        """See `StepPool.run`."""
        return self._pool.run(
            [replace(step, unit=(self._job, step.unit, self._kills.get(step.id))) for step in steps]
        )

    def close(self) -> None:
        """The pool stays."""

    def __enter__(self) -> JobOnPool:
        return self

    def __exit__(self, *_: object) -> None:
        pass
