"""Task singular vectors, orthogonalised across adapters: tsv_m.

Formula: TSV-Merge (arXiv 2412.00081). With weight_i * delta_i = U_i S_i V_i^T cut to k_i triplets, and
U = [U_1 .. U_T], V = [V_1 .. V_T] replaced by their polar factors: lambda * polar(U) diag(S_1 .. S_T) polar(V)^T.

The published k_i is min(O, I) / T, meant for deltas of full rank. A LoRA delta of rank r below that has only r
triplets; the rest of what an SVD returns is an arbitrary basis of its null space, with S = 0 but a full part in
the orthogonalisation, which bends the true directions. So k_i is the adapter's own rank unless `rank` is less.
"""

from __future__ import annotations

from ray_merge.algebra.delta import LowRankDelta
from ray_merge.algebra.site import SiteFactors
from ray_merge.algebra.spectrum import beside, directions, lift_product, polar, precision_of, weighted_pairs
from ray_merge.methods.catalogue.tsv import TsvM
from ray_merge.methods.context import Context


def tsv_m(site: SiteFactors, p: TsvM, context: Context) -> LowRankDelta:
    """Sum the adapters' singular triplets after the vectors of all adapters were made orthogonal.

    An adapter without a delta here (rank 0, B = 0, weight 0) has no triplets and no part in the polar factors.
    """
    precision = precision_of(site)
    found = [directions(pair, precision, most=p.rank) for pair in weighted_pairs(site, p.weight)]
    U_PK, s_K, V_QK = beside(found)
    left_PK = polar(U_PK, precision) * s_K
    return lift_product(site.core, left_PK, polar(V_QK, precision).T, site.dtype)
