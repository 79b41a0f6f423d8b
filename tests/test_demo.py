"""The web demo serves the page of export.py; tests/test_export_page.py is about what it does."""

import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from conftest import TINY_RUN

import demo
import export
import train
from system.settings import UserError

DEMO = Path(demo.__file__)


def test_the_demo_serves_the_page_of_the_newest_run(workplace):
    assert train.main([*TINY_RUN, "--tag=mine"]) == 0
    assert export.main(["checkpoints/mine/best.pt", "page.html"]) == 0
    command = [sys.executable, DEMO, "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        lines = iter(process.stdout.readline, "")
        address = next(line.split()[1] for line in lines if line.startswith("open http://127."))
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert answer.read() == Path("page.html").read_bytes()
        process.terminate()


def test_a_port_in_use_is_an_error_before_the_export(workplace):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: .*in use; try another --port"):
            demo.main(["missing.pt", f"--port={port}"])
