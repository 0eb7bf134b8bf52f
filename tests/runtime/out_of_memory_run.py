"""A driver whose one worker takes more memory than the node is said to have; prints the error.

Usage: python out_of_memory_run.py  (RAY_memory_usage_threshold says when Ray's monitor kills)
"""

from pool_workers import Hog, StepWorker
from ray_merge.errors import UnitFailed
from ray_merge.pool import Task
from ray_merge.runtime.ray_pool import RayPool
from ray_merge.runtime.session import open_session


def main() -> None:
    with (
        open_session("local", num_cpus=1) as session,
        RayPool(StepWorker, session=session, workers=1, memory_bytes=123_456_789, attempts=2) as pool,
    ):
        try:
            list(pool.run([Task("hog", Hog(6 << 30))]))
        except UnitFailed as error:
            print(error)


if __name__ == "__main__":
    main()
