"""Slurm's four commands, as far as submitit uses them, on this machine: each job is a shell script in a session of its
own. ``install(folder)`` puts them into ``folder/bin``; what they know lies in ``folder``."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scancel")


def install(folder):
    (folder / "bin").mkdir(parents=True)
    for name in COMMANDS:
        file = folder / "bin" / name
        file.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            f"import slurm_here\nslurm_here.{name}(slurm_here.Path({str(folder)!r}), sys.argv[1:])\n"
        )
        file.chmod(0o755)
    return folder / "bin"


def sbatch(folder, argv):
    text = Path(argv[-1]).read_text()
    options = dict(
        line[10:].split("=", 1) for line in text.splitlines() if line.startswith("#SBATCH --") and "=" in line
    )
    number = time.time_ns() // 10**6  # submitit remembers for good which numbers are done
    (folder / f"{number}.options").write_text(repr(options))
    first, _, last = options.get("array", "").partition("%")[0].partition("-")
    for i in range(int(first), int(last) + 1) if last else [None]:
        name = str(number) if i is None else f"{number}_{i}"
        env = {"SLURM_JOB_ID": str(number), "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
        env |= {"SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        env |= {} if i is None else {"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(i)}
        run = f"bash {argv[-1]}; echo $? > {folder}/{name}.code"
        job = subprocess.Popen(
            ["sh", "-c", run], env={**os.environ, **env}, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        (folder / f"{name}.pid").write_text(str(job.pid))
    print(f"Submitted batch job {number}")


def srun(folder, argv):
    """Run the command behind the options, its output where they say."""
    marks = {"%j": "SLURM_JOB_ID", "%A": "SLURM_ARRAY_JOB_ID", "%a": "SLURM_ARRAY_TASK_ID", "%t": "SLURM_PROCID"}
    while argv and argv[0].startswith("--"):
        option = argv.pop(0)
        if option in ("--output", "--error"):
            path = argv.pop(0)
            for mark, name in marks.items():
                path = path.replace(mark, os.environ.get(name, ""))
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1 if option == "--output" else 2)
    os.execvp(argv[0], argv)


def sacct(folder, argv):
    print("JobID|State|NodeList")
    for number in [argv[i + 1] for i, word in enumerate(argv) if word == "-j"]:
        for file in [*folder.glob(f"{number}.pid"), *folder.glob(f"{number}_*.pid")]:
            code = file.with_suffix(".code")
            done = code.read_text().strip() if code.exists() else "9" if gone(int(file.read_text())) else ""
            print(f"{file.stem}|{ {'': 'RUNNING', '0': 'COMPLETED'}.get(done, 'FAILED') }|here")


def scancel(folder, argv):
    for name in argv:
        for file in [*folder.glob(f"{name}.pid"), *folder.glob(f"{name}_*.pid")]:
            try:
                os.killpg(int(file.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                continue
    with (folder / "cancelled").open("a") as out:
        out.write(" ".join(argv) + "\n")


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
