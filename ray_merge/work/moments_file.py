"""The object that holds moments of one task and one part: a safetensors file, written and read.

    <leader>.gram       (I (I + 1) / 2,) float64   upper triangle of sum x x^T, row by row
    <leader>.sketch     (L, I) float64              with precision: sketch, in place of the gram
    <leader>.shrinkage  (1,) float64                its certified 2-norm bound
    <leader>.mean       (I,) float64
    <site>.fisher       (O, I) float32              of fisher, as the weight is stored

Sites that get the same input share one entry, named after the first of them. The header says who shares what.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_merge.algebra.moments import Moments, pack, unpack
from ray_merge.algebra.sketch import SketchedMoments
from ray_merge.errors import CheckpointError, RunFailed
from ray_merge.identity import canonical_json
from ray_merge.storage.headers import parse_header
from ray_merge.storage.writer import ScratchFile
from ray_merge.work.stage_job import METADATA_KEY
from ray_merge.work.tensors import TensorFile, to_bytes

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32"}

AnyMoments = Moments | SketchedMoments


@dataclass(frozen=True, slots=True)
class Collected:
    """Moments of one part before they are written.

    Args:
        moments: by leader, in order.
        leaders: site -> the site whose entry it shares.
    """

    moments: Mapping[str, AnyMoments]
    leaders: Mapping[str, str]


def write_moments(path: Path, found: Collected, about: Mapping[str, Any]) -> tuple[int, str]:
    """Write one object to a scratch path; returns its bytes and sha256.

    Args:
        path: whose folder exists.
        found: what to write.
        about: what a person should know: task, part, id.
    """
    tensors = dict(_tensors(found))
    counts = {leader: one.count for leader, one in found.moments.items()}
    return _write(path, tensors, {**about, "sites": dict(found.leaders), "count": counts})


def write_fisher(path: Path, diagonals: Mapping[str, Tensor], about: Mapping[str, Any]) -> tuple[int, str]:
    """Write the Fisher diagonals of one part; returns bytes and sha256."""
    tensors = {f"{site}.fisher": values_OI.float() for site, values_OI in diagonals.items()}
    norms = {site: float(values_OI.double().norm()) for site, values_OI in diagonals.items()}
    return _write(path, tensors, {**about, "sites": {site: site for site in diagonals}, "norm": norms})


def _tensors(found: Collected) -> Any:
    for leader, one in found.moments.items():
        if isinstance(one, SketchedMoments):
            yield f"{leader}.sketch", one.sketch.double()
            yield f"{leader}.shrinkage", torch.tensor([one.shrinkage], dtype=torch.float64)
        else:
            yield f"{leader}.gram", pack(one.gram)
        yield f"{leader}.mean", one.mean.double()


def _write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> tuple[int, str]:
    layout = [(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    file = ScratchFile(path, layout, {METADATA_KEY: canonical_json(about)})
    for tensor in tensors.values():
        file.write(to_bytes(tensor))
    sha256 = file.close()
    return file.n_bytes, sha256


class MomentsFile:
    """One such object on this node's disk.

    Args:
        path: the local file.
        object_id: the id that it must have; "" takes any.
        where: what messages call it; the path by default.

    Raises:
        RunFailed: it is none, damaged, or another one.
    """

    def __init__(self, path: Path, object_id: str = "", where: str = "") -> None:
        where = where or str(path)
        try:
            with path.open("rb") as raw:
                length = int.from_bytes(raw.read(8), "little")
                header = parse_header(
                    raw.read(length), file=path.name, file_bytes=path.stat().st_size, where=str(path)
                )
            self._about: dict[str, Any] = json.loads(header.metadata[METADATA_KEY])
            self.leaders: dict[str, str] = dict(self._about["sites"])
            is_it = not object_id or self._about["id"] == object_id
        except (CheckpointError, KeyError, ValueError, TypeError) as error:
            raise RunFailed(
                f"{object_id or path} is damaged or holds no moments; remove it and run again"
            ) from error
        if not is_it:
            raise RunFailed(f"{object_id} holds the moments {self._about['id']}; remove it and run again")
        self._entries = header.tensors
        self._file = TensorFile(path)
        self._path = path

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def moments(self, site: str) -> AnyMoments:
        """The moments of a site that the file holds.

        Raises:
            RunFailed: it holds none of that site.
        """
        leader = self._leader(site)
        mean_I = self._read(f"{leader}.mean").clone()
        count = int(self._about["count"][leader])
        if f"{leader}.sketch" in self._entries:
            shrinkage = float(self._read(f"{leader}.shrinkage")[0])
            return SketchedMoments(self._read(f"{leader}.sketch").clone(), shrinkage, mean_I, count)
        return Moments(unpack(self._read(f"{leader}.gram"), len(mean_I)), mean_I, count)

    def fisher(self, site: str, norm: float) -> FisherRows:
        """The Fisher diagonal of a site, read row by row.

        Args:
            site: which.
            norm: over all sites of the task.
        """
        self._leader(site)
        return FisherRows(self._file, self._entries[f"{site}.fisher"], norm)

    @property
    def norms(self) -> Mapping[str, float]:
        """Frobenius norm of the Fisher diagonal of each site."""
        return {site: float(norm) for site, norm in self._about["norm"].items()}

    def _leader(self, site: str) -> str:
        if site not in self.leaders:
            raise RunFailed(f"{self._path} holds no statistics of {site}; remove it and run again")
        return self.leaders[site]

    def _read(self, name: str) -> Tensor:
        if name not in self._entries:
            raise RunFailed(f"{self._path} lacks {name}; remove it and run again")
        return self._file.read(self._entries[name])


class FisherRows:
    """Rows of a stored Fisher diagonal, (O, I) float32.

    Args:
        file: that holds it.
        entry: where.
        norm: Frobenius norm over all sites of the task.
    """

    def __init__(self, file: TensorFile, entry: Any, norm: float) -> None:
        self._file, self._entry = file, entry
        self.norm = norm
        self.shape: tuple[int, int] = (entry.shape[0], entry.shape[1])

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`."""
        row_bytes = 4 * self.shape[1]
        first = self._entry.start + start * row_bytes
        data = self._file.read_bytes(first, first + (stop - start) * row_bytes)
        return torch.frombuffer(bytearray(data), dtype=torch.float32).view(stop - start, self.shape[1])
