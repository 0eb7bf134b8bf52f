"""Ray job entry point: `ray job submit --working-dir . -- python jobs/evaluate.py RECIPE`.

Joins the cluster of the job and does what `ray-merge evaluate` does. Exit code: 0 complete, 2 refused before
anything was scored, 1 failed later or a merge missing; the last line on stderr says why.
"""

from __future__ import annotations

import sys

from ray_merge.cli import main

if __name__ == "__main__":
    main(["evaluate", "--address", "auto", *sys.argv[1:]])
