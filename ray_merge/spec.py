"""The nouns of ray-merge as frozen dataclasses. No torch, no files, no Ray: anything may import this.

Shape legend, used in names everywhere (`B_OR` is a tensor of shape (O, R)):

    O  rows of a base weight (out features)      I  columns (in features)
    R  rank: of one adapter, or the sum over all of a merge       T  adapters of a merge (tasks)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Export = Literal["checkpoint", "adapter", "both"]

DTYPE_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one element, by the dtype names of the safetensors format."""

FLOAT_DTYPES: Mapping[str, str] = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}
"""A recipe's dtype names -> safetensors dtype names."""


CONV1D_MODELS = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_encoder", "clvp_decoder"}
)
"""Model types with HF Conv1D layers, whose weights are stored (in, out); a square one looks like a Linear's."""

HEADED_TASKS = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"})
"""PEFT's task types whose models have a head of their own, which PEFT saves without being told."""


@dataclass(frozen=True, slots=True)
class Factor:
    """One adapter's low-rank update of one site: the delta is `scale * B @ A`.

    Args:
        B: (O, R), any floating dtype.
        A: (R, I), same R. R may be 0: the adapter does not touch this site.
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA; it is not folded into B or A.
        magnitude: of DoRA (arXiv 2402.09353), else None: (O, 1) sets the norm of every row of W + scale B A,
            (1, I) that of every column. The delta is then dense and depends on the base weight W.
    """

    B: Tensor
    A: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor's bytes lie: `file` relative to its checkpoint, `start`..`end` counted from byte 0."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Length in bytes."""
        return self.end - self.start


Layout = Literal["linear", "conv1d", "embedding", "conv", "mha", "expert", "raw"]
"""What kind of layer a site's weight belongs to: HF Conv1D is stored (in, out); `expert` is one expert of a 3-D
parameter or a part of one; `raw` is a bias or another parameter that adapters save as it is."""


@dataclass(frozen=True, slots=True)
class Site:
    """One base weight, or one slab of rows of it, that adapters touch; shape (O, I) in the order it is stored.

    Args:
        name: unique; the disk name without `.weight`, so that it depends on the base alone. `[3]` behind it is
            expert 3 of a fused tensor, `[34 rows]` a table that an adapter has resized.
        tensor: disk name of its weight (`encoder.layer.0.attention.self.query.weight`).
        shape: (O, I); a convolution has I = inputs * kernel, a bias I = 1.
        start: its first row where the tensor is seen as rows of length I.
        layout: kind of layer, as the adapter sees it that named the site first; another one may see a raw parameter.
        depth: its block among the blocks of its list, 0 for the first and 1 for the last (plan/depth.py); None where
            the base has no blocks or is not known.
    """

    name: str
    tensor: str
    shape: tuple[int, int]
    start: int = 0
    layout: Layout = field(default="linear", compare=False)
    depth: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class View:
    """How a stored tensor becomes a matrix: reshape, pick, blocks, transpose, cut; in this order.

    Args:
        entry: the stored tensor.
        shape: it is reshaped to this first.
        pick: (axis, index) of the one slice that is kept (one expert of many).
        blocks: rows are cut into so many chunks, which are put on a diagonal (BD-LoRA).
        transpose: rows and columns are swapped.
        cut: (axis, start, stop) of what is kept in the end (the gate half of a fused gate_up).
    """

    entry: TensorEntry
    shape: tuple[int, ...]
    pick: tuple[int, int] | None = None
    blocks: int = 1
    transpose: bool = False
    cut: tuple[int, int, int] | None = None

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the result."""
        shape: Sequence[int] = self.shape
        if self.pick is not None:
            shape = [size for axis, size in enumerate(shape) if axis != self.pick[0]]
        rows, columns = shape[0], shape[1] * self.blocks
        rows, columns = (columns, rows) if self.transpose else (rows, columns)
        if self.cut is None:
            return rows, columns
        kept = self.cut[2] - self.cut[1]
        return (kept, columns) if self.cut[0] == 0 else (rows, kept)


@dataclass(frozen=True, slots=True)
class Product:
    """`scale * B @ A` of one adapter at one site; without an A it is the identity, and B the delta itself."""

    B: View
    A: View | None
    scale: float

    @property
    def rank(self) -> int:
        """R."""
        return self.B.matrix[1]


@dataclass(frozen=True, slots=True)
class FactorEntry:
    """The low-rank update of one adapter at one site: a sum of products, and the magnitude if it is DoRA.

    Args:
        products: usually one; a second one takes the initial factors of PiSSA, OLoRA ... away again.
        initial: how many of the last products lie in the initial adapter's file.
        magnitude: DoRA's, as an (O, 1) or (1, I) matrix.
    """

    products: tuple[Product, ...]
    initial: int = 0
    magnitude: View | None = None

    @property
    def rank(self) -> int:
        """Sum of the ranks of its products."""
        return sum(product.rank for product in self.products)


@dataclass(frozen=True, slots=True)
class SavedEntry:
    """An adapter's own value of a whole parameter, trained and saved as it is: the delta is `saved - base`."""

    saved: View

    @property
    def rank(self) -> int:
        """Of the delta as a product with an identity."""
        return min(self.saved.matrix)


Update = FactorEntry | SavedEntry


def used_entries(updates: Iterable[Update], *, initial: bool = False) -> Iterator[TensorEntry]:
    """The stored tensors that updates are made of: an adapter's own, or those of its initial adapter."""
    for update in updates:
        if isinstance(update, SavedEntry):
            yield update.saved.entry
            continue
        own = len(update.products) - update.initial
        for product in update.products[own:] if initial else update.products[:own]:
            yield from (view.entry for view in (product.B, product.A) if view is not None)
        if update.magnitude is not None and not initial:
            yield update.magnitude.entry


def needs_base(update: Update | None) -> bool:
    """Whether an update depends on the base weight: DoRA, and parameters saved as they are."""
    return isinstance(update, SavedEntry) or (update is not None and update.magnitude is not None)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of an embedding table that an adapter sets: row `indices[k]` becomes row k of `entry`."""

    entry: TensorEntry
    indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SameValues:
    """Two stored tensors that must hold the same numbers for the adapter to be merged exactly; `why` says so."""

    one: View
    other: View
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One PEFT adapter, known from its headers alone, fitted to a base.

    Args:
        name: the recipe's name of it.
        url: the folder that holds adapter_config.json and adapter_model.safetensors.
        config: the parsed adapter_config.json.
        factors: site name -> its update there.
        modules: site name -> runtime name of the module in the class that the adapter was trained in.
        layouts: site name -> what kind of layer the adapter takes it for.
        heads: saved extra tensors of task heads, under their runtime names.
        replaced: disk tensor -> the saved tensor that takes its place (modules_to_save, resized embeddings).
        tables: the disk tensors in `replaced` that PEFT saved by itself beside LoRA on an embedding; several
            adapters may carry them as long as they are equal.
        tokens: disk tensor -> rows that are set.
        same: what preflight must find equal.
        ignored: saved tensors that do not enter a merge -> why.
        names: how its runtime names became disk names, in words.
        file: name of the weights file inside `url`.
        file_bytes: its size.
        file_version: the store's version of it when the headers were read; another one stops the run.
        pickled: the file is a pickle, converted on every node before use.
        side_files: (name, bytes, version) of tokenizer files beside it; they follow a resized vocabulary.
        initial: the adapter that training started from, where its factors must be taken away.
    """

    name: str
    url: str
    config: Mapping[str, Any]
    factors: Mapping[str, Update]
    modules: Mapping[str, str]
    layouts: Mapping[str, Layout]
    heads: tuple[TensorEntry, ...]
    replaced: Mapping[str, TensorEntry]
    tables: frozenset[str]
    tokens: Mapping[str, TokenRows]
    same: tuple[SameValues, ...]
    ignored: Mapping[str, str]
    names: str
    file: str
    file_bytes: int
    file_version: str
    pickled: bool = False
    side_files: tuple[tuple[str, int, str], ...] = ()
    initial: Adapter | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Merge:
    """One named result: a method applied to some adapters. All defaults are filled in.

    Args:
        name: entry name, then the combination, the point of the sweep and the preference:
            `pairs/mnli__stsb/alpha=0.2/mnli=0.5,stsb=0.5`.
        method: canonical name of the merge method.
        adapters: in recipe order.
        parameters: by the recipe's keys, canonical (methods/resolve.py).
        export: what is written.
        export_rank: rank that an exported adapter is truncated to at every site, or None.
        export_tolerance: relative error allowed to a truncated export at every site, or None.
        export_class: the task type of the class that an exported adapter is for, where those of `adapters` differ.
        heads: the adapter whose head the checkpoint gets, which is then a sequence-classification model; or None.
        seed: of every random mask.
        sweep: the point of the sweep as the recipe has it, key and value; empty without a sweep.
        combined: whether the entry asked for combinations.
        preferred: whether the entry asked for preferences, so that the last part of the name is one.
    """

    name: str
    method: str
    adapters: tuple[str, ...]
    parameters: Mapping[str, Any]
    export: Export = "checkpoint"
    export_rank: int | None = None
    export_tolerance: float | None = None
    export_class: str | None = None
    heads: str | None = None
    seed: int = 0
    sweep: tuple[tuple[str, Any], ...] = ()
    combined: bool = False
    preferred: bool = False


Figures = dict[str, "float | list[float | None] | None"]
"""Column of sites.parquet -> its value, None where it is not known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport:
    """What a merge did to one site; all but the seconds is deterministic and enters sites.parquet.

    Args:
        site: its name.
        tensor: disk name.
        rank: rank of the update as factors, or -1 where it is only known densely.
        update_norm: Frobenius norm of the update, before rounding.
        lost_share: Frobenius norm of (stored - base - update) over update_norm: what rounding to the
            output dtype took; 0 for an update of zero.
        truncation_error: relative Frobenius error of a rank truncation, 0 without one.
        n_bytes: of the stored weight, or of the exported factors.
        seconds: that its update took in the worker; kept in receipts only.
        figures: with `diagnostics: true`, more columns (work/diagnostics.py).
    """

    site: str
    tensor: str
    rank: int
    update_norm: float
    lost_share: float
    truncation_error: float = 0.0
    n_bytes: int = 0
    seconds: float = 0.0
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Proof of one committed object of one merge.

    Args:
        merge_id: 64 hex digits.
        name: object name inside the merge's folder.
        n_bytes: its length in bytes.
        sha256: its content, 64 hex digits.
        tensors: how many tensors it holds.
        unit: id of the unit that made it.
        sites: what was merged in it.
        sums: numbers by site that the driver adds up over all objects: of emr (drive/rescalers.py).
        began: when its unit began, in seconds since 1970 (UTC) by the worker's clock; 0 where nobody noted it.
        seconds: by phase: read, merge, write, upload; together from `began` to this receipt.
        unit_bytes: of the base, by the whole unit and for all of its merges: "read", and of these "decoded".
        worker: host and process that made it.
        adopted: True when the object was there already with the same bytes.
    """

    merge_id: str
    name: str
    n_bytes: int
    sha256: str
    tensors: int
    unit: str
    sites: tuple[SiteReport, ...] = ()
    sums: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    began: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)
    unit_bytes: Mapping[str, int] = field(default_factory=dict)
    worker: str = ""
    adopted: bool = False
