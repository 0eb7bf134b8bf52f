"""Tiny classification and regression adapters to learn merges of, and what plain autograd makes of the same batches."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ray_merge.calibration import load_batches
from ray_merge.learn.order import Order
from ray_merge.recipe import Calibration, DataSource
from ray_merge.storage.checkpoint import read_checkpoint
from ray_merge.storage.store import Stores, open_store

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
CLASSES = {"two": 2, "three": 3, "five": 5}
TARGETS = {
    "two": ["query", "value"],
    "three": ["query", "value", "dense"],
    "five": ["query", "dense"],
    "one": ["query"],
}
RANKS = {"two": 2, "three": 4, "five": 3, "one": 2}
ROWS = 11


def make_school(folder: Path) -> Path:
    """A BERT of four blocks without head, three classifiers and one regression on it, and unlabelled rows of each."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    torch.manual_seed(0)
    BertModel(BertConfig(num_hidden_layers=4, initializer_range=0.2, **SIZES)).save_pretrained(
        folder / "base"
    )
    for number, (name, rank) in enumerate(RANKS.items()):
        n_labels = CLASSES.get(name, 1)
        model = BertForSequenceClassification.from_pretrained(folder / "base", num_labels=n_labels)
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=TARGETS[name],
            task_type="SEQ_CLS",
            exclude_modules=["classifier"],
        )
        wrapped = get_peft_model(model, config)
        torch.manual_seed(number)
        with torch.no_grad():
            for key, value in wrapped.named_parameters():
                if "lora_B" in key or "modules_to_save" in key:
                    value.copy_(0.5 * torch.randn(value.shape))
        wrapped.save_pretrained(folder / name)
        draw = Random(number)
        rows = [[draw.randrange(1, 40) for _ in range(3 + index % 6)] for index in range(ROWS)]
        text = "".join(json.dumps({"input_ids": row}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def lesson(folder: Path, output: Path, method: str, names: Sequence[str], **more: Any) -> dict[str, Any]:
    """A recipe of one learned merge."""
    parameters = more.pop("parameters", {})
    return {
        "base_model": str(folder / "base"),
        "output": str(output),
        "dtype": "float64",
        "calibration": {"max_length": 32, "seed": 3},
        "adapters": {
            name: {"path": str(folder / name), "data": str(folder / f"{name}.jsonl")} for name in names
        },
        "merges": [{"name": "m", "merge_method": method, "adapters": list(names), "parameters": parameters}],
        **more,
    }


def learned_phi(output: Path, merge: str = "m") -> dict[str, Tensor]:
    """Site -> the published phi."""
    tensors = load_file(output / merge / "ray_merge" / "phi.safetensors")
    return {name.removeprefix("phi."): one for name, one in tensors.items() if name.startswith("phi.")}


def factors_of(folder: Path, names: Sequence[str]) -> dict[str, list[tuple[Tensor, Tensor] | None]]:
    """Site -> (B, s A) of each adapter in float64, None where it has none."""
    found: dict[str, list[Any]] = {}
    for place, name in enumerate(names):
        config = json.loads((folder / name / "adapter_config.json").read_text())
        tensors = load_file(folder / name / "adapter_model.safetensors")
        for key, A in tensors.items():
            if key.endswith("lora_A.weight"):
                site = key.removeprefix("base_model.model.bert.").removesuffix(".lora_A.weight")
                B = tensors[key.replace("lora_A", "lora_B")].double()
                pair = B, A.double() * config["lora_alpha"] / config["r"]
                found.setdefault(site, [None] * len(names))[place] = pair
    return dict(sorted(found.items()))


class Reference:
    """The same learning by plain autograd on the whole transformers model, float64.

    Args:
        folder: of `make_school`.
        method: tara_a, tara_b, adamerging or nsc.
        names: of adapters.
        init: of phi.
    """

    def __init__(self, folder: Path, method: str, names: Sequence[str], init: float = 0.4) -> None:
        from transformers import BertForSequenceClassification

        self._folder, self._names, self.kind = folder, names, method
        self.factors = factors_of(folder, names)
        self.model = BertForSequenceClassification.from_pretrained(
            folder / "base", dtype=torch.float64
        ).eval()
        self.model.requires_grad_(False)
        self.parts = {site: self._parts(pairs) for site, pairs in self.factors.items()}
        self.phi = {site: torch.full(self._shape(site), init, dtype=torch.float64) for site in self.factors}
        for leaf in self.phi.values():
            leaf.requires_grad_()
        self.seen: dict[str, Tensor] = {}
        for site in self.factors:
            module = self.model.get_submodule(f"bert.{site}")
            module.register_forward_hook(partial(self._add, site))

    def _parts(self, pairs: Sequence[Any]) -> list[Any]:
        if self.kind != "tara_b":
            return list(pairs)
        shape = next((B.shape[0], A.shape[1]) for B, A in filter(None, pairs))
        deltas = [
            torch.zeros(shape, dtype=torch.float64) if one is None else one[0] @ one[1] for one in pairs
        ]
        U, s, Vt = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
        n_kept = min(shape[0], sum(one[0].shape[1] for one in pairs if one is not None))
        return [(U[:, :n_kept], s[:n_kept, None] * part[:n_kept]) for part in Vt.split(shape[1], dim=1)]

    def _shape(self, site: str) -> tuple[int, ...]:
        parts = self.parts[site]
        if self.kind == "tara_b":
            return len(self._names), parts[0][0].shape[1]
        if self.kind == "tara_a":
            return (sum(one[0].shape[1] for one in parts if one is not None),)
        return (len(self._names),)

    def delta(self, site: str) -> Tensor:
        """The merged update at phi, dense."""
        phi, total, start = self.phi[site], 0, 0
        for place, one in enumerate(self.parts[site]):
            if one is None:
                continue
            left, right = one
            width = left.shape[1]
            if self.kind == "tara_a":
                rows = phi[start : start + width]
                start += width
            else:
                rows = phi[place]
            total = total + left @ (rows.reshape(-1, 1) * right)
        return total

    def _add(self, site: str, _module: Any, args: Any, out: Tensor) -> Tensor:
        self.seen[site] = args[0]
        return out + args[0] @ self.delta(site).T

    def use_head(self, name: str) -> None:
        """Put a task's own classifier on."""
        saved = load_file(self._folder / name / "adapter_model.safetensors")
        head = torch.nn.Linear(SIZES["hidden_size"], CLASSES[name], dtype=torch.float64)
        head.load_state_dict(
            {leaf: saved[f"base_model.model.classifier.{leaf}"].double() for leaf in ("weight", "bias")}
        )
        self.model.classifier = head.requires_grad_(False)
        self.model.num_labels = CLASSES[name]

    def batches(self, name: str, steps: int, batch_size: int, seed: int = 0) -> list[dict[str, Tensor]]:
        """The rows of each step."""
        base = read_checkpoint(open_store(str(self._folder / "base")))
        source = DataSource(path=str(self._folder / f"{name}.jsonl"))
        calibration = Calibration(samples=10**6, max_length=32, seed=3, batch_size=1)
        rows = load_batches(source, calibration, name, base, Path("unused"), Stores()).batches
        order = Order(seed, name, len(rows), batch_size)
        return [_padded([rows[place].input_ids[0] for place in order.batch(step)]) for step in range(steps)]


def _padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def information(logits: Tensor, diversity: float, normalise: bool) -> Tensor:
    """H(p|x) - diversity H(mean p), over ln C."""
    p = logits.softmax(-1)
    each = -(p * p.log()).sum(-1).mean()
    mean = p.mean(0)
    value = each + diversity * (mean * mean.log()).sum()
    return value / math.log(logits.shape[1]) if normalise else value


def omega(z: Tensor, A: Tensor) -> Tensor:
    """|projection of z onto the null space of A| / |z|, by an explicit projector."""
    projector = torch.eye(A.shape[1], dtype=A.dtype) - torch.linalg.pinv(A) @ A
    return (z @ projector).norm(dim=-1) / z.norm(dim=-1)


def entropies(
    model: Reference, names: Sequence[str], batches: Mapping[str, Any], step: int, **how: Any
) -> list[Tensor]:
    """f_i of every task on the batch of a step."""
    found = []
    for name in names:
        model.use_head(name)
        found.append(information(model.model(**batches[name][step]).logits, **how))
    return found


def divergences(
    model: Reference, names: Sequence[str], batches: Mapping[str, Any], step: int, own: Mapping[str, Any]
) -> list[Tensor]:
    """KL(own || merged) / ln C of every task on the batch of a step."""
    found = []
    for name in names:
        model.use_head(name)
        logp, logq = model.model(**batches[name][step]).logits.log_softmax(-1), own[name][step]
        found.append((logq.exp() * (logq - logp)).sum(-1).mean() / math.log(CLASSES[name]))
    return found


def ratios(
    model: Reference, names: Sequence[str], batches: Mapping[str, Any], step: int, blocks: Sequence[int]
) -> list[Tensor]:
    """Omega_i of every task: its own A, its own sites in some blocks, tokens without padding."""
    found = []
    for place, name in enumerate(names):
        batch = batches[name][step]
        model.model.bert(**batch)
        rows = batch["attention_mask"].bool()
        own = [
            omega(model.seen[site][rows], pairs[place][1]).mean()
            for site, pairs in model.factors.items()
            if pairs[place] is not None and any(f"layer.{block}." in site for block in blocks)
        ]
        found.append(torch.stack(own).mean())
    return found
