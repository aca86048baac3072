"""The page of scripts/results.py in a browser: its filters, switches and legends, wide and narrow, light and dark."""

import math
import shutil

import pytest
import results
from reporting import paper_rows
from test_report import EVIL, report
from test_results import write_run

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not CHROMIUM or not DRIVER:
        pytest.skip("no Chromium, or no chromedriver, is on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, tmp_path, monkeypatch):
    """opened(width, scheme): the page of some runs, in a window so wide, where the system asks for light or dark."""
    runs = tmp_path / "runs"
    for i, parts in enumerate([[], ["no_vc"]]):
        changes = {"choices.ablation": parts, "model.has_vc_term": not parts}
        write_run(runs / f"sru{i}", 80.0 + i, changes, examples_per_second=700.0)
    write_run(runs / "lstm", 70.0, {"choices.model": "lstm"}, examples_per_second=300.0)
    lm = {"choices.task": "lm", "choices.data": EVIL, "width": 10**40}
    write_run(runs / "lm", 70.0, lm, curve=[(float(i), 90 - math.sqrt(i)) for i in range(1, 400)])
    rows = paper_rows.match(paper_rows.compose_rows("classification_[ls]*_2l"), [])
    sru = [row for row in rows if row.model == "sru"]
    found = results.read_runs(results.find_runs([runs])).runs
    sru[0].runs, sru[1].runs = ([run for run in found if run.value == value] for value in (80.0, 81.0))
    sru[1].value = 81.0
    monkeypatch.setattr(paper_rows, "match", lambda rows, _: rows)
    report(tmp_path, lambda: rows, monkeypatch, runs)

    def page(width, scheme):
        feature = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((tmp_path / "new/report.html").as_uri())
        return browser

    return page


def shown(page, selector):
    """How many elements a person can see."""
    script = "return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length).length"
    return page.execute_script(script, selector)


def click(page, selector):
    page.execute_script("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
    page.find_element("css selector", selector).click()


def choose(page, name, value):
    from selenium.webdriver.support.select import Select

    Select(page.find_element("name", name)).select_by_value(value)


def background(page):
    return page.execute_script("return getComputedStyle(document.body).backgroundColor")


@pytest.mark.parametrize(("width", "scheme"), [(1300, "light"), (1300, "dark"), (375, "light"), (375, "dark")])
def test_filters_switches_and_legends_act_and_nothing_is_wider_than_the_window(opened, width, scheme):
    page = opened(width, scheme)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    other = background(page)
    click(page, f"input[value={'dark' if scheme == 'light' else 'light'}]")
    assert background(page) != other
    click(page, f"input[value={scheme}]")
    assert background(page) == other

    assert shown(page, "#papers tr[data-state]") == 12
    assert [tile.text.split("\n")[0] for tile in page.find_elements("class name", "tile")] == ["1", "1", "10"]
    click(page, ".tile[data-state='not run']")
    assert shown(page, "#papers tr[data-state]") == 2
    choose(page, "model", "lstm")
    assert shown(page, "#papers tr[data-state]") == 0
    assert [tile.text.split("\n")[0] for tile in page.find_elements("class name", "tile")] == ["0", "0", "6"]
    assert shown(page, "#curves figure") == 1
    assert shown(page, "#curves svg .line") == 2  # in the chart, and in the legend
    assert shown(page, "#ablations figure") == 0
    assert shown(page, "#ablations .empty") == 1
    assert shown(page, "#groups tbody tr") == 1
    assert shown(page, "#speed rect") == 1
    assert shown(page, "#sweeps tbody tr") == 1
    choose(page, "model", "")
    choose(page, "task", "lm")
    assert shown(page, "#curves figure") == 1
    assert shown(page, "#groups tbody tr") == 1
    choose(page, "task", "")
    assert shown(page, "#curves figure") == 2
    assert shown(page, "#ablations figure") == 1
    assert shown(page, "#ablations .empty") == 0

    assert (shown(page, "svg.by-time"), shown(page, "svg.by-steps")) == (2, 0)
    click(page, "input[value=steps]")
    assert (shown(page, "svg.by-time"), shown(page, "svg.by-steps")) == (0, 2)
    lines = shown(page, "svg.by-steps .line")
    click(page, ".legend button")
    assert shown(page, "svg.by-steps .line") == lines - 1
    choose(page, "model", "sru")
    choose(page, "model", "")
    assert shown(page, "svg.by-steps .line") == lines - 1  # a filter does not bring it back
    click(page, ".legend button")
    assert shown(page, "svg.by-steps .line") == lines

    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.execute_script("return document.querySelectorAll('script').length") == 1
    assert page.get_log("browser") == []


def test_the_keyboard_reaches_every_switch(opened):
    page = opened(1300, "light")
    from selenium.webdriver.common.keys import Keys

    reached = []
    for _ in range(60):
        page.switch_to.active_element.send_keys(Keys.TAB)
        name = "const e = document.activeElement; return e.name || e.className || e.dataset.toggles || e.tagName"
        reached.append(page.execute_script(name))
    assert {"task", "model", "axis", "theme", "tile", "scroll", "0"} <= set(reached)
    page.find_element("class name", "tile").send_keys(Keys.SPACE)
    assert page.find_element("class name", "tile").get_attribute("aria-pressed") == "false"
