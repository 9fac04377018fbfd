"""Pages looked at by a real browser: Debian's Chromium without a screen."""

import os
import re
import shutil
import subprocess
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WHY_NOT = "needs chromium (apt-get install chromium)"


@dataclass(frozen=True)
class Seen:
    """What the browser made of a page: its elements as text, what it complained of, and a picture as a PNG."""

    dom: str
    console: list[str]
    png: bytes


def look(page: Path, *, fragment: str = "", width: int = 1200, height: int = 1600) -> Seen:
    """One visit, from file://; scripts that a page loads later have five seconds of its own time."""
    with tempfile.TemporaryDirectory() as profile:
        picture = Path(profile) / "page.png"
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            f"--user-data-dir={profile}", "--no-first-run", "--enable-logging=stderr", "--v=0",
            "--virtual-time-budget=5000", f"--window-size={width},{height}", f"--screenshot={picture}", "--dump-dom",
            f"{page.resolve().as_uri()}{fragment}",
        ]  # fmt: skip
        environment = {**os.environ, "HOME": profile}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
        console = [line for line in done.stderr.splitlines() if re.search(r":CONSOLE[:(]", line)]
        return Seen(done.stdout, console, picture.read_bytes() if picture.exists() else b"")


def rows_seen(png: bytes) -> int:
    """How many rows of a picture differ from one another: of a blank page, a few."""
    width = int.from_bytes(png[16:20], "big")
    data, at = b"", 8
    while at < len(png):
        size, kind = int.from_bytes(png[at : at + 4], "big"), png[at + 4 : at + 8]
        data += png[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += 12 + size
    pixels = zlib.decompress(data)
    height = int.from_bytes(png[20:24], "big")
    stride = len(pixels) // height
    assert stride >= width
    return len({pixels[row * stride : (row + 1) * stride] for row in range(height)})
