"""Figures as files: an HTML page that can be explored, and a PNG where a Chromium is installed."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import plotly.graph_objects as go

from steerlens.figures.theme import theme


def save(fig: go.Figure, folder: Path, name: str, *, width: int = 960, height: int = 480) -> None:
    """Write `folder/name.html`, and `folder/name.png` with the same size in pixels if there is a browser to draw it."""
    fig.update_layout(template=theme(), width=width, height=height)
    folder.mkdir(parents=True, exist_ok=True)
    fig.write_html(folder / f"{name}.html", include_plotlyjs="cdn")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print(f"no Chromium found: {name}.png is not drawn")
        return
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "page.html"
        fig.write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--window-size={width + 16},{height + 16}", "--virtual-time-budget=5000"]
        target = (folder / f"{name}.png").absolute()
        subprocess.run(
            [*command, f"--screenshot={target}", page.as_uri()], check=True, capture_output=True, timeout=120
        )
