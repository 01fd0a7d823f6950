"""`write_space` writes the folder of a Hugging Face Space, a page to try a detector in, and checks that it works."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from huggingface_hub import SpaceCardData

from .files import read_json
from .hub import CARD, CONFIG, MAX_CONFIG_BYTES, WEIGHTS
from .version import __version__

HERE = Path(__file__).parent
APP = "app.py"
TIMEOUT_S = 600  # of the check; it takes seconds, and longer where torch is read from a slow disk


def write_space(folder: Path, source: Path, repo_id: str, license: str | None = None) -> None:
    """Write a Space: the page `demo.py` as app.py, the model, this package, what it needs, and the card.

    The package comes as files, so that the Space runs the code that was checked here. The versions in requirements.txt
    are the versions on this machine.

    Args:
        folder: an empty folder, or one to make.
        source: the folder of a saved detector.
        repo_id: "organisation/name" of the model on the Hub, for the card.
        license: of the weights, as the Hub abbreviates it.

    Raises:
        ImportError: gradio, or another package, is not installed.
        ValueError: the model is no detector, or the page does not start.
    """
    if "architecture" in read_json(source / CONFIG, MAX_CONFIG_BYTES):
        raise ValueError(f"{source}: --space is a page of a detector, and this is a backbone")
    requirements = _requirements()
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(source / name, folder / name)
    shutil.copyfile(HERE / "demo.py", folder / APP)
    shutil.copytree(HERE, folder / HERE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements), encoding="utf-8")
    card = SpaceCardData(
        title=repo_id.split("/")[-1],
        sdk="gradio",
        sdk_version=_version("gradio"),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file=APP,
        license=license,
        models=[repo_id],
        emoji="🔍",
    )
    (folder / CARD).write_text(f"---\n{card.to_yaml()}\n---\n\n{_about(repo_id)}", encoding="utf-8")
    _check(folder)


def _about(repo_id: str) -> str:
    install = f"pip install -r requirements.txt gradio=={_version('gradio')}"
    return (
        f"# Try {repo_id}\n\nAn object detector of vovnet_zoo {__version__} (Apache-2.0), whose code is in the folder "
        f"`{HERE.name}`. After `{install}`, `python {APP}` serves this page on any machine.\n"
    )


def _requirements() -> list[str]:
    """List the packages that this one needs, in the versions of this machine; gradio is a setting of the card."""
    try:
        needed = importlib.metadata.requires("vovnet_zoo") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            "a Space lists what vovnet_zoo needs, so install it first: pip install -e '.[demo]'"
        ) from error
    names = [re.split(r"[^\w.-]", line)[0] for line in needed if "extra ==" not in line]
    _version("gradio")
    return [f"{name}=={_version(name)}" for name in names]


def _version(name: str) -> str:
    """Return the version of an installed package, without what says how it was built, such as "+cpu"."""
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(f"a Space needs the package {name}: pip install 'vovnet_zoo[demo]'") from error


def _check(folder: Path) -> None:
    """Start the page of a Space in a process of its own, with the files of its folder, and detect once."""
    other = ("PYTHONPATH", "PYTHONSAFEPATH")  # with them, Python would not take the package from the folder
    environment = {name: value for name, value in os.environ.items() if name not in other}
    line = [sys.executable, "-B", APP, "--check"]
    try:
        result = subprocess.run(
            line,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"the page of the Space did not start in {TIMEOUT_S} s; nothing was pushed") from error
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"the page of the Space does not start; nothing was pushed: {reason}")
