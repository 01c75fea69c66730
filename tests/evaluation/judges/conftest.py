"""A judge on this machine that can be told to misbehave."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

KEY = "sk-a-secret"


class Server(ThreadingHTTPServer):
    """Answers with ``reply(body)``; before that it goes through ``faults``, one per request."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.faults, self.bodies, self.keys, self.paths = (lambda body: "1.0"), [], [], [], []
        self.busy = self.most = 0
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # clients that hang up are part of the tests


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            server.paths.append(self.path)
            fault = server.faults.pop(0) if server.faults else None
            server.busy += 1
            server.most = max(server.most, server.busy)
        try:
            self.answer(fault, body)
        finally:
            with server.lock:
                server.busy -= 1

    def do_GET(self):
        self.send(404, b"")

    def answer(self, fault, body):
        if fault == "drop":
            self.connection.close()
        elif fault == "cut":
            self.send(200, b'{"choices', length=1000)
        elif fault == "hang":
            time.sleep(0.6)
        elif fault == "trickle":
            self.send(200, b"", length=1000)
            for _ in range(20):
                time.sleep(0.05)
                self.wfile.write(b" ")
        elif isinstance(fault, bytes):
            self.send(200, fault)
        elif fault:
            code, headers, text = fault
            self.send(code, text.encode(), headers)
        else:
            choice = {"message": {"role": "assistant", "content": self.server.reply(body)}}
            self.send(200, json.dumps({"model": "judge-2026", "choices": [choice]}).encode())

    def send(self, code, content, headers=(), length=None):
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with Server() as running:
        threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield running
        running.shutdown()
