"""Which units a run consists of, and what of theirs stays where they ran."""

from ray_merge.drive.units import missing_units, object_names, tasks_of
from tiny import plan_of, write_recipe_files


def test_units_of_the_same_merges_share_one_set_of_the_adapters_that_these_use(tmp_path):
    recipe = write_recipe_files(tmp_path, ("a", "b", "c"))
    how = {"merge_method": "task_arithmetic", "export": "both"}
    recipe["merges"] = [
        {"name": "ab", "adapters": ["a", "b"], **how},
        {"name": "c", "adapters": ["c"], **how},
    ]
    plan = plan_of(recipe)
    tasks = tasks_of(plan, missing_units(plan, {one.name: object_names(plan, one) for one in plan.merges}))
    shards, [first, second] = tasks[:-2], tasks[-2:]
    assert (first.data, second.data) == (frozenset("ab"), frozenset("c"))
    assert len(shards) == len(plan.shards) > 1
    assert all(task.data == frozenset("abc") for task in shards)
    assert len({id(task.data) for task in shards}) == 1
