from __future__ import annotations

import pytest

from ray_merge.errors import RayMergeError, StoreDenied, StoreError
from ray_merge.storage.retry import Backoff, clean, describe, final_error, http_status, is_transient, retrying

QUICK = Backoff(attempts=3, first_seconds=0.0, limit_seconds=0.0)


class ClientError(Exception):
    """The shape of botocore's."""

    def __init__(self, status: int, code: str, text: str = "said so"):
        super().__init__(text)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def run(call):
    def give_up(error: Exception, tries: int) -> Exception:
        return final_error(error, "s3://b/k", "reading", tries)

    return retrying(call, retriable=is_transient, give_up=give_up, backoff=QUICK)


def test_a_transient_error_is_tried_again_until_it_works():
    answers = [ConnectionError("reset"), ClientError(503, "SlowDown"), "bytes"]

    def call():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert run(call) == "bytes"


def test_attempts_are_bounded_and_counted_in_the_message():
    calls = []

    def call():
        calls.append(1)
        raise TimeoutError("no answer")

    with pytest.raises(StoreError, match="reading s3://b/k failed after 3 tries: no answer"):
        run(call)
    assert len(calls) == 3


def test_an_error_that_will_not_pass_is_not_tried_again():
    calls = []

    def call():
        calls.append(1)
        raise ClientError(403, "AccessDenied")

    with pytest.raises(StoreDenied):
        run(call)
    assert len(calls) == 1


def test_the_cause_is_not_shown_because_its_text_may_hold_credentials():
    def call():
        raise TimeoutError("https://user:secret@host/x?X-Amz-Signature=secret timed out")

    with pytest.raises(StoreError) as caught:
        run(call)
    assert "secret" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert caught.value.__cause__ is None


def test_the_interpreter_is_not_kept_from_stopping():
    def call():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(call)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ClientError(404, "NoSuchBucket"), StoreDenied),
        (caused_by(FileNotFoundError("x"), ClientError(404, "NoSuchKey")), StoreError),
        (ClientError(301, "PermanentRedirect"), StoreDenied),
        (ClientError(400, "AuthorizationHeaderMalformed"), StoreDenied),
        (PermissionError("Forbidden"), StoreDenied),
        (ClientError(500, "InternalError"), StoreError),
        (ClientError(416, "InvalidRange"), StoreError),
        (StoreError("u", "reading", 1, "as it is"), StoreError),
        (RuntimeError("anything"), StoreError),
    ],
)
def test_what_an_error_means_follows_from_the_stores_answer(error, kind):
    assert type(final_error(error, "s3://b/k", "reading", 2)) is kind
    assert isinstance(final_error(error, "s3://b/k", "reading", 2), RayMergeError)


def test_the_status_is_found_in_causes_and_in_other_libraries_errors():
    class WithResponse(Exception):
        response = type("Response", (), {"status_code": 429})()

    class WithCode(Exception):
        code = "503"

    assert http_status(caused_by(OSError(22, "x"), ClientError(412, "PreconditionFailed"))) == 412
    assert http_status(WithResponse()) == 429
    assert http_status(WithCode()) == 503
    assert http_status(OSError(5, "x")) is None


def test_errors_of_http_libraries_are_known_by_name_without_importing_them():
    kind = type("ClientPayloadError", (Exception,), {"__module__": "aiohttp.client_exceptions"})
    assert is_transient(kind("broken off"))
    assert is_transient(type("Own", (kind,), {"__module__": "elsewhere"})("broken off"))
    assert not is_transient(type("ClientPayloadError", (Exception,), {"__module__": "mine"})("broken off"))


def test_a_status_inside_a_broken_connections_error_is_not_the_stores_answer():
    payload = type("ClientPayloadError", (Exception,), {"__module__": "aiohttp.client_exceptions"})(
        "half of it"
    )
    error = caused_by(payload, type("ContentLengthError", (Exception,), {"code": 400})())
    assert http_status(error) is None
    assert is_transient(error)


def test_waits_double_up_to_the_limit_and_jitter_takes_at_most_a_half():
    backoff = Backoff(attempts=9, first_seconds=1.0, limit_seconds=4.0)
    assert [backoff.wait_seconds(failed, 0.0) for failed in (1, 2, 3, 4, 5)] == [1.0, 2.0, 4.0, 4.0, 4.0]
    assert backoff.wait_seconds(3, 0.5) == 3.0


def test_text_keeps_its_url_but_no_secret_of_it():
    text = 'Could not connect to "http://me:pw@host:9000/b/k?X-Amz-Credential=pw&a=pw"\n again'
    assert clean(text) == 'Could not connect to "http://host:9000/b/k" again'
    assert describe(ClientError(403, "AccessDenied", "no")) == "no (403 AccessDenied)"
    assert describe(ValueError()) == "ValueError"
