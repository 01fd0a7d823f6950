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


def set_colours(browser, scheme: str) -> None:
    """Prefer "light" or "dark" colours, as the settings of a system do."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def pale_texts(browser, least: float = 4.5, besides: str = ".no-such-part") -> list[str]:
    """List the visible texts whose contrast with what is behind them is below `least`, which WCAG 2 AA wants."""
    return browser.execute_script(PALE_TEXTS, least, besides)


PALE_TEXTS = """
const [least, besides] = arguments, canvas = document.createElement("canvas");
canvas.width = canvas.height = 1;
const paint = canvas.getContext("2d", { willReadFrequently: true });
function rgba(text) {
  paint.clearRect(0, 0, 1, 1); paint.fillStyle = text; paint.fillRect(0, 0, 1, 1);
  return [...paint.getImageData(0, 0, 1, 1).data];
}
function over(top, below) { return top.slice(0, 3).map((x, i) => (x * top[3] + below[i] * (255 - top[3])) / 255); }
function behind(part) {
  if (!part) return matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
  const own = rgba(getComputedStyle(part).backgroundColor);
  return own[3] === 255 ? own.slice(0, 3) : over(own, behind(part.parentElement));
}
function light(colour) {
  const [r, g, b] = colour.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
const found = [];
for (const part of document.body.querySelectorAll("*")) {
  const text = [...part.childNodes].filter((x) => x.nodeType === 3).map((x) => x.data.trim()).join(" ").trim();
  if (!text || !part.checkVisibility({ visibilityProperty: true }) || part.closest(besides + ", title")) continue;
  const style = getComputedStyle(part), below = behind(part);
  const colour = over(rgba(part instanceof SVGElement ? style.fill : style.color), below);
  const [a, b] = [light(colour), light(below)].sort((x, y) => y - x), contrast = (a + 0.05) / (b + 0.05);
  if (contrast < least) found.push(`${contrast.toFixed(2)}: ${part.localName} ${text}`);
}
return found;
"""
