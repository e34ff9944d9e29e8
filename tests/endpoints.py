"""A failing server in a process of its own, as tests use it."""

from __future__ import annotations

import contextlib
import json
import pathlib
import subprocess
import sys
import urllib.request

import pytest
from endpoint_server import KEY

from karploop.endpoints import client as client_module
from karploop.endpoints.calls import Endpoint


class Running:
    """A server in a process of its own."""

    def __init__(self, **settings):
        script = pathlib.Path(__file__).with_name("endpoint_server.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(settings)], stdout=subprocess.PIPE
        )
        port = int(self.process.stdout.readline())
        self.address = f"http://127.0.0.1:{port}"
        self.endpoint = Endpoint("small", f"{self.address}/v1", timeout=5.0)

    def stats(self) -> dict:
        with urllib.request.urlopen(f"{self.address}/stats") as response:
            return json.load(response)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(client_module, "_FIRST_WAIT", 0.02)
    monkeypatch.setattr(client_module, "_LONGEST_WAIT", 0.2)
    with contextlib.ExitStack() as running:

        def start(**settings) -> Running:
            server = Running(**settings)
            running.callback(server.stop)
            return server

        yield start
