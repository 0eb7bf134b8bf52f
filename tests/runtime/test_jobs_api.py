import socket

import pytest

from ray_merge.contact import NoContact
from ray_merge.runtime import jobs_api


def test_a_call_to_a_head_that_takes_requests_and_never_answers_lasts_no_longer_than_the_patience(
    monkeypatch,
):
    monkeypatch.setattr(jobs_api, "SILENT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        jobs = jobs_api.JobsApi(f"http://127.0.0.1:{silent.getsockname()[1]}", contact_seconds=1.0)
        with pytest.raises(NoContact, match="no answer within 1 s"):
            jobs.state("night")
