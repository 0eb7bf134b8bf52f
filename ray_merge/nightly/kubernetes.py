"""The two requests to a Kubernetes API server that a night needs, with what every pod has: a token and a certificate.

Owns the service account's files, which are read anew for each request because the kubelet rotates the token, and which
answers mean "ask again". From a laptop: `kubectl proxy`, and its URL.
"""

from __future__ import annotations

import http.client
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_merge.contact import NoContact
from ray_merge.errors import Refusal

IN_POD = "https://kubernetes.default.svc"
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
REQUEST_SECONDS = 30.0
MAX_ANSWER_BYTES = 20_000_000

Answer = tuple[int, Mapping[str, Any]]
"""HTTP status and the JSON document; a text that is none is its `message`."""


@dataclass(frozen=True, slots=True)
class Kubernetes:
    """An API server.

    Args:
        url: of it; `IN_POD`, or that of `kubectl proxy`.
        account: folder with `token`, `ca.crt` and `namespace`; without a token there, none is sent.
    """

    url: str = IN_POD
    account: Path = SERVICE_ACCOUNT

    @property
    def namespace(self) -> str:
        """Of this pod.

        Raises:
            Refusal: this is no pod.
        """
        try:
            return (self.account / "namespace").read_text().strip()
        except OSError as error:
            raise Refusal(
                f"{self.account}/namespace cannot be read ({error.strerror}): this is no pod; give --namespace, and "
                "--kubernetes with the URL of `kubectl proxy`"
            ) from error

    def get(self, path: str) -> Answer:
        """An object."""
        return self._send(urllib.request.Request(self.url.rstrip("/") + path))

    def create(self, path: str, document: Mapping[str, Any]) -> Answer:
        """A new object."""
        request = urllib.request.Request(
            self.url.rstrip("/") + path, json.dumps(document).encode(), method="POST"
        )
        request.add_header("Content-Type", "application/json")
        return self._send(request)

    def _send(self, request: urllib.request.Request) -> Answer:
        """Status and document.

        Raises:
            NoContact: no answer, too many requests, or an error of the server's own.
        """
        request.add_header("Accept", "application/json")
        try:
            if (self.account / "token").is_file():
                request.add_header("Authorization", f"Bearer {(self.account / 'token').read_text().strip()}")
            with _opener(self.account).open(request, timeout=REQUEST_SECONDS) as answer:
                document = json.loads(answer.read(MAX_ANSWER_BYTES))
                return int(answer.status), document if isinstance(document, dict) else {}
        except urllib.error.HTTPError as error:
            with error:
                document = _document(error.read(MAX_ANSWER_BYTES))
            if error.code >= 500 or error.code in (408, 429):
                raise NoContact(f"{error.code}: {message(document)}") from error
            return error.code, document
        # Refused, reset, timed out; an answer that is cut, or is no HTTP.
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            raise NoContact(str(error) or type(error).__name__) from error


def _opener(account: Path) -> urllib.request.OpenerDirector:
    # No proxy: the API server lies inside the cluster, and its token must not pass through anything.
    handlers: list[Any] = [urllib.request.ProxyHandler({})]
    if (account / "ca.crt").is_file():
        context = ssl.create_default_context(cafile=str(account / "ca.crt"))
        handlers.append(urllib.request.HTTPSHandler(context=context))
    return urllib.request.build_opener(*handlers)


def _document(data: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return {"message": data[:300].decode("utf-8", "replace")}
    return found if isinstance(found, dict) else {}


def message(document: Mapping[str, Any]) -> str:
    """What the server says in an error."""
    return " ".join(str(document.get("message") or "no message").split())
