"""A real Chromium and a real server on a temporary home; every page fails its test on a script error or a foreign request."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlparse

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = next((p for p in ("/usr/bin/chromium", shutil.which("chromium"), shutil.which("chromium-browser"), shutil.which("google-chrome"))
                 if p and Path(p).exists()), None)
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
LOCAL = {"127.0.0.1", "localhost", ""}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """One server process; ``stop`` and ``start`` again keep the port."""

    def __init__(self, home: Path, dispatch: bool = False, port: int | None = None):
        self.home, self.dispatch, self.port, self.process = home, dispatch, port or free_port(), None
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self, wait: float = 180.0) -> Server:
        environment = {**os.environ, "WORKBENCH_HOME": str(self.home), "HOST": "127.0.0.1", "HF_HUB_OFFLINE": "1"}
        self.output = open(self.home / "server.log", "a")
        self.process = subprocess.Popen([sys.executable, str(ROOT / "tests/browser/serve.py"), str(self.port), *(["dispatch"] if self.dispatch else [])],
                                        cwd=ROOT, env=environment, stdout=self.output, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + wait
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(self.url, timeout=2).read(100)
                return self
            except OSError:
                if self.process.poll() is not None:
                    break
                time.sleep(0.1)
        raise AssertionError("the server did not come up:\n" + (self.home / "server.log").read_text()[-3000:])

    def stop(self) -> None:
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        self.output.close()


@pytest.fixture(scope="session")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def browse(chromium):
    """``browse(url, width=1440, height=900, dark=False, context=None)`` opens a page; problems fail the test at its end."""
    contexts, problems, foreign = [], [], []

    def watch(page):
        page.on("pageerror", lambda e: problems.append(str(e)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" and "ERR_CONNECTION" not in m.text
                and "Failed to load resource" not in m.text else None)
        page.on("request", lambda r: foreign.append(r.url) if r.url.startswith(("http", "ws")) and urlparse(r.url).hostname not in LOCAL else None)
        return page

    def open_page(url, width=1440, height=900, dark=False, context=None):
        if context is None:
            context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
            contexts.append(context)
        page = watch(context.new_page())
        page.set_default_timeout(90_000)  # a laptop under load is slow, not broken
        page.goto(url)
        return page

    open_page.problems = problems
    yield open_page
    for context in contexts:
        context.close()
    assert not foreign, f"requests left the machine: {foreign[:5]}"
    assert not problems, f"errors in the page: {problems[:5]}"


@pytest.fixture(scope="module")
def still(tmp_path_factory):
    """A server without dispatcher on an empty home; the test plays the worker through ``still.open_home()``."""
    server = Server(tmp_path_factory.mktemp("home")).start()

    def open_home():
        from workbench.home import Home
        return Home.open(server.home)

    server.open_home = open_home
    yield server
    server.stop()
