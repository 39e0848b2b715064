"""The page in headless Chromium: light, dark and narrow, without a single request or complaint."""

import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from matplotlib.image import imread

from evaluation.page import as_html
from tests.browsing import CHROMIUM, QUIET
from tests.evaluation.sample_reports import sample

pytestmark = pytest.mark.integration

LOUD = [*QUIET, "--enable-logging=stderr", "--v=0"]
SCHEMES = {"dark": 0, "light": 1}  # of Blink's setting preferredColorScheme
OURS = "report.example"
EVIL = "<img src=http://evil.example/x.png><script src=http://evil.example/x.js></script>"
# Tells in its own text how wide the framed page is and what its background is.
RULER = """<body style="margin:0"><iframe src="/report.html" style="width:{width}px;height:900px;border:0"
onload="const page = this.contentDocument.documentElement;
document.title = page.scrollWidth + ' ' + page.clientWidth + ' ' + page.querySelectorAll('svg').length"></iframe>"""


@contextmanager
def served(pages):
    """A server that stands in for every host: (its port, what was asked of it as host and path)."""
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            host, path = self.headers.get("Host", "").partition(":")[0], urlsplit(self.path).path
            asked.append((host, path))
            content = pages.get(path, "").encode() if host == OURS else b""
            self.send_response(200 if content else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, asked
        server.shutdown()
        thread.join()


@pytest.fixture
def browse(tmp_path):
    """browse(pages, path, *options) -> (stdout, what the page's console said, what was asked of the network)."""
    if not CHROMIUM:
        pytest.skip("there is no chromium on this machine")

    def browse(pages, path, *options):
        with served(pages) as (port, asked):
            place = [f"--user-data-dir={tmp_path / 'profile'}", f"--host-resolver-rules=MAP * 127.0.0.1:{port}"]
            command = [CHROMIUM, *LOUD, *place, *options, f"http://{OURS}{path}"]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        said = [line for line in ended.stderr.splitlines() if "CONSOLE" in line]
        return ended.stdout, said, [each for each in asked if each[0] in (OURS, "evil.example")]

    return browse


@pytest.fixture
def picture(browse, tmp_path):
    def picture(page, scheme, width=1000):
        path = tmp_path / f"{scheme}-{width}.png"
        options = (f"--window-size={width},3000", f"--screenshot={path}")
        found = browse(
            {"/report.html": page}, "/report.html", *options, f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"
        )
        return imread(path)[..., :3], *found[1:]

    return picture


def hostile():
    return as_html(sample(f"city {EVIL}", "fr-legal", EVIL, EVIL), EVIL)


def test_this_way_of_looking_sees_requests_and_complaints(browse):
    bare = f"<!doctype html>{EVIL}<script>console.error('seen')</script>"
    _, said, asked = browse({"/report.html": bare}, "/report.html", "--dump-dom")
    assert {("evil.example", "/x.png"), ("evil.example", "/x.js")} <= set(asked)
    assert any("seen" in line for line in said)


@pytest.mark.parametrize("width", [390, 1000])
@pytest.mark.parametrize(("scheme", "ground"), [("light", (255, 255, 255)), ("dark", (0x16, 0x17, 0x1A))])
def test_the_page_is_drawn_in_the_readers_colours_and_asks_nothing(picture, scheme, ground, width):
    image, said, asked = picture(hostile(), scheme, width)
    assert (said, asked) == ([], [(OURS, "/report.html")])
    assert image.shape[1] == width
    away = abs(255 * image - ground).max(axis=-1)
    assert 0.4 < (away < 2).mean() < 0.97  # mostly ground, yet not blank
    text = (255 * image).mean(axis=-1)
    assert ((text > 200) if scheme == "dark" else (text < 60)).mean() > 0.003  # letters stand out from it
    good = (0x62, 0xB5, 0xE8) if scheme == "dark" else (0x00, 0x67, 0xA3)
    assert (abs(255 * image - good).max(axis=-1) < 3).sum() > 50  # the pictures take the page's colours


@pytest.mark.parametrize("width", [360, 390, 1000])
def test_nothing_sticks_out_of_a_narrow_screen(browse, width):
    pages = {"/report.html": hostile(), "/ruler.html": RULER.format(width=width)}
    text, _, _ = browse(pages, "/ruler.html", "--dump-dom", "--window-size=1200,900")
    title = text.partition("<title>")[2].partition("</title>")[0].split()
    assert title == [str(width), str(width), "6"]
