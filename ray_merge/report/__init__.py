"""One HTML file about an output: what was merged, what it did to every layer, how it scores, where the time went."""

from ray_merge.report.command import Reported, report

__all__ = ["Reported", "report"]
