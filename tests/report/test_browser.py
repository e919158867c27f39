"""The report of the default problem in a real browser, opened from disk."""

import json
import shutil

import pytest

import fisher_lab as fl
from fisher_lab import problems
from fisher_lab.report import write_report

pytestmark = pytest.mark.browser
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1200,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def comparison():
    problem = problems.load("martens_grosse")
    return fl.compare(problem.model, problem.likelihood, problem.data, problem=problem.settings, progress=False)


@pytest.fixture(scope="module")
def page(comparison, tmp_path_factory):
    """A browser that has opened the report."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    browser.get(write_report(comparison, tmp_path_factory.mktemp("report") / "report.html").as_uri())
    yield browser
    browser.quit()


def column(page, number):
    script = "return [...document.querySelectorAll('.numbers tbody tr')].map(r => r.cells[arguments[0]].textContent)"
    return page.execute_script(script, number)


def shown(page):
    script = (
        "return [...document.querySelectorAll('.numbers tbody tr')].filter(r => r.offsetParent !== null)"
        ".map(r => [r.dataset.layer, r.dataset.approximation])"
    )
    return [tuple(pair) for pair in page.execute_script(script)]


def choose(page, name, value):
    page.execute_script(
        "const e = document.querySelector(`.filters [name=${arguments[0]}]`); e.value = arguments[1];"
        "e.dispatchEvent(new Event('input', {bubbles: true}))", name, value,
    )  # fmt: skip


def test_it_opens_without_an_error_and_without_any_request(page):
    assert page.title.startswith("martens_grosse")
    assert not page.get_log("browser")
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert len([url for url in urls if url.startswith("file:")]) == 1
    own = ("chrome:", "chrome-untrusted:")  # the browser's own new tab, open before
    assert all(url.startswith(("file:", "data:", *own)) for url in urls), urls


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
    assert sizes[: len(known)] == [v for v in sizes if v != ""]  # all layers together have no size: they come last
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
