"""What is found out about adapters on the workers before the first object is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_merge.drive.identify import Inputs
from ray_merge.errors import AdapterError
from ray_merge.pool import Pool, Task
from ray_merge.spec import Merge
from ray_merge.work.job import AdapterCheck, PreflightUnit


def preflight(pool: Pool, adapters: Sequence[str], inputs: Inputs, merges: Sequence[Merge]) -> None:
    """Look at every number of every adapter before anything is written.

    Raises:
        NotFinite: NaN or Inf.
        AdapterError: an adapter changed meanwhile, or two of one merge hold different copies of one table.
    """
    tasks = [Task(unit.id, unit, frozenset({unit.adapter})) for unit in map(PreflightUnit, adapters)]
    tables: dict[str, Mapping[str, str]] = {}
    for done in pool.run(tasks):
        check: AdapterCheck = done.value
        tables[check.adapter] = check.tables
        expected = next(
            v for name, v in inputs.adapters[check.adapter].items() if name.startswith("adapter_model.")
        )
        if expected.startswith("sha256:") and expected != f"sha256:{check.sha256}":
            raise AdapterError(f"adapter {check.adapter} changed while the run was starting; run again")
    for merge in merges:
        _check_tables(merge, tables)


def _check_tables(merge: Merge, tables: Mapping[str, Mapping[str, str]]) -> None:
    """Embedding tables that PEFT saved beside several adapters of a merge must be copies of one."""
    first: dict[str, tuple[str, str]] = {}
    for name in merge.adapters:
        for tensor, sha256 in tables.get(name, {}).items():
            owner, digest = first.setdefault(tensor, (name, sha256))
            if digest != sha256:
                raise AdapterError(
                    f"merge {merge.name!r}: adapters {owner} and {name} were saved with different "
                    f"{tensor}; only one of them "
                    "can be right: merge them apart, or leave one out with adapters: [...]"
                )
