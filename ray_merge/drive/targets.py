"""Where all merges of a plan go and what is there: one place for each, none of them inside the base."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable

from ray_merge.drive.identify import Inputs, merge_id, merge_inputs
from ray_merge.drive.outputs import Target, look, output_root, today
from ray_merge.errors import OutputConflict
from ray_merge.plan import Plan
from ray_merge.storage.commit import read_complete
from ray_merge.storage.ordered import MAX_THREADS, in_order
from ray_merge.storage.store import Stores, check_no_credentials, join, open_store

EARLIER_DAYS = 366
"""How far back a merge is looked for under earlier dates, on a local disk."""

REMOTE_DAYS = 31
"""The same in a bucket, where each day is a request. What lies further back is known from a night's summary."""


def find_targets(plan: Plan, inputs: Inputs, date: str | None, stores: Stores) -> list[Target]:
    """The place of every merge of a plan, in its order.

    Args:
        plan: whose merges.
        inputs: content versions of what they are made of.
        date: UTC day for `{date}` in `output`; today by default.
        stores: opens them.

    Raises:
        OutputConflict: somebody else's files, two merges in one place, or a place inside the base model.
    """
    targets: list[Target] = []
    seen: dict[str, str] = {}
    day = date or today()  # one day for all of them
    for merge in plan.merges:
        document = merge_inputs(plan, merge, inputs)
        target = look(plan.recipe.output, merge.name, merge_id(document), document, day, stores)
        _refuse_in_base(target.url, plan)
        if target.url in seen:
            raise OutputConflict(f"merges {seen[target.url]!r} and {merge.name!r} both go to {target.url}")
        seen[target.url] = merge.name
        targets.append(target)
    return targets


def check_output(plan: Plan) -> None:
    """Refuse an output whose words alone are wrong; what lies there, `find_targets` looks at.

    Raises:
        Refusal: other fields than {date} and {id}, credentials, or a place inside the base model.
    """
    root = output_root(plan.recipe.output, "0" * 64)
    if "://" in root:
        check_no_credentials(root)
    else:
        root = open_store(root).url
    for merge in plan.merges:
        _refuse_in_base(join(root, *merge.name.split("/")), plan)


def _refuse_in_base(url: str, plan: Plan) -> None:
    if f"{_real(url)}/".startswith(f"{_real(plan.base.url)}/"):
        # Its files would count as the base's own: other ids, and the next run would copy them.
        raise OutputConflict(f"{url} lies inside the base model {plan.base.url}; choose another output")


def _real(url: str) -> str:
    return url if "://" in url else os.path.realpath(url)  # links hide where a folder lies


def is_complete(url: str, merge_id: str, stores: Stores) -> bool:
    """Whether that very merge lies at `url` now, with its manifest and all that it names.

    Raises:
        OutputConflict: what lies there is not a manifest.
    """
    manifest = read_complete(stores.open(url))
    return manifest is not None and manifest.get("id") == merge_id


def complete_before(
    template: str, name: str, merge_id: str, date: str, stores: Stores, *, known: str | None = None
) -> tuple[str, str] | None:
    """Under which earlier day of `{date}` in `output` a merge is complete, and where; the latest one, None for none.

    Args:
        template: `output` of the recipe.
        name: of the merge.
        merge_id: 64 hex digits.
        date: of this night.
        stores: opens them.
        known: a day that is looked at first, whatever lies between.
    """
    if "{date}" not in template:
        return None
    first = datetime.date.fromisoformat(date)
    back = (
        REMOTE_DAYS if stores.open(output_root(template, merge_id, date)).local_root is None else EARLIER_DAYS
    )
    days = [(first - datetime.timedelta(days=number)).isoformat() for number in range(1, back + 1)]
    chunks = [days[start : start + MAX_THREADS] for start in range(0, back, MAX_THREADS)]
    for some in [[known], *chunks] if known else chunks:  # the latest nights answer most often
        urls = [join(output_root(template, merge_id, day), *name.split("/")) for day in some]
        there = in_order(lambda url: _was_complete(url, merge_id, stores), urls)
        found = next((at for at, complete in enumerate(there) if complete), None)
        if found is not None:
            return some[found], urls[found]
    return None


def _was_complete(url: str, merge_id: str, stores: Stores) -> bool:
    try:
        return is_complete(url, merge_id, stores)
    except OutputConflict:
        return False  # what an earlier night left damaged must not stop this one


def incomplete(targets: Iterable[Target], stores: Stores) -> list[Target]:
    """Those that are not there, or not whole."""
    asked = list(targets)
    there = in_order(lambda target: is_complete(target.url, target.merge_id, stores), asked)
    return [target for target, complete in zip(asked, there, strict=True) if not complete]
