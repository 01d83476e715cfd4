"""The two pages in a headless Chromium: `nox -s browser`.

Screenshots go to the folder that SCREENSHOTS names: look at them.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_pages import write_run, write_sweep

from medusa_exp.tracking.run_report import write_report
from medusa_exp.tracking.sweep_report import write_comparison

pytest.importorskip("playwright")

from playwright.sync_api import Browser, Page, sync_playwright

SIZES = {"desktop": (1100, 900), "phone": (390, 844)}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def pages(tmp_path_factory) -> dict[str, Path]:
    """A page of each kind; REAL_RUN, a run directory, takes the place of the made-up run."""
    folder = tmp_path_factory.mktemp("pages")
    real = os.environ.get("REAL_RUN")
    (folder / "run").mkdir()
    return {
        "run": write_report(Path(real) if real else write_run(folder / "run")),
        "sweep": write_comparison(write_sweep(folder)),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["run", "sweep"])
def test_a_page_draws_all_it_has_without_error_or_network(browser, pages, name, size, scheme):
    width, height = SIZES[size]
    troubles: list[str] = []
    requests: list[str] = []
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    page.on("console", lambda message: troubles.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(pages[name].as_uri())
    charts = page.locator(".chart")
    page.wait_for_function(
        "document.querySelectorAll('.chart svg').length"
        " === document.querySelectorAll('.chart').length"
    )
    assert charts.count() >= 3
    assert troubles == []
    assert requests == [pages[name].as_uri()]
    assert widest_overflow(page) <= width, "the page itself does not scroll sideways"
    take(page, f"{name}-{size}-{scheme}")
    context.close()


def test_a_click_on_a_column_sorts_the_jobs_as_numbers(browser, pages):
    page = browser.new_page()
    page.goto(pages["sweep"].as_uri())
    column = page.get_by_role("button", name="head.num_heads")

    def heads() -> list[str]:
        return page.locator("tbody tr td:nth-child(3)").all_inner_texts()

    column.click()
    assert heads() == ["99", "10", "4", "3"]
    column.click()
    assert heads() == ["3", "4", "10", "99"]
    page.get_by_role("button", name="speed-up").click()
    assert heads()[:2] == ["10", "3"], "jobs without a figure come last"
    page.close()


def test_every_chart_has_a_name_for_who_does_not_see_it(browser, pages):
    for path in pages.values():
        page = browser.new_page()
        page.goto(path.as_uri())
        images = page.get_by_role("img", include_hidden=False).all()
        charts = page.locator(".chart").all()
        assert len(images) >= len(charts)
        assert all(chart.get_attribute("aria-label") for chart in charts)
        page.close()


def widest_overflow(page: Page) -> int:
    return page.evaluate("document.documentElement.scrollWidth")


def take(page: Page, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)
