"""Every method on a GPU gives what it gives on the CPU, up to rounding. Skips where there is no GPU."""

import math

import pytest
import torch
from method_cases import random_factors, random_statistics, relative

from ray_merge.algebra.phi_shape import phi_shape
from ray_merge.algebra.site import SiteFactors
from ray_merge.methods.kernels import merge_site
from ray_merge.methods.registry import METHODS, at_site, get, resolve_parameters
from ray_merge.spec import Factor

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("torch finds no GPU", allow_module_level=True)

NAMES = ["a", "b", "c"]
CASES = [(method.name, space) for method in METHODS for space in method.spaces]


def on(device: str, factors: list[Factor]) -> SiteFactors:
    return SiteFactors([Factor(f.B.to(device), f.A.to(device), f.scale) for f in factors])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "space"), CASES)
def test_cuda_and_cpu_agree(name, space, dtype):
    method = get(name)
    given = {"rank": 8} if name == "svd" else {}
    given |= {"space": space} if "space" in method.declared() else {}
    given |= {"scope": "tensor"} if "scope" in method.declared() else {}
    parameters = at_site(method, resolve_parameters(method, given, NAMES), NAMES, "site")
    factors = random_factors((300, 200), (8, 4, 6), dtype=dtype)
    inputs = random_statistics(method.statistics, factors)
    if method.learned:
        shape = phi_shape(method.learned, (300, 200), (8, 4, 6))
        inputs = {"phi": torch.linspace(-1, 2, math.prod(shape), dtype=dtype).view(shape)}
    made = [
        merge_site(name, on(device, factors), parameters, names=NAMES, site="site", seed=0, inputs=inputs)
        for device in ("cpu", "cuda")
    ]
    assert made[1].dense().device.type == "cuda"
    # In float32 an entry at a threshold may fall on either side of it.
    assert relative(made[1].dense().cpu(), made[0].dense()) < (1e-8 if dtype == torch.float64 else 2e-2)
