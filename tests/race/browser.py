"""A headless Chromium to look at a page with: devtools over a pipe, so that nothing but the browser is needed."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def found():
    """The browser's path, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """``with Browser() as page``: one page; ``size``, ``open``, ``run``, ``picture``, ``pdf``, ``key``."""

    def __enter__(self):
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, self.out = os.pipe()
        self.inp, mine = os.pipe()

        def place():
            a, b = os.dup(theirs), os.dup(mine)
            os.dup2(a, 3)
            os.dup2(b, 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        self.process = subprocess.Popen(
            [found(), *flags, "--remote-debugging-pipe", f"--user-data-dir={self.home.name}", "about:blank"],
            close_fds=False, preexec_fn=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(mine)
        self.count, self.rest, self.session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Network.enable")
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.inp)
        self.home.cleanup()

    def call(self, method, **params):
        """One command of the devtools protocol and its answer."""
        self.count += 1
        asked = {"id": self.count, "method": method, "params": params}
        if self.session:
            asked["sessionId"] = self.session
        os.write(self.out, json.dumps(asked).encode() + b"\0")
        return self._until(lambda said: said.get("id") == self.count)["result"]

    def _until(self, wanted):
        while True:
            while b"\0" not in self.rest:
                more = os.read(self.inp, 1 << 20)
                assert more, "the browser has gone"
                self.rest += more
            line, _, self.rest = self.rest.partition(b"\0")
            said = json.loads(line)
            assert "error" not in said, said
            if wanted(said):
                return said

    def size(self, width, height=900, dark=False, media="screen", scale=1):
        """The window, the colour scheme and the medium."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 500,
        )
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def open(self, path):
        """Load a file and wait until all of it is there."""
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        self._until(lambda said: said.get("method") == "Page.loadEventFired")

    def run(self, script):
        """The value of a script, as JSON."""
        got = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in got, got
        return got["result"].get("value")

    def key(self, name, code=0, **more):
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **more)

    def picture(self, path, whole=True):
        """The page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path):
        """The page as it prints, A4."""
        self.call("Emulation.setEmulatedMedia", media="print", features=[])
        sheet = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)
        Path(path).write_bytes(base64.b64decode(sheet["data"]))
