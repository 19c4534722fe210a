"""A small server that speaks OpenAI's completions on 127.0.0.1, and misbehaves as it is told."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, bytes] | tuple[int, bytes, dict[str, str]]
MODEL = "tiny"


def completion(content: str, finish_reason: str = "stop", **message: Any) -> Reply:
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}
    return 200, json.dumps({"choices": [choice]}).encode()


def echo(body: dict[str, Any]) -> Reply:
    """An answer that depends on everything of the request, and on nothing else."""
    key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12]
    return completion(f"{key} \u00e9 {body['messages'][-1]['content']}")


class Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024  # hundreds may connect at once


class FakeServer:
    """`respond(body)` gives the reply to a chat request; `requests` holds the bodies, `models` what it lists."""

    def __init__(self, respond: Callable[[dict[str, Any]], Reply]) -> None:
        self.respond = respond
        self.models: list[dict[str, Any]] = [{"id": MODEL}, {"id": "other"}]
        self.requests: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                models = json.dumps({"data": outer.models}).encode()
                self.reply((200, models) if self.path == "/v1/models" else (404, b"{}"))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                self.reply(outer.respond(body) if self.path.endswith("/completions") else (404, b"{}"))

            def reply(self, reply: Reply) -> None:
                status, content, *headers = reply
                with suppress(BrokenPipeError, ConnectionResetError):  # the client was killed
                    self.send_response(status)
                    for name, value in {"Content-Length": str(len(content)), **(headers[0] if headers else {})}.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = Http(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


@contextmanager
def serving(respond: Callable[[dict[str, Any]], Reply] = echo) -> Iterator[FakeServer]:
    server = FakeServer(respond)
    thread = threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
