"""The one thing pyproject.toml cannot say: a wheel carries the list of paper tests, for it has no checkout to read."""

import json
import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def write_tests(folder: Path) -> None:
    """``tests.json`` beside the catalogue."""
    scan = runpy.run_path(str(ROOT / "src/etude/catalogue/_tests.py"))["scan"]
    found = scan(ROOT / "tests" / "papers")
    if not found:
        raise FileNotFoundError("tests/papers is empty: build the wheel from a checkout or from the sdist")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tests.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


class WithTests(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            write_tests(Path(self.build_lib, "etude", "catalogue"))


if __name__ == "__main__":
    setup(cmdclass={"build_py": WithTests})
