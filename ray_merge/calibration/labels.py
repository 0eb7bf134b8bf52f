"""Labels of rows, for the one method that needs them (Fisher's empirical variant): nothing else imports this.

Kept apart from the inputs, so that no other path can read a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_merge.calibration.files import find_files
from ray_merge.calibration.rows import Rows
from ray_merge.errors import RecipeError, shown
from ray_merge.recipe.model import Evaluation
from ray_merge.storage.store import Stores


def labels_of(
    evaluation: Evaluation, row_numbers: Sequence[int], task: str, stores: Stores
) -> list[int | float | str]:
    """The labels of rows, in the order of `row_numbers`.

    Args:
        evaluation: the recipe's `eval`: path and label column.
        row_numbers: rows over all files from 0, for example `Calibrated.row_numbers` of inputs from the same path.
        task: the adapter's name, for messages.
        stores: opens the data.

    Raises:
        RecipeError: no data, no such column, no such row, or a label that is neither number nor text.
    """
    where = f"adapters.{task}.eval"
    rows = Rows(find_files(evaluation.path, stores, where), None, where)
    beyond = max(row_numbers, default=-1)
    if beyond >= rows.n_rows:
        raise RecipeError(
            f"{where}: {evaluation.path} has {rows.n_rows} rows, row {beyond + 1} was asked for; are its inputs "
            "those of another file?"
        )
    ordered = sorted(set(row_numbers))
    found = dict(zip(ordered, rows.take(ordered, [evaluation.label]), strict=True))
    return [
        _label(found[row].values[evaluation.label], found[row].place, evaluation.label) for row in row_numbers
    ]


def _label(value: Any, place: str, name: str) -> int | float | str:
    if isinstance(value, int | float | str):
        return value
    raise RecipeError(
        f"{place}: column {name!r} is {shown(value)}, expected a number or text; remove the row"
    )
