import dataclasses
import json
import subprocess
import sys

import pytest

from ray_merge.errors import MethodError
from ray_merge.methods import registry
from ray_merge.methods.kernels import load

NAMES = [method.name for method in registry.METHODS]


def test_declaring_and_resolving_import_no_torch():
    code = (
        "import sys; from ray_merge.methods import registry as r; "
        "r.resolve_parameters(r.get('ties'), {'scope': 'tensor'}, ['a']); "
        "r.working_bytes(r.get('ties'), None, (8, 8), [2]); print('torch' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False\n"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_can_be_imported(name):
    assert callable(load(registry.get(name).kernel))


@pytest.mark.parametrize("name", NAMES)
def test_every_declaration_is_complete(name):
    method = registry.get(name)
    described = json.loads(json.dumps(registry.describe(method)))
    assert set(described["parameters"]) == set(method.declared())
    assert all(item["help"] for item in described["parameters"].values())
    assert set(method.low_rank_spaces) <= set(method.spaces)
    assert dataclasses.is_dataclass(method.parameters)
    space = method.declared().get("space")
    assert space is None or (space.choices == method.spaces and space.default == method.spaces[0])


def test_a_method_that_needs_moments_says_which():
    assert {method.name: method.statistics for method in registry.METHODS if "moments" in method.needs} == {
        "regmean": "gram",
        "fisher": "fisher",
    }
    for method in registry.METHODS:
        assert bool(method.statistics) is ("moments" in method.needs)
        assert ("without_moments" in method.declared()) is ("moments" in method.needs)
        assert registry.describe(method)["statistics"] == method.statistics
    assert registry.statistics_kind(registry.get("ties"), {}) == ""
    assert registry.statistics_kind(registry.get("regmean"), {}) == "gram"
    assert registry.statistics_kind(registry.get("fisher"), {"labels": "sampled"}) == "fisher/sampled"


def test_a_method_that_needs_phi_says_what_it_multiplies():
    learned = {method.name: method.learned for method in registry.METHODS if "phi" in method.needs}
    assert learned == {"tara_a": "direction", "tara_b": "shared", "adamerging": "adapter", "nsc": "adapter"}
    for method in registry.METHODS:
        assert bool(method.learned) is ("phi" in method.needs)
        assert registry.describe(method)["learned"] == method.learned


def test_two_methods_of_one_name_are_an_error():
    method = registry.get("ties")
    alias = dataclasses.replace(registry.get("svd"), name="other", aliases=("ties",))
    with pytest.raises(ValueError, match="two merge methods are called 'ties'"):
        registry.by_name([method, alias])


def test_an_alias_finds_its_method():
    method = dataclasses.replace(registry.get("ties"), aliases=("ties_merging",))
    assert registry.by_name([method])["ties_merging"] is method


def test_an_unknown_method_is_refused_with_its_neighbours():
    with pytest.raises(
        MethodError, match=r"unknown merge method 'tees'; did you mean 'ties'.* Known: adamerging, "
    ):
        registry.get("tees")
    with pytest.raises(MethodError, match=r"unknown merge method 'zzzz'\. Known: adamerging"):
        registry.get("zzzz")


@pytest.mark.parametrize(
    ("name", "space", "gives"),
    [
        ("ties", None, False),
        ("ties", "core", True),
        ("ties", "knots", True),
        ("cat", None, True),
        ("knots_ties", None, True),
    ],
)
def test_results_have_factors_where_the_declaration_says_so(name, space, gives):
    assert registry.gives_factors(registry.get(name), space) is gives


DENSE = {
    "task_arithmetic": {(): True},
    "linear": {(): True, ("compat", "peft"): False},
    "cat": {(): False},
    "svd": {(): False},
    "ties": {(): True, ("space", "core"): False, ("space", "knots"): False},
    "dare_linear": {(): True, ("space", "core"): False},
    "dare_ties": {(): True, ("space", "knots"): False},
    "knots_ties": {(): False},
    "knots_dare_ties": {(): False},
    "tsv_m": {(): False, ("space", "core"): False},
    "iso_c": {(): False},
    "iso_cts": {(): False},
    "cart": {(): False},
    "lora_lego": {(): False},
    "robustmerge": {(): False, ("compat", "authors"): False},
    "free": {(): False},
    "wudi": {(): False},
    "magnitude_prune": {(): True, ("space", "core"): False},
    "breadcrumbs": {(): True, ("space", "knots"): False},
    "breadcrumbs_ties": {(): True, ("space", "core"): False},
    "della": {(): True, ("space", "core"): False},
    "della_linear": {(): True, ("space", "knots"): False},
    "consensus": {(): True, ("space", "core"): False},
    "consensus_ties": {(): True, ("space", "knots"): False},
    "pcb": {(): True, ("space", "core"): False},
    "emr": {(): True, ("space", "core"): False},
    "regmean": {(): True},
    "fisher": {(): True},
    "tara_a": {(): False},
    "tara_b": {(): False},
    "adamerging": {(): False},
    "nsc": {(): False},
}


def test_every_method_says_whether_it_can_take_a_delta_without_factors():
    assert DENSE.keys() == {method.name for method in registry.METHODS}
    for name, cases in DENSE.items():
        for given, takes in cases.items():
            parameters = dict([given]) if given else {}
            assert registry.takes_dense(registry.get(name), parameters) is takes, (name, given)
