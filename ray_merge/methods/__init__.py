"""Merge methods: declarations (torch-free, exported here) and kernels (imported by `kernels.py` only)."""

from ray_merge.methods.declare import Method, Parameter
from ray_merge.methods.registry import METHODS, describe, get
from ray_merge.methods.resolve import at_site, resolve_parameters

__all__ = ["METHODS", "Method", "Parameter", "at_site", "describe", "get", "resolve_parameters"]
