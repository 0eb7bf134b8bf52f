import dataclasses
from collections import Counter

import pytest
import torch

from ray_merge.errors import Refusal
from ray_merge.methods import get
from ray_merge.methods.cost import made
from ray_merge.methods.registry import METHODS
from ray_merge.plan.estimate import Cluster, estimate, exported_bytes, flops, parse_cluster, site_flops
from ray_merge.plan.kinds import SiteKinds
from ray_merge.show import _duration, plan_json
from ray_merge.spec import DTYPE_BYTES, needs_base
from tiny import (
    HIDDEN,
    Q0,
    V1,
    factors,
    llama_tensors,
    plan_of,
    write_adapter,
    write_base,
    write_recipe_files,
)


def kinds_by_hand(plan, names):
    """The definition: every site, every adapter."""
    found = Counter()
    for site in plan.sites.values():
        updates = [u for name in names if (u := plan.adapters[name].factors.get(site.name)) is not None]
        if updates:
            item = DTYPE_BYTES[plan.base.tensors[site.tensor].dtype] if any(map(needs_base, updates)) else 0
            ranks = tuple(update.rank for update in updates)
            found[site.shape, ranks, site.shape[0] * site.shape[1] * item] += 1
    return found


@pytest.fixture
def plan(tmp_path):
    names = ("a", "b", "wide", "dora", "pattern", "few", "bias")
    recipe = write_recipe_files(tmp_path, names)
    base = llama_tensors(4, torch.bfloat16)
    base[f"{Q0}.bias"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    write_base(tmp_path / "base", base)
    modules = [f"model.layers.{layer}.self_attn.{leaf}_proj" for layer in range(4) for leaf in "qv"]

    def many(rank, of=modules):
        return {name: tensor for module in of for name, tensor in factors(module, rank).items()}

    write_adapter(tmp_path / "a", many(2))
    write_adapter(tmp_path / "b", many(2))
    write_adapter(tmp_path / "wide", many(5), r=5)
    magnitudes = {
        f"base_model.model.{module}.lora_magnitude_vector": torch.ones(HIDDEN) for module in modules
    }
    write_adapter(tmp_path / "dora", many(3) | magnitudes, r=3, use_dora=True)
    mixed = many(2, modules[:3]) | many(4, modules[3:6])
    write_adapter(tmp_path / "pattern", mixed, r=4, rank_pattern=dict.fromkeys(modules[:3], 2))
    write_adapter(tmp_path / "few", many(7, [V1]), r=7)
    write_adapter(
        tmp_path / "bias", many(2, [Q0]) | {f"base_model.model.{Q0}.bias": torch.ones(HIDDEN)}, bias="all"
    )
    return plan_of(recipe)


@pytest.mark.parametrize(
    "names",
    [
        ["a"],
        ["a", "b"],
        ["b", "wide", "few"],
        ["few"],
        ["dora", "a"],
        ["pattern", "wide"],
        ["bias", "a", "pattern"],
    ],
)
def test_kinds_are_those_that_a_look_at_every_site_finds(plan, names):
    kinds = SiteKinds(plan.adapters, plan.sites, plan.base.tensors)
    assert kinds.of(names) == kinds_by_hand(plan, names)
    assert kinds.of([]) == Counter()


def test_an_estimate_is_bytes_over_rates_and_work_over_arithmetic(plan):
    cluster = Cluster(workers=2, read_bytes_per_second=100, write_bytes_per_second=50, flops_per_second=1e6)
    found = estimate(plan, cluster)
    units = plan.n_units
    share = -(-units // 2) / units
    assert found.units == units > 2
    assert found.read_bytes == plan.read_bytes + 2 * plan.adapter_bytes
    assert found.read_hours * 3600 == pytest.approx((plan.read_bytes * share + plan.adapter_bytes) / 100)
    assert found.write_hours * 3600 == pytest.approx(plan.write_bytes * share / 50)
    assert found.arithmetic_hours * 3600 == pytest.approx(flops(plan) * share / 1e6)
    assert found.hours == max(found.read_hours, found.arithmetic_hours) + found.write_hours
    assert found.peak_bytes_per_worker * 2 == found.cluster_memory_bytes


@pytest.mark.parametrize(
    ("rate", "word"),
    [
        ("read_bytes_per_second", "read"),
        ("write_bytes_per_second", "write"),
        ("flops_per_second", "arithmetic"),
    ],
)
def test_the_slowest_of_the_three_is_named(plan, rate, word):
    fast = Cluster(read_bytes_per_second=10**12, write_bytes_per_second=10**12, flops_per_second=1e15)
    assert estimate(plan, dataclasses.replace(fast, **{rate: 1})).bound_by == word


def test_more_workers_than_units_gain_nothing_but_copies_of_adapters(plan):
    units = plan.n_units
    one, many = (estimate(plan, Cluster(workers=workers)) for workers in (units, 1000 * units))
    assert (one.hours, one.read_bytes) == (many.hours, many.read_bytes)
    assert estimate(plan, Cluster(workers=1)).hours > one.hours


def test_arithmetic_grows_with_rank_adapters_and_rules():
    shape, sums, ties = (64, 32), get("task_arithmetic"), get("ties")
    small, large = ((shape, ranks, 0) for ranks in ((2,), (2, 6)))
    assert site_flops(sums, "dense", large) - site_flops(sums, "dense", small) == 2 * 64 * 32 * 6
    assert site_flops(ties, "dense", large) > site_flops(sums, "dense", large)
    assert site_flops(ties, "core", large) > site_flops(sums, "dense", large)


MEASURED = {
    # Seconds on one thread at 2048 x 2048, 8 adapters of rank 16: making the merge and all of its rows.
    ("task_arithmetic", "dense"): 0.012, ("svd", "dense"): 0.025, ("ties", "dense"): 0.154, ("ties", "core"): 0.057,
    ("knots_ties", "knots"): 0.057, ("dare_linear", "dense"): 0.162, ("dare_ties", "dense"): 0.182,
    ("tsv_m", "dense"): 0.064, ("iso_c", "core"): 0.062, ("iso_cts", "dense"): 0.072, ("cart", "dense"): 0.077,
    ("lora_lego", "dense"): 0.014, ("robustmerge", "dense"): 0.017, ("free", "dense"): 0.060,
    ("wudi", "dense"): 0.026, ("magnitude_prune", "dense"): 0.140, ("breadcrumbs_ties", "dense"): 0.264,
    ("della", "dense"): 2.234, ("della", "knots"): 0.202, ("consensus", "dense"): 0.109,
    ("consensus_ties", "dense"): 0.233, ("pcb", "dense"): 2.436, ("pcb", "knots"): 0.586, ("emr", "dense"): 0.131,
    ("regmean", "dense"): 0.193, ("fisher", "dense"): 0.046, ("tara_a", "dense"): 0.014, ("tara_b", "dense"): 0.037,
}  # fmt: skip


@pytest.mark.parametrize(("name", "space"), MEASURED)
def test_every_family_costs_what_was_measured(name, space):
    work = get(name).work(space, (2048, 2048), (16,) * 8)
    assert 0.5 < work / 90e9 / MEASURED[name, space] < 2


def test_every_family_was_measured():
    assert {get(name).family for name, _ in MEASURED} == {method.family for method in METHODS}


def test_every_method_costs_more_for_more():
    for method in METHODS:
        for space in method.spaces:
            small, wide, many, large = (
                method.work(space, shape, ranks)
                for shape, ranks in (
                    ((512, 256), (8, 8)),
                    ((512, 256), (16, 16)),
                    ((512, 256), (8, 8, 8)),
                    ((1024, 512), (8, 8)),
                )
            )
            assert 0 < small < min(wide, large), (method.name, space)
            assert small < many, (method.name, space)


def test_coordinates_are_made_again_to_select_over_the_model(tmp_path):
    recipe = write_recipe_files(tmp_path)  # each touches one 8 x 8 site with rank 2

    def taken(*merges):
        recipe["merges"] = [
            {"name": f"m{index}", "merge_method": "ties", **merge} for index, merge in enumerate(merges)
        ]
        return flops(plan_of(recipe))

    def ties(scope, space="dense", names=("a", "b")):
        return {"adapters": list(names), "parameters": {"scope": scope, "space": space}}

    product = 2 * 64 * 2
    assert taken(ties("model")) - taken(ties("tensor")) == 2 * 2 * product
    # The same deltas are counted once for all merges, and with them those of another merge.
    assert taken(ties("model"), ties("model"), ties("model", names="a")) - taken(
        ties("tensor"), ties("tensor"), ties("tensor", names="a")
    ) == pytest.approx(2 * 2 * product)
    core, knots = (made(space, (8, 8), (2,)) for space in ("core", "knots"))
    assert taken(ties("model", "core")) - taken(ties("tensor", "core")) == pytest.approx(3 * 2 * core)
    assert taken(ties("model", "core"), ties("model", "knots", "a")) - taken(
        ties("tensor", "core"), ties("tensor", "knots", "a")
    ) == pytest.approx(3 * (2 * core + knots))


def test_an_exported_adapter_is_counted_at_its_rank(tmp_path):
    recipe = write_recipe_files(tmp_path)
    recipe["merges"][0]["export"] = "adapter"
    # Q0 of a and V1 of b, rank 2 each, (8 + 8) numbers for each rank.
    assert exported_bytes(plan_of(recipe)) == 2 * 2 * 16 * 4
    recipe["merges"][0]["export_rank"] = 1
    assert exported_bytes(plan_of(recipe)) == 2 * 1 * 16 * 4


def test_clusters_are_written_in_words_of_their_own():
    assert parse_cluster("") == Cluster()
    assert parse_cluster("workers=64, read=1GB/s,write=500MB/s,flops=2T") == Cluster(
        workers=64, read_bytes_per_second=10**9, write_bytes_per_second=5 * 10**8, flops_per_second=2e12
    )
    assert parse_cluster("read=1GiB").read_bytes_per_second == 2**30
    assert parse_cluster("flops=30 GFLOPS").flops_per_second == 30e9


@pytest.mark.parametrize(
    "text",
    ["workers=0", "workers=1.5", "workers=", "read=fast", "read=0", "flops=0", "flops=2X", "nodes=3", "workers",
     "workers=2,workers=3", "workers=99999999", "flops=1e400", "write=-1GB"],
)  # fmt: skip
def test_what_is_no_cluster_is_refused_with_an_example(text):
    with pytest.raises(Refusal, match=r"--cluster: .*workers=64,read=1GB/s"):
        parse_cluster(text)


def test_json_has_the_numbers_that_the_table_shows(plan, capsys):
    from ray_merge.show import plan_table

    cluster = Cluster(workers=3)
    facts = plan_json(plan, cluster)["estimate"]
    assert facts == dataclasses.asdict(estimate(plan, cluster))
    plan_table(plan, cluster)
    printed = capsys.readouterr().out
    assert f"estimate  about {facts['hours'] * 3600:.2g} s, most of it {facts['bound_by']}" in printed
    assert "3 worker(s)" in printed


@pytest.mark.parametrize(
    ("hours", "words"),
    [(0, "0 s"), (1e-5, "0.036 s"), (0.01, "36 s"), (0.5, "30 min"), (1.25, "1.2 h"), (1234.5, "1234 h")],
)
def test_a_time_is_told_in_the_unit_that_a_person_would_take(hours, words):
    assert _duration(hours) == words


def test_many_names_are_shortened_in_the_table_alone(tmp_path, capsys):
    from ray_merge.show import plan_table

    names = tuple(f"n{index:02d}" for index in range(20))
    plan = plan_of(write_recipe_files(tmp_path, names))
    plan_table(plan)
    printed = capsys.readouterr().out.split("merge ", 1)[1]
    assert "n00 n01 n02 ... n19 (20)" in printed
    assert "n07" not in printed
    assert plan_json(plan)["merges"][0]["adapters"] == list(names)
