"""Pages are opened in a headless browser."""

import shutil
from collections.abc import Iterator

import pytest


def start_browser() -> Iterator:
    """Yield a browser that writes down what its console shows; the test is skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs the package selenium")
    places = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in places.values():
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = places["chromium"]
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(places["chromedriver"]))
    yield driver
    driver.quit()


def open_page(browser, address: str, width: int) -> None:
    """Open a page in a window of this many pixels."""
    size = dict(width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(address)
