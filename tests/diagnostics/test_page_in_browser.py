"""The page in a real browser: desktop and phone, light and dark, without a script, an error or a request."""

import json
import re
import shutil
import subprocess
from dataclasses import asdict
from html import escape, unescape
from html.parser import HTMLParser

import pytest
from matplotlib.image import imread
from pydantic import TypeAdapter

from mixora.diagnostics.record import RunRecord
from mixora.diagnostics.report import render
from tests.diagnostics.records import make_large_record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions")
SCHEMES = {"dark": 0, "light": 1}
PHONE, DESKTOP = (390, 844), (1280, 900)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs the browser Chromium on the path")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(make_large_record()), encoding="utf-8")
    return path


@pytest.fixture
def browse(tmp_path):
    def run(path, *flags):
        words = [CHROMIUM, *FLAGS, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", *flags, path.as_uri()]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)

    return run


@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_page_follows_the_colour_scheme(scheme, size, page, browse, tmp_path):
    picture = tmp_path / "page.png"
    flags = [f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}", "--window-size={},{}".format(*size)]
    browse(page, *flags, f"--screenshot={picture}")
    pixels = imread(picture)
    assert pixels.shape[:2] == size[::-1]
    # the ground is of one colour, and letters stand on it
    assert bool(pixels[0, 0, :3].mean() > 0.9) == (scheme == "light")
    assert pixels[..., :3].std() > 0.02


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_screen(width, page, browse, tmp_path):
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<!doctype html><iframe width="{width}" height="800" style="border: 0" '
        f'srcdoc="{escape(page.read_text(encoding="utf-8"))}"></iframe>'
        "<script>onload = () => {"
        "const inside = document.querySelector('iframe').contentDocument;"
        "inside.querySelectorAll('details').forEach(fold => fold.open = true);"
        "const root = inside.documentElement;"
        "document.title = [root.clientWidth, root.scrollWidth, inside.querySelectorAll('h2').length].join(' ');"
        "}</script>",
        encoding="utf-8",
    )
    seen = re.search("<title>(.*?)</title>", browse(frame, "--dump-dom").stdout)[1]
    assert seen == f"{width} {width} {page.read_text().count('<h2')}"


def test_the_browser_finds_no_fault_and_asks_nobody(page, browse, tmp_path):
    log = tmp_path / "net.json"
    flags = ("--enable-logging=stderr", f"--log-net-log={log}", "--dump-dom")
    said = browse(page, *flags).stderr
    assert "CONSOLE" not in said
    assert requests(log, "example.org") == []
    careless = tmp_path / "careless.html"
    careless.write_text('<img src="http://example.org/x.png"><script>console.error("a fault")</script>')
    said = browse(careless, *flags).stderr
    assert "CONSOLE" in said and requests(log, "example.org")


PAYLOAD = (
    "</title></style></code></dd><script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"
    "\" onmouseover=\"document.title='run' <svg onload=document.title='run'> javascript:document.title='run' "
)
NAMES = ("before", "after", "reloaded", "environment")


def poison(value):
    """The same with the payload in front of every text in it."""
    if isinstance(value, str):
        return PAYLOAD + value
    if isinstance(value, dict):
        return {key: poison(child) for key, child in value.items()}
    return [poison(child) for child in value] if isinstance(value, list | tuple) else value


class Reader(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self):
        super().__init__()
        self.elements, self.attributes, self.sources = set(), set(), set()

    def handle_starttag(self, tag, attrs):
        self.elements.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.sources |= {value.partition(",")[0] for name, value in attrs if name in ("src", "href")}


def read_elements(text):
    reader = Reader()
    reader.feed(text)
    return reader


def test_hostile_names_and_tokens_stay_text(page, browse, tmp_path):
    plain = asdict(make_large_record(layers=3))
    record = poison(plain)
    for part in NAMES:
        record[part] = {PAYLOAD + name: value for name, value in record[part].items()}
    record["history"] = [{PAYLOAD + k if k == "z_loss" else k: v for k, v in row.items()} for row in plain["history"]]
    hostile = tmp_path / "hostile.html"
    hostile.write_text(render(TypeAdapter(RunRecord).validate_json(json.dumps(record))), encoding="utf-8")
    seen, usual = browse(hostile, "--dump-dom").stdout, read_elements(browse(page, "--dump-dom").stdout)
    found = read_elements(seen)
    assert unescape(re.search("<title>(.*?)</title>", seen)[1]).startswith(PAYLOAD)
    assert found.elements <= usual.elements and found.attributes <= usual.attributes
    assert {source for source in found.sources if not source.startswith("#")} <= {"data:image/png;base64"}
    assert unescape(re.sub("<[^>]*>", "", seen)).count(PAYLOAD.strip()) > 100


def requests(log, host):
    """The addresses on the net that a browser's log names, but for those of the browser's own maker."""
    urls = re.findall(r'"url":"(https?://[^"]*)"', json.dumps(json.loads(log.read_text()), separators=(",", ":")))
    return [url for url in urls if not re.match(r"https?://[\w.-]*(google|gstatic|googleapis)\.com", url)]
