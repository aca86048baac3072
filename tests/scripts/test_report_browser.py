"""The page of scripts/results.py in a browser: its filters and charts, wide and narrow, light and dark."""

import math
import shutil
import time

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
def open_page(browser, tmp_path, monkeypatch):
    """open_page(width, scheme): the page of some runs, in a window so wide, where the system asks for light or dark."""
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


def count_shown(page, selector):
    """How many elements a person can see."""
    script = "return [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length).length"
    return page.execute_script(script, selector)


def click(page, selector):
    """A click of the mouse, which also reaches what Plotly draws."""
    element = page.find_element("css selector", selector)
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    page.execute_script("arguments[0].click()", element) if element.tag_name == "input" else element.click()


def choose(page, name, value):
    from selenium.webdriver.support.select import Select

    Select(page.find_element("name", name)).select_by_value(value)


def read_style(page, selector, name):
    return page.execute_script(
        "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, name
    )


def read_axis(page):
    return page.find_element("css selector", "#learning-curves .xtitle").text


@pytest.mark.parametrize("width", [1300, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_filters_act_on_tables_and_charts_and_nothing_is_wider_than_the_window(open_page, width, scheme):
    page = open_page(width, scheme)
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert count_shown(page, "#compared-with-the-papers tr[data-state]") == 12
    states = [cell.text for cell in page.find_elements("css selector", "#compared-with-the-papers td.state")]
    assert [states.count(state) for state in ("✓ reached", "✗ not reached", "– not run")] == [1, 1, 10]
    choose(page, "state", "not reached")
    assert count_shown(page, "#compared-with-the-papers tr[data-state]") == 1
    choose(page, "state", "")
    choose(page, "model", "lstm")
    assert count_shown(page, "#compared-with-the-papers tr[data-state]") == 6
    assert count_shown(page, "#learning-curves figure") == 1
    assert count_shown(page, "#learning-curves .scatterlayer .trace") == 1
    assert count_shown(page, "#without-parts figure") == 0
    assert count_shown(page, "#without-parts .empty") == 1
    assert count_shown(page, "#finished-runs tr[data-task]") == 1
    assert count_shown(page, "#speed .barlayer .trace") == 1
    choose(page, "model", "")
    choose(page, "task", "lm")
    assert count_shown(page, "#learning-curves figure") == 1
    assert count_shown(page, "#finished-runs tr[data-task]") == 1
    choose(page, "task", "")
    assert count_shown(page, "#learning-curves figure") == 2
    assert count_shown(page, "#without-parts figure") == 1
    assert count_shown(page, "#without-parts .empty") == 0
    assert page.execute_script("return document.documentElement.scrollWidth") <= width
    assert page.execute_script("return document.querySelectorAll('script').length") == 3
    assert page.get_log("browser") == []


def test_curves_are_over_time_or_steps(open_page):
    page = open_page(1300, "light")
    assert read_axis(page) == "training time (s)"
    click(page, "input[value=steps]")
    assert read_axis(page) == "steps of the optimiser"
    x = "return document.querySelector('#learning-curves figure:nth-of-type(2) > div').data[0].x"
    assert page.execute_script(x) == [0, 1]
    click(page, "input[value=time]")
    assert page.execute_script(x) == [1, 2]


def test_the_page_follows_the_systems_colours(open_page):
    found = {}
    for scheme in ("light", "dark"):
        page = open_page(1300, scheme)
        found[scheme] = [
            read_style(page, "body", "backgroundColor"),
            read_style(page, "#learning-curves .main-svg", "backgroundColor"),
            read_style(page, "#learning-curves .xtitle", "fill"),
        ]
    assert not set(found["light"]) & set(found["dark"])
    # A change while the page is open.
    feature = [{"name": "prefers-color-scheme", "value": "light"}]
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": feature})
    page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert read_style(page, "#learning-curves .xtitle", "fill") == found["light"][2]


def test_a_line_that_the_legend_hides_stays_hidden_through_a_filter(open_page):
    page = open_page(1300, "light")
    selector = "#learning-curves figure:nth-of-type(2) .scatterlayer .trace"
    lines = count_shown(page, selector)
    click(page, "#learning-curves figure:nth-of-type(2) .legendtoggle")
    wait_until(lambda: count_shown(page, selector) == lines - 1)  # Plotly waits for a second click
    choose(page, "model", "sru")
    choose(page, "model", "")
    assert count_shown(page, selector) == lines - 1


def wait_until(condition):
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_hostile_name_is_shown_as_text(open_page):
    page = open_page(1300, "light")
    assert EVIL in page.find_element("css selector", "#learning-curves").text
    assert EVIL in page.find_element("css selector", "#finished-runs").text


def test_the_keyboard_reaches_every_filter_and_table(open_page):
    page = open_page(1300, "light")
    from selenium.webdriver.common.keys import Keys

    reached = []
    for _ in range(30):
        page.switch_to.active_element.send_keys(Keys.TAB)
        name = "const e = document.activeElement; return e.name || e.className || e.tagName"
        reached.append(page.execute_script(name))
    assert {"task", "model", "state", "axis", "scroll"} <= set(reached)
