"""What adapters hold, whether they can be merged, and how near they are to each other."""

from ray_merge.inspect.adapters import inspect
from ray_merge.inspect.measure import PairNumbers, SiteNumbers
from ray_merge.inspect.report import InspectedAdapter, InspectedPair, Inspection

__all__ = ["InspectedAdapter", "InspectedPair", "Inspection", "PairNumbers", "SiteNumbers", "inspect"]
