"""All recipes of a folder, one night: what is complete is skipped, the rest is run, one summary says what happened."""

from ray_merge.nightly.night import Night, run_night
from ray_merge.nightly.summary import Summary

__all__ = ["Night", "Summary", "run_night"]
