"""The command ``etude``. What it needs beyond torch is imported when it runs: a missing extra is one clear line."""

from __future__ import annotations

import os
import sys

_EXTRA = {"jinja2", "numpy", "rich", "safetensors", "scipy", "sklearn", "typer", "vl_convert"}


def main() -> None:
    """Run one command and exit: 0 when it worked, 2 for bad input, which is told in one line on stderr."""
    try:
        from etude._commands import run

        code = run(sys.argv[1:])
        sys.stdout.flush()
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] not in _EXTRA:
            raise
        sys.exit(f'etude: this command needs {missing.name}; install it with: pip install "etude[race]"')
    except BrokenPipeError:  # the reader of our pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141
    sys.exit(code)
