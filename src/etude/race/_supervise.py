"""Runs one command and ends its whole process group when nobody waits for it any more. Standard library alone.

Started as ``python -I _supervise.py COMMAND…`` with a pipe for stdin: when that closes, because the race has timed the
command out or is dead itself (even by kill -9), every process the command has started goes with it.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """The command's own exit code, or the shell's code for its signal."""
    group = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def guard() -> None:
        sys.stdin.buffer.read()
        os.killpg(group.pid, signal.SIGKILL)

    threading.Thread(target=guard, daemon=True).start()
    code = group.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group.pid, signal.SIGKILL)  # what it has left running
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    try:
        found = main()
    except OSError as error:
        print(f"{sys.argv[1]}: {error.strerror}", file=sys.stderr)
        found = 127
    sys.stdout.flush()
    os._exit(found)
