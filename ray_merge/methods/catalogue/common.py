"""Words and ranges that the declarations of several families share."""

from __future__ import annotations

from ray_merge.methods.declare import Interval

SHARE = Interval(0.0, 1.0, open_low=True)
AT_LEAST_ONE = Interval(1.0)

WEIGHT = "factor of each adapter's update"
LAMBDA = "factor of the merged update"
SPACE = "where entries are compared: the deltas, Core Space, or the KnOTS basis"
KEPT = "share of entries kept, largest magnitudes first"
KEPT_AT_RANDOM = "share of entries kept, drawn at random; what is kept is divided by it"
SCOPE = "over what entries compete for the kept share: the whole model, or each weight for itself"
ENTRYWISE = "each weight for itself; the rule looks at single entries, so there is nothing else to choose"
COMPAT = "whose arithmetic, where publications and tools differ"
COUNTED = "how much each adapter's data count; 0 leaves the adapter out"
AVERAGED = ("refuse", "average")
WITHOUT_MOMENTS = (
    "what to do at weights that have no such statistics (embeddings, experts): refuse, or average deltas"
)
NORMALIZE_MERGEKIT = "compat mergekit only: divide by the weights of the adapters that agree"
