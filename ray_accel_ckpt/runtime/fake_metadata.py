"""A metadata service for tests: speaks HTTP as strictly as AWS, GCP and Azure do.

with FakeMetadata("aws") as cloud:
    ...  # ray-accel-ckpt watch-node --cloud aws --metadata-url cloud.url
    cloud.preempt(time.time() + 120)
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from email.utils import formatdate
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

Cloud = Literal["aws", "gcp", "azure", "none"]


class Fault(Enum):
    """How the service misbehaves."""

    SLOW = "no answer for a minute"
    DRIBBLING = "a body of a minute, byte by byte"
    GARBAGE = "200, and no document"
    BREAKING = "the connection is closed without an answer"


@dataclass(frozen=True, kw_only=True)
class Answer:
    status: int
    body: str = ""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One that came, and the status it was given (0: none)."""

    method: str
    path: str
    status: int


class FakeMetadata:
    """One cloud's service for one machine. A context manager: it serves until the end of the block.

    Args:
        cloud: whose dialect it speaks; the others' paths are not found.
        name: of this machine, to Azure.
    """

    def __init__(self, cloud: Cloud, *, name: str = "this-vm") -> None:
        self.cloud = cloud
        self.name = name
        self.requests: list[Request] = []
        self._fault: Fault | int | None = None
        self._tokens: dict[str, float] = {}
        self._documents: dict[str, str | int] = {}
        self._events: dict[str, dict[str, Any]] = {}
        self._incarnation = 0
        self._ended = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # What is announced.

    def preempt(self, deadline: float) -> None:
        """The machine is taken at `deadline` (epoch seconds; GCP does not say when)."""
        match self.cloud:
            case "aws":
                self.set_instance_action("terminate", deadline)
            case "gcp":
                self.set_document("instance/preempted", "TRUE")
            case "azure":
                self.schedule("Preempt", deadline)
            case "none":
                raise ValueError("there is no cloud that could preempt")

    def set_instance_action(self, action: str, deadline: float | None) -> None:
        """AWS: `terminate`, `stop` or `hibernate`, at `deadline` or without a time."""
        document = {"action": action}
        if deadline is not None:
            document["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(deadline))
        self._documents["spot/instance-action"] = json.dumps(document)

    def recommend_rebalance(self) -> None:
        """AWS: a recommendation, made now."""
        made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._documents["events/recommendations/rebalance"] = json.dumps({"noticeTime": made})

    def set_document(self, path: str, document: str | int) -> None:
        """Any document of AWS below `meta-data/`, or of GCP below `v1/`; or an error's status."""
        self._documents[path] = document

    def schedule(
        self,
        event_type: str,
        not_before: float | None,
        *,
        resources: tuple[str, ...] | None = None,
        event_id: str = "event-1",
    ) -> None:
        """Azure: an event for `resources` (this machine); `not_before` None: it has started."""
        self._incarnation += 1
        self._events[event_id] = {
            "EventId": event_id,
            "EventType": event_type,
            "ResourceType": "VirtualMachine",
            "Resources": list(resources if resources is not None else (self.name,)),
            "EventStatus": "Started" if not_before is None else "Scheduled",
            "NotBefore": "" if not_before is None else formatdate(not_before, usegmt=True),
            "Description": "",
            "EventSource": "Platform",
            "DurationInSeconds": -1,
        }

    def cancel(self) -> None:
        """Nothing is announced any more."""
        self._incarnation += 1
        self._documents.clear()
        self._events.clear()

    # How it works, or does not.

    def break_with(self, fault: Fault | int) -> None:
        """Misbehave in this way, or answer everything with this status, until `mend`."""
        self._fault = fault

    def mend(self) -> None:
        self._fault = None

    def expire_tokens(self) -> None:
        """AWS: every token that was given out is over."""
        self._tokens.clear()

    def count(self, path: str, status: int) -> int:
        """How many requests whose path has `path` in it were answered with `status`."""
        return sum(path in each.path and each.status == status for each in list(self.requests))

    # How it answers.

    def respond(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request, and keep it in `requests`."""
        fault = self._fault
        method, path = handler.command, handler.path
        if fault is Fault.SLOW or fault is Fault.BREAKING:
            self.requests.append(Request(method=method, path=path, status=0))
            if fault is Fault.SLOW:
                self._ended.wait(60)
            handler.close_connection = True
            return
        if isinstance(fault, int):
            answer = Answer(status=fault)
        elif fault is not None:
            answer = Answer(status=200, body='<html>"{' * 75)
        else:
            answer = self._answer(method, path, handler)
        self.requests.append(Request(method=method, path=path, status=answer.status))
        self._send(handler, answer, pause=0.1 if fault is Fault.DRIBBLING else 0.0)

    def _send(self, handler: BaseHTTPRequestHandler, answer: Answer, *, pause: float) -> None:
        body = answer.body.encode()
        handler.send_response(answer.status)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        if not pause:
            handler.wfile.write(body)
            return
        for byte in body:
            handler.wfile.write(bytes([byte]))
            if self._ended.wait(pause):
                return

    def _answer(self, method: str, path: str, handler: BaseHTTPRequestHandler) -> Answer:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        match self.cloud:
            case "aws":
                return self._aws(method, path, headers)
            case "gcp":
                return self._gcp(method, path, headers)
            case "azure":
                return self._azure(method, path, headers)
            case "none":
                return Answer(status=404)

    def _aws(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        """Only version 2: without a token, or with one that is over, 401."""
        if path == "/latest/api/token":
            seconds = headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
            if method != "PUT":
                return Answer(status=405)
            if not seconds.isdigit() or not 1 <= int(seconds) <= 21600:
                return Answer(status=400)
            token = f"token-{len(self.requests)}=="
            self._tokens[token] = time.monotonic() + int(seconds)
            return Answer(status=200, body=token)
        token_end = self._tokens.get(headers.get("x-aws-ec2-metadata-token", ""), 0.0)
        if token_end <= time.monotonic():
            return Answer(status=401)
        return self._document(path.removeprefix("/latest/meta-data/"))

    def _gcp(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        """Without Google's header, 403; with it, it is answered too."""
        if headers.get("metadata-flavor") != "Google":
            return Answer(status=403)
        always = {
            "instance/id": "1234567890",
            "instance/preempted": "FALSE",
            "instance/maintenance-event": "NONE",
        }
        name = path.removeprefix("/computeMetadata/v1/")
        found = self._document(name, always.get(name))
        return Answer(status=found.status, body=found.body, headers={"Metadata-Flavor": "Google"})

    def _azure(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        """Without the header or a version, 400."""
        url = urlsplit(path)
        query = parse_qs(url.query)
        if headers.get("metadata", "").lower() != "true" or "api-version" not in query:
            return Answer(status=400)
        if url.path == "/metadata/instance/compute/name":
            plain = query.get("format") == ["text"]
            return Answer(status=200 if plain else 400, body=self.name if plain else "")
        if url.path != "/metadata/scheduledevents":
            return Answer(status=404)
        if method != "GET":
            return Answer(status=405)
        events = list(self._events.values())
        document = {"DocumentIncarnation": self._incarnation, "Events": events}
        return Answer(status=200, body=json.dumps(document))

    def _document(self, name: str, default: str | None = None) -> Answer:
        found = self._documents.get(name, default)
        if isinstance(found, str):
            return Answer(status=200, body=found)
        return Answer(status=404 if found is None else found)


def _handler_of(service: FakeMetadata) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            service.respond(self)

        def do_PUT(self) -> None:
            service.respond(self)

        def log_message(self, *args: Any) -> None:
            """`FakeMetadata.requests` is the log."""

    return Handler
