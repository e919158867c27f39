"""The report of the default problem in a real browser, opened from disk."""

import json
import re
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import fisher_lab as fl
from fisher_lab import problems
from fisher_lab.report import write_report
from tests.report.support import HIT, HOSTILE, hostile_file

pytestmark = pytest.mark.browser
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,900",
)


@pytest.fixture(scope="module")
def comparison():
    problem = problems.load("martens_grosse")
    return fl.compare(
        problem.model, problem.likelihood, problem.data, problem=problem.settings, progress=False
    )


@contextmanager
def opened(path, profile):
    """A browser that has opened a page from disk."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        browser.get(path.as_uri())
        yield browser
    finally:
        browser.quit()


@pytest.fixture(scope="module")
def page(comparison, tmp_path_factory):
    """A browser that has opened the report."""
    path = write_report(comparison, tmp_path_factory.mktemp("report") / "report.html")
    with opened(path, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def requested(page):
    """Addresses that the page asked for, but for those of the browser's own new tab,
    open before.
    """
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [
        m["params"]["request"]["url"]
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]
    return [url for url in urls if not url.startswith(("chrome:", "chrome-untrusted:"))]


def column(page, number):
    script = "return [...document.querySelectorAll('.numbers tbody tr')].map(r => r.cells[arguments[0]].textContent)"
    return page.execute_script(script, number)


def shown(page):
    script = (
        "return [...document.querySelectorAll('.numbers tbody tr')].filter(r => r.offsetParent "
        "!== null).map(r => [r.dataset.layer, r.dataset.approximation])"
    )
    return [tuple(pair) for pair in page.execute_script(script)]


def choose(page, name, value):
    page.execute_script(
        "const e = document.querySelector(`.filters [name=${arguments[0]}]`); e.value = "
        "arguments[1];"
        "e.dispatchEvent(new Event('input', {bubbles: true}))", name, value,
    )  # fmt: skip


def test_it_opens_without_an_error_and_without_any_request(page):
    assert page.title.startswith("martens_grosse")
    assert not page.get_log("browser")
    urls = requested(page)
    assert len([url for url in urls if url.startswith("file:")]) == 1
    assert all(url.startswith(("file:", "data:")) for url in urls), urls


def test_the_page_shows_all_rows_of_the_comparison(page, comparison):
    assert shown(page) == list(dict.fromkeys((r.layer, r.approximation) for r in comparison.rows))


def test_a_click_sorts_by_the_number_and_a_second_one_the_other_way(page, comparison):
    headings = page.find_elements("css selector", ".numbers thead th")
    place = [h.text.split()[0] for h in headings].index("frobenius")
    ordered = sorted(r.value for r in comparison.rows if r.error == "frobenius")
    script = "return [...document.querySelectorAll('.numbers tbody tr')].map(r => r.cells[arguments[0]].dataset.value)"
    for state, expected in (("ascending", ordered), ("descending", ordered[::-1])):
        headings[place].find_element("tag name", "button").click()
        assert headings[place].get_attribute("aria-sort") == state
        assert [float(v) for v in page.execute_script(script, place)] == expected
    headings[-1].find_element("tag name", "button").click()
    sizes = page.execute_script(script, len(headings) - 1)
    known = [float(v) for v in sizes if v != ""]
    assert known == sorted(known)
    # all layers together have no size: they come last
    assert sizes[: len(known)] == [v for v in sizes if v != ""]
    headings[1].find_element("tag name", "button").click()
    assert column(page, 1) == sorted(column(page, 1), key=str.lower)
    headings[0].find_element("tag name", "button").click()
    assert [pair[0] for pair in shown(page)] == [
        pair[0] for pair in dict.fromkeys((r.layer, r.approximation) for r in comparison.rows)
    ]


def test_filters_leave_what_fits(page, comparison):
    choose(page, "layer", "4")
    assert {layer for layer, _ in shown(page)} == {"4"}
    choose(page, "approximation", "KPSVD")
    assert shown(page) == [("4", "KPSVD")]
    assert page.find_element("css selector", ".filters output").text.startswith("1 of ")
    choose(page, "layer", "*")
    assert len(shown(page)) == len(comparison.layers) + 1
    choose(page, "approximation", "*")
    choose(page, "text", "tkfac")
    assert {label for _, label in shown(page)} == {"TKFAC"}
    choose(page, "text", "")
    assert len(shown(page)) == len(column(page, 0))


def test_it_fits_a_phone(page):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert page.execute_script("return innerWidth") == 390
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        button = page.find_element("css selector", ".numbers thead button")
        assert button.rect["height"] >= 24
        page.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
        button.click()
        assert page.find_element("css selector", ".numbers th[aria-sort]").text.startswith("layer")
        choose(page, "layer", "2")
        assert {layer for layer, _ in shown(page)} == {"2"}
    finally:
        choose(page, "layer", "*")
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert not page.get_log("browser")


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")
def test_nothing_that_a_file_says_runs_or_loads(tmp_path):
    markup = [text for text in HOSTILE.values() if HIT in text or "http" in text]
    files = [hostile_file(tmp_path / f"{i}.json", text) for i, text in enumerate(markup)]
    with opened(write_report(files, tmp_path / "report.html"), tmp_path / "profile") as page:
        for element in page.find_elements("css selector", "summary, .numbers thead button"):
            page.execute_script("arguments[0].click()", element)
        assert page.execute_script("return window.hit") is None
        assert (
            page.execute_script("return document.querySelectorAll('script, img, iframe').length")
            == 1
        )
        assert len(page.find_elements("css selector", "section[id]")) == len(markup)
        # No complaint either: it is the escaping that holds, and the policy had nothing to stop.
        assert not page.get_log("browser")
        assert [
            url.partition(":")[0] for url in requested(page) if not url.startswith("data:")
        ] == ["file"]


SLIPPED = """
<script>window.hit=1</script><img src=x onerror=window.hit=1><svg onload=window.hit=1></svg>
<script src="{url}/a.js"></script><img src="{url}/b.png"><link rel=stylesheet href="{url}/c.css">
<iframe src="{url}/d.html"></iframe><object data="{url}/e"></object><div style="background:url({url}/f.png)">x</div>
<style>@import "{url}/g.css"; @font-face {{ font-family: f; src: url({url}/h) }} body {{ font-family: f }}</style>
<iframe srcdoc="<script>parent.hit=1</script>"></iframe><a id=slipped href="javascript:window.hit=1">x</a>
"""


@pytest.fixture
def outside():
    """A server, and what was asked of it."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("kept", [True, False], ids=["with the policy", "without it"])
def test_should_markup_slip_through_the_policy_stops_it(tmp_path, outside, kept):
    url, asked = outside
    path = write_report(hostile_file(tmp_path / "run.json", "x"), tmp_path / "report.html")
    text = path.read_text(encoding="utf-8").replace("<main>", "<main>" + SLIPPED.format(url=url))
    if not kept:  # so that the test shows that these would run and load
        text = re.sub('<meta http-equiv="Content-Security-Policy".*?>', "", text)
    path.write_text(text, encoding="utf-8")
    with opened(path, tmp_path / "profile") as page:
        page.find_element("id", "slipped").click()
        assert page.execute_script("return window.hit") == (None if kept else 1)
        # its own script runs
        assert page.find_element("css selector", ".filters output").text.endswith("rows")
    assert {path.partition(".")[0] for path in asked} == (
        set() if kept else {f"/{letter}" for letter in "abcdefgh"}
    )
