"""What PEFT itself does with the rows of the parity table: `python tests/parity/what_peft_does.py [GLOB] [--all]`.

A markdown table of the rows where PEFT's own result is not the reference (relative error of the logits above 1e-5) or
where it raises; `--all` prints every row. Columns: `load` is PeftModel.from_pretrained on the saved folder, `merge` is
merge_and_unload of the live model, `saved` is that model after save_pretrained and from_pretrained. For combinations
`load` is every adapter active, `merge` is their merge_and_unload, and `cat` is add_weighted_adapter.
"""

from __future__ import annotations

import fnmatch
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rows import Row
from test_parity_table import ROWS, TOLERANCE, Bench
from torch import Tensor
from variants import quiet, train

from models import MODELS

Figure = float | str


def measure(compute: Callable[[], Tensor], want: Tensor) -> Figure:
    """Relative error of the logits that `compute` gives, or what it raised."""
    try:
        with quiet():
            got = compute()
    except Exception as error:  # noqa: BLE001  (whatever PEFT raises is the figure)
        return f"{type(error).__name__}: {' '.join(str(error).split())[:70]}"
    if got.shape != want.shape:
        return "another shape"
    return float((got.double() - want.double()).norm() / want.double().norm())


def single(bench: Bench, row: Row) -> dict[str, Figure]:
    """Figures of a row with one adapter."""
    from peft import PeftModel

    tiny, base = MODELS[row.model], bench.base(row.model)
    want, (folder,) = bench.reference(row), bench.adapters(row)[0]

    def load() -> Tensor:
        model = tiny.base(base)
        if row.adapters[0].resize is not None:
            model.resize_token_embeddings(row.adapters[0].resize, mean_resizing=False)
        return tiny.logits(PeftModel.from_pretrained(model, folder))

    with tempfile.TemporaryDirectory() as home:
        merged = []

        def merge() -> Tensor:
            merged.append(train(tiny, base, Path(home) / "a", row.adapters[0], seed=1).merge_and_unload())
            return tiny.logits(merged[0])

        def saved() -> Tensor:
            merged[0].save_pretrained(Path(home) / "merged")
            return tiny.logits(tiny.load(Path(home) / "merged"))

        return {"load": measure(load, want), "merge": measure(merge, want), "saved": measure(saved, want)}


def several(bench: Bench, row: Row) -> dict[str, Figure]:
    """Figures of a combination; a refused one is compared with the sum of its deltas."""
    from peft import PeftModel

    tiny, (folders, _) = MODELS[row.model], bench.adapters(row)
    want = bench.dense(row, folders)

    def together() -> PeftModel:
        model = PeftModel.from_pretrained(tiny.base(bench.base(row.model)), folders[0], adapter_name="a0")
        for folder in folders[1:]:
            model.load_adapter(folder, adapter_name=folder.name)
        return model

    def merge() -> Tensor:
        model = together()
        model.base_model.set_adapter([folder.name for folder in folders])
        return tiny.logits(model.merge_and_unload())

    def cat() -> Tensor:
        model, names = together(), [folder.name for folder in folders]
        model.add_weighted_adapter(names, [1.0] * len(names), "all", combination_type="cat")
        model.set_adapter("all")
        return tiny.logits(model)

    return {
        "load": measure(lambda: bench.all_active(row), want),
        "merge": measure(merge, want),
        "cat": measure(cat, want),
    }


def main() -> None:
    """Prints the table."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    everything = "--all" in sys.argv
    globs = [argument for argument in sys.argv[1:] if not argument.startswith("--")] or ["*"]
    home = Path(tempfile.mkdtemp())
    bench = Bench(home)
    print("| row | load | merge | saved or cat |\n|---|---|---|---|")
    for row in ROWS:
        if any(fnmatch.fnmatch(row.id, glob) for glob in globs):
            figures = (single if len(row.adapters) == 1 else several)(bench, row)
            if everything or any(isinstance(f, str) or f > TOLERANCE for f in figures.values()):
                cells = [f if isinstance(f, str) else f"{f:.1e}" for f in figures.values()]
                print(f"| {row.id} | {' | '.join(cells)} |", flush=True)
    shutil.rmtree(home)


if __name__ == "__main__":
    main()
