"""`course test`: one command that proves references, stubs, graders and tools agree."""

import os
import signal
import subprocess
import sys

from course import models
from course.labs import ROOT

# Each loads the libraries and may start a process that loads them again: 1 GB of memory.
MAX_WORKERS = 4


def prove() -> int:
    """Run every proof; returns pytest's exit status, after its own summary as the last line."""
    # A shell's background ignores Ctrl-C for all children, and some proofs send it to theirs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for title, command in (("style", ["ruff", "check"]), ("format", ["ruff", "format", "--check"])):
        print(f"{title}: {' '.join(command)}", flush=True)
        code = subprocess.run([sys.executable, "-m", *command, "."], cwd=ROOT).returncode
        if code:
            return code
    try:
        models.resolve_model(None)
    except models.ModelUnavailable as error:
        print(f"{error}\nThe tests of the default model are skipped.", flush=True)
    # One thread: most proofs start processes, and torch's threads spin where they share a core.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    workers = min(MAX_WORKERS, os.cpu_count() or 1)
    command = ["pytest", "solutions", "tests/course", "-q", "-n", str(workers)]
    command += ["--dist", "loadgroup"]
    print(f"proof: {' '.join(command)}", flush=True)
    return subprocess.run(
        [sys.executable, "-m", *command, "-p", "no:cacheprovider"], cwd=ROOT, env=environment
    ).returncode
