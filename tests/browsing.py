"""A page as a person sees it: headless Chromium, asked over its DevTools protocol."""

import base64
import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager
from itertools import count

import pytest
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--hide-scrollbars"]


@contextmanager
def browsing(folder, width=1400, height=1000):
    """look(url, *words, picture=path) -> the text of a page that says all these words, drawn into a file."""
    if not CHROMIUM:
        pytest.skip("there is no chromium on this machine")
    options = [f"--user-data-dir={folder}", "--remote-debugging-port=0", f"--window-size={width},{height}"]
    with open(folder.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen([CHROMIUM, *QUIET, *options, "about:blank"], stderr=log)
    try:
        with connect(_page(folder), max_size=2**26) as page:
            yield _Looker(page).look
    finally:
        process.terminate()
        process.wait(20)


def _page(folder):
    """Where the protocol of the one page is spoken."""
    patience = time.monotonic() + 60
    while True:
        try:
            port = (folder / "DevToolsActivePort").read_text().split()[0]
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list", timeout=10) as answer:
                return next(each["webSocketDebuggerUrl"] for each in json.load(answer) if each["type"] == "page")
        except (OSError, IndexError, StopIteration):
            assert time.monotonic() < patience, "chromium did not start"
            time.sleep(0.1)


class _Looker:
    def __init__(self, page):
        self._page, self._numbers = page, count(1)

    def look(self, url, *words, picture=None, patience=60.0):
        self._ask("Page.navigate", url="about:blank")  # from one place in a page to another nothing would be loaded
        self._ask("Page.navigate", url=url)
        end, text = time.monotonic() + patience, ""
        while missing := [word for word in words if word not in text]:
            assert time.monotonic() < end, f"{url} does not say {missing}: {text}"
            time.sleep(0.2)
            found = self._ask("Runtime.evaluate", expression="document.body ? document.body.innerText : ''")
            text = found["result"].get("value", "").replace("\N{NO-BREAK SPACE}", " ")
        if picture:
            time.sleep(1.0)  # what fades in
            picture.write_bytes(base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"]))
        return text

    def _ask(self, method, **parameters):
        number = next(self._numbers)
        self._page.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._page.recv(timeout=60))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
