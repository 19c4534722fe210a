"""A small server that speaks OpenAI's completions on 127.0.0.1, and misbehaves as it is told."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, bytes]
MODEL = "tiny"


def completion(content: str, finish_reason: str = "stop", **message: Any) -> Reply:
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}
    return 200, json.dumps({"choices": [choice]}).encode()


def echo(body: dict[str, Any]) -> Reply:
    """An answer that depends on everything of the request, and on nothing else."""
    key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12]
    return completion(f"{key} \u00e9 {body['messages'][-1]['content']}")


class Handler(BaseHTTPRequestHandler):
    server: "FakeServer"

    def do_GET(self) -> None:
        models = json.dumps({"data": self.server.models}).encode()
        self.reply((200, models) if self.path == "/v1/models" else (404, b"{}"))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.reply(self.server.respond(body) if self.path.endswith("/completions") else (404, b"{}"))

    def reply(self, reply: Reply) -> None:
        status, content = reply
        with suppress(BrokenPipeError, ConnectionResetError):  # the client was killed
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


class FakeServer(ThreadingHTTPServer):
    """`respond(body)` gives the reply to a chat request; `requests` holds the bodies, `models` what it lists."""

    daemon_threads = True
    request_queue_size = 1024  # hundreds may connect at once

    def __init__(self, respond: Callable[[dict[str, Any]], Reply]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.respond = respond
        self.models: list[dict[str, Any]] = [{"id": MODEL}, {"id": "other"}]
        self.requests: list[dict[str, Any]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"


@contextmanager
def serving(respond: Callable[[dict[str, Any]], Reply] = echo) -> Iterator[FakeServer]:
    with FakeServer(respond) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()
