"""Outputs made of small files alone: what a report reads, of any size and as damaged as a test likes."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_merge.drive.publish import SITE_SCHEMA
from ray_merge.report.markup import VOID
from ray_merge.spec import Receipt, SiteReport
from ray_merge.storage.commit import RECEIPTS, receipt_path
from ray_merge.storage.headers import make_header

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")


def site_names(count: int) -> list[str]:
    """Sites of a Llama, block by block."""
    return [
        f"model.layers.{index // len(MODULES)}.{MODULES[index % len(MODULES)]}.weight"[:-7]
        for index in range(count)
    ]


def parquet(sites: Sequence[str], **columns: Any) -> bytes:
    """sites.parquet; a column that is None is left out, others are laid over plain values."""
    plain: dict[str, Any] = {
        "site": list(sites),
        "tensor": [f"{site}.weight" for site in sites],
        "export": ["checkpoint"] * len(sites),
        "update_norm": [1.0 + index % 7 for index in range(len(sites))],
        "lost_share": [0.001 * (index % 11) for index in range(len(sites))],
        **columns,
    }
    kept = {name: values for name, values in plain.items() if values is not None}
    schema = pa.schema([SITE_SCHEMA.field(name) for name in kept])
    buffer = io.BytesIO()
    pq.write_table(pa.table(kept, schema=schema), buffer)
    return buffer.getvalue()


def phi_file(tasks: Sequence[str], **curves: tuple[tuple[int, ...], Sequence[float]]) -> bytes:
    """phi.safetensors with `history.<name>` of a shape and values."""
    about = {"ray_merge": json.dumps({"tasks": list(tasks)})}
    header, _ = make_header([(f"history.{name}", "F64", shape) for name, (shape, _) in curves.items()], about)
    return header + b"".join(struct.pack(f"<{len(values)}d", *values) for _, values in curves.values())


def receipt(unit: str, worker: str, began: float, **seconds: float) -> Receipt:
    """Of one object of that unit."""
    site = SiteReport(site="s", tensor="t", rank=1, update_norm=1.0, lost_share=0.0)
    return Receipt(
        merge_id="a" * 64, name=f"{unit}-{worker}.safetensors", n_bytes=1000, sha256="b" * 64, tensors=1,
        unit=unit, sites=(site,), began=began, seconds=seconds, unit_bytes={"read": 500}, worker=worker,
    )  # fmt: skip


def write_merge(
    output: Path,
    name: str,
    *,
    sites: bytes | None = None,
    phi: bytes | None = None,
    receipts: Sequence[Receipt] = (),
    inputs: Mapping[str, Any] | None = None,
    complete: bool = True,
) -> Path:
    """One merge's folder as a run leaves it, without its shards."""
    folder = output / name
    (folder / "ray_merge").mkdir(parents=True)
    (folder / "ray_merge/recipe.yaml").write_text(
        "# merge id: "
        + "a" * 64
        + "\nbase_model: s3://models/llama\nadapters:\n  one: {path: s3://adapters/one}\n"
    )
    (folder / RECEIPTS).mkdir()
    for one in receipts:
        # Not by `put_receipt`: a thousand fsyncs take a minute.
        (folder / receipt_path(one.name)).write_text(json.dumps(asdict(one)))
    (folder / "ray_merge/sites.parquet").write_bytes(parquet(site_names(10)) if sites is None else sites)
    if phi is not None:
        (folder / "ray_merge/phi.safetensors").write_bytes(phi)
    manifest = {
        "format": 1,
        "id": "a" * 64,
        "name": name,
        "inputs": {
            "method": "ties",
            "parameters": {"lambda": 1.0},
            "adapters": [{"name": "one", "files": {"adapter_model.safetensors": "sha256:" + "c" * 64}}],
            "base": {"model.safetensors": "sha256:" + "d" * 64},
            **(inputs or {}),
        },
        "adapters": {"one": {"factors": 10, "heads": 0}},
        "files": [{"name": "model-00001-of-00001.safetensors", "bytes": 1000, "sha256": "e" * 64}],
    }
    if complete:
        (folder / "ray_merge/MANIFEST.json").write_text(json.dumps(manifest))
    return folder


def write_scores(output: Path, models: Mapping[str, Mapping[str, float]], **more: Any) -> None:
    """evaluation.json with these values, whose normalised ones are 100 times as large."""
    rows = {
        model: {
            task: {"metric": "accuracy", "value": value, "n": 10, "normalised": 100 * value}
            for task, value in scores.items()
        }
        for model, scores in models.items()
    }
    means = {model: 100 * sum(scores.values()) / len(scores) for model, scores in models.items()}
    (output / "ray_merge").mkdir(parents=True, exist_ok=True)
    (output / "ray_merge/evaluation.json").write_text(
        json.dumps({**rows, "means": means, "notes": [], **more})
    )


class Parsed(HTMLParser):
    """What a browser would make of a page, as far as tests ask."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[tuple[int, str]] = []
        self.cells: list[str] = []
        self.captions: list[str] = []
        self.texts: list[str] = []
        self.uncaptioned = 0
        self._open: list[str] = []
        self._first_in_table = False
        self.feed(page)
        self.close()
        assert self._open == [], self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if self._first_in_table:
            self.uncaptioned += tag != "caption"
        self._first_in_table = tag == "table"
        if tag not in VOID:
            self._open.append(tag)
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append((int(tag[1]), ""))
        for kind, texts in (("td", self.cells), ("caption", self.captions)):
            if tag == kind:
                texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> in <{self._open[-1]}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "script" not in self._open and "style" not in self._open:
            self.texts.append(data)
        if (
            self._open
            and self._open[-1] != "summary"
            and any(one in ("h1", "h2", "h3", "h4") for one in self._open)
        ):
            level, text = self.headings[-1]
            self.headings[-1] = level, text + data
        for kind, texts in (("td", self.cells), ("caption", self.captions)):
            if kind in self._open:
                texts[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every element of that name."""
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def text(self) -> str:
        """Everything that is to be read."""
        return "".join(self.texts)


def parse(path: Path | str) -> Parsed:
    """A report from its file."""
    return Parsed(Path(path).read_text(encoding="utf-8"))
