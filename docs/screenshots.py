"""`python docs/screenshots.py`: pictures of the terminal at 100 columns, and of the documentation's first page, in docs/images.

Needs Chromium, and mkdocs-material for the page. The commands run as a user runs them, on the demo's models; minutes on a CPU.
"""

import re
import shutil
import subprocess
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image
from rich.terminal_theme import MONOKAI

from simct.commands.cli import main
from simct.console import console
from simct.demo import ASSETS

IMAGES = Path(__file__).parent / "images"
COLUMNS = 100
SHOTS = {
    "terminal-inspect": f"inspect {ASSETS / 'student'} {ASSETS / 'teacher'}",
    "terminal-train": "train --recipe demo/distil --output_dir runs/demo --max_steps 4 --eval_prompts 16",
    "terminal-demo": "demo --output demo",
}


def terminal(name: str, command: str, folder: Path) -> None:
    """A command's output, as an SVG of rich's, and that as a PNG."""
    console.record, console.size = True, (COLUMNS, 50)
    console.print(f"$ simct {command.replace(str(ASSETS), 'demo')}", style="bold", highlight=False)
    main(command.split())
    svg = folder / f"{name}.svg"
    console.save_svg(str(svg), title="simct", theme=MONOKAI)
    text = re.sub(
        r"src:.*?;", "", svg.read_text(encoding="utf-8"), flags=re.DOTALL
    )  # fonts of this machine, none from elsewhere
    svg.write_text(text.replace("Fira Code", "DejaVu Sans Mono"), encoding="utf-8")
    width, height = (round(float(n)) for n in re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text).groups())
    photograph(svg.as_uri(), IMAGES / f"{name}.png", width, height)


def photograph(address: str, picture: Path, width: int, height: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("chromium is not here: apt-get install chromium")
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
    ]
    subprocess.run([*command, f"--screenshot={picture}", address], check=True, capture_output=True, timeout=120)
    with Image.open(picture) as found:
        few = found.convert("RGB").quantize(128)
    few.save(picture, optimize=True)


def first_page(folder: Path) -> None:
    import build

    with tempfile.TemporaryDirectory() as staged:
        (Path(staged) / "api").mkdir()
        (Path(staged) / "api" / "index.html").touch()  # the reference is not in the picture
        list(build.pages(Path(staged), folder / "site"))
    serve = partial(SimpleHTTPRequestHandler, directory=folder / "site")  # a file's page has no search
    with ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        photograph(f"http://127.0.0.1:{server.server_port}/docs/", IMAGES / "documentation.png", 1280, 1200)
        server.shutdown()


if __name__ == "__main__":
    import os

    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        first_page(Path(work))
        for shot in SHOTS.items():
            terminal(*shot, Path(work))
