"""`render_page` fills in the template of a page that needs no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..files import write_whole

HERE = Path(__file__).parent
PHOTO_BYTES = 5_500_000  # of all photos of a page together


def render_page(path: Path, template: str, **values: Any) -> None:
    """Fill in a template of this folder, and write the page: one HTML file, with its style and script in it.

    Raises:
        ImportError: jinja2 is not installed; the message says how to install it.
    """
    jinja2 = load_jinja2()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    page = environment.get_template(template).render(style=style, script=script, **values)
    write_whole(path, page.encode(errors="replace"))


def load_jinja2() -> Any:
    """Import jinja2.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("a page needs a package: pip install 'jinja2>=3.1'") from error
    return jinja2
