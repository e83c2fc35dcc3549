"""A small HTTP server that answers like an OpenAI endpoint, or as badly as a test wants."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, Any, dict[str, str]]  # status, JSON or raw bytes, headers


def good(body: dict[str, Any], **more: Any) -> Reply:
    """One choice for each sample; the text tells prompt and seed."""
    prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
    choices = []
    for i in range(body.get("n", 1)):
        text = f"{prompt} / {body['seed'] + i if 'seed' in body else 'unseeded'}."
        said = {"message": {"content": text}} if "messages" in body else {"text": text}
        choices.append({"index": i, "finish_reason": "stop", **said})
    usage = {"prompt_tokens": 7, "completion_tokens": 5 * len(choices)}
    return 200, {"model": "m-1", "choices": choices, "usage": usage} | more, {}


class Endpoint:
    """Runs until closed; `bodies` are all requests, `most` the largest number at a time."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply | None] | None = None):
        self.answer = answer or (lambda body, _: good(body))
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.most = self._now = 0
        self._lock = threading.Lock()
        self.closing = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                return

            def do_GET(self) -> None:  # noqa: N802 - the name that http.server wants
                self.send(200, {"version": "0", "data": [{"max_model_len": 100}]}, {})

            def do_POST(self) -> None:  # noqa: N802 - the name that http.server wants
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.paths.append(self.path)
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                try:
                    reply = outer.answer(body, number)
                finally:
                    with outer._lock:
                        outer._now -= 1
                if reply is None:  # hang up
                    self.close_connection = True
                    return
                self.send(*reply)

            def send(self, status: int, said: Any, headers: dict[str, str]) -> None:
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: Any) -> None:
                return

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
