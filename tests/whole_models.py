"""Learning by plain autograd on any whole transformers model in float64, and adapters to learn merges of."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ray_merge
from ray_merge.calibration import load_batches
from ray_merge.learn.order import Order
from ray_merge.recipe import Calibration, DataSource
from ray_merge.storage.checkpoint import read_checkpoint
from ray_merge.storage.store import Stores, open_store

STEPS, ROWS, BATCH, RATE, INIT = 2, 5, 3, 0.02, 0.4
PLAIN = {"steps": STEPS, "batch_size": BATCH, "learning_rate": RATE, "weight_decay": 0.01, "init": INIT}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of data; arrays become lists."""
    plain = [{key: np.asarray(one).tolist() for key, one in row.items()} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in plain))
    return str(path)


def images(seed: int, size: int, count: int = ROWS) -> list[dict[str, Any]]:
    """Rows of noise images."""
    draw = np.random.default_rng(seed)
    return [{"pixel_values": draw.standard_normal((3, size, size)).astype(np.float32)} for _ in range(count)]


def write_adapter(
    folder: Path, modules: Mapping[str, tuple[Tensor, Tensor]], saved: Mapping[str, Tensor], **config: Any
) -> str:
    """A LoRA adapter of given (B, A) by module path, with scale 2, and whatever it saved whole."""
    folder.mkdir()
    tensors = {f"{path}.lora_B.weight": B for path, (B, _) in modules.items()}
    tensors |= {f"{path}.lora_A.weight": A for path, (_, A) in modules.items()}
    ranks = {path: A.shape[0] for path, (_, A) in modules.items()}
    about = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 2,
        "target_modules": sorted(modules),
        "rank_pattern": ranks,
        "alpha_pattern": {path: 2 * rank for path, rank in ranks.items()},
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(about))
    named = {f"base_model.model.{key}": one.contiguous() for key, one in {**tensors, **saved}.items()}
    save_file(named, folder / "adapter_model.safetensors")
    return str(folder)


def factors(model: Any, paths: Sequence[str], rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Random (B, A) of some linear layers of a model."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for path in paths:
        rows, columns = model.get_submodule(path).weight.shape
        found[path] = (
            0.5 * torch.randn(rows, rank, generator=draw),
            torch.randn(rank, columns, generator=draw) / columns**0.5,
        )
    return found


def run(
    folder: Path, method: str, adapters: Mapping[str, Any], parameters: Mapping[str, Any], **more: Any
) -> Any:
    """Learn one merge of all adapters in two stages and float64; returns site -> phi, and the history's objective."""
    recipe = {
        "base_model": str(folder / "base"),
        "output": str(folder / "out"),
        "dtype": "float64",
        "stages": 2,
        "adapters": adapters,
        "merges": [{"name": "m", "merge_method": method, "parameters": {**PLAIN, **parameters}}],
        **more,
    }
    ray_merge.run(recipe, engine="local", cache_dir=folder / "cache")
    tensors = load_file(Path(recipe["output"]) / "m" / "ray_merge" / "phi.safetensors")
    phi = {name.removeprefix("phi."): one for name, one in tensors.items() if name.startswith("phi.")}
    return phi, tensors["history.objective"]


def exact_norm(self: Any, x: Tensor) -> Tensor:
    """LlamaRMSNorm without its rounding to float32, by which sums in another order would show at 1e-8."""
    scaled: Tensor = self.weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.variance_epsilon)
    return scaled


class Whole:
    """A frozen model with the merged update of some adapters beside its linear layers.

    Args:
        model: float64, in the class that the adapters were trained in.
        folders: of the adapters.
        kind: tara_a for a coefficient per direction, else one per adapter.
    """

    def __init__(self, model: Any, folders: Sequence[str], kind: str) -> None:
        self.model, self._kind = model.eval().requires_grad_(False), kind
        self.seen: dict[str, Tensor] = {}
        self.pairs: dict[str, list[tuple[Tensor, Tensor] | None]] = {}
        for place, folder in enumerate(folders):
            tensors = load_file(Path(folder) / "adapter_model.safetensors")
            for key, A in tensors.items():
                path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                if key.endswith("lora_A.weight"):
                    B = tensors[key.replace("lora_A", "lora_B")].double()
                    self.pairs.setdefault(path, [None] * len(folders))[place] = B, 2 * A.double()
        self.phi: dict[str, Tensor] = {}
        for path, pairs in sorted(self.pairs.items()):
            n_directions = sum(one[1].shape[0] for one in pairs if one is not None)
            count = n_directions if kind == "tara_a" else len(pairs)
            self.phi[path] = torch.full((count,), INIT, dtype=torch.float64, requires_grad=True)
            model.get_submodule(path).register_forward_hook(partial(self._add, path))

    def _add(self, path: str, _module: Any, args: Any, out: Tensor) -> Tensor:
        self.seen[path] = args[0]
        start = 0
        for place, pair in enumerate(self.pairs[path]):
            if pair is None:
                continue
            B, A = pair
            stop = start + A.shape[0]
            weights = self.phi[path][start:stop] if self._kind == "tara_a" else self.phi[path][place]
            out = out + ((args[0] @ A.T) * weights) @ B.T
            start = stop
        return out

    def omega(self, place: int, paths: Sequence[str], mask: Tensor | None) -> Tensor:
        """Mean null-space ratio of the last inputs in the null spaces of an adapter's own A."""
        found = []
        for path in paths:
            pair = self.pairs[path][place]
            assert pair is not None
            x = self.seen[path]
            z = x[mask.bool()] if mask is not None and x.dim() == 3 else x.reshape(-1, x.shape[-1])
            projector = torch.eye(z.shape[1], dtype=z.dtype) - torch.linalg.pinv(pair[1]) @ pair[1]
            found.append(((z @ projector).norm(dim=-1) / z.norm(dim=-1)).mean())
        return torch.stack(found).mean()

    def learn(self, loss: Callable[[int], Tensor]) -> list[float]:
        """AdamW as the recipe has it; returns the loss before each step."""
        optimiser = torch.optim.AdamW(list(self.phi.values()), lr=RATE, weight_decay=0.01)
        curve = []
        for step in range(STEPS):
            value = loss(step)
            optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            curve.append(float(value.detach()))
        return curve


def batches(folder: Path, name: str, data: str) -> list[dict[str, Tensor]]:
    """The rows of each step, padded on the right with 0."""
    base = read_checkpoint(open_store(str(folder / "base")))
    rows = load_batches(
        DataSource(path=data),
        Calibration(samples=10**6, batch_size=1),
        name,
        base,
        folder / "cache",
        Stores(),
    ).batches
    order = Order(0, name, len(rows), BATCH)
    return [_stacked([rows[place] for place in order.batch(step)]) for step in range(STEPS)]


def _stacked(rows: Sequence[Any]) -> dict[str, Tensor]:
    found = {}
    if rows[0].pixel_values is not None:
        found["pixel_values"] = torch.cat([row.pixel_values for row in rows]).double()
    if rows[0].input_ids is not None:
        for key in ("input_ids", "attention_mask"):
            parts = [getattr(row, key)[0] for row in rows]
            found[key] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    return found


def check(
    phi: Mapping[str, Tensor],
    whole: Whole,
    site_of: Callable[[str], str] = str,
    still: Collection[str] = (),
) -> None:
    """Compare learned phi with that of autograd, which must have moved but for sites that no gradient comes to."""
    assert sorted(phi) == sorted(map(site_of, whole.phi))
    for path, leaf in whole.phi.items():
        start = torch.tensor(INIT, dtype=torch.float64)
        assert torch.allclose(leaf.detach(), start, atol=1e-3) == (path in still)
        torch.testing.assert_close(phi[site_of(path)], leaf.detach(), rtol=0, atol=1e-8)
