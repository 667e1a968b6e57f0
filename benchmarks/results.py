"""Result files: what was measured, by which command, where, and on which commit."""

import datetime
import json
import os
import platform
import shlex
import sys
from pathlib import Path

import torch

from course import files
from course.bench import commit


def tell(measured: dict, command: str, out: Path | None) -> None:
    """Print what was measured, and write it where the command line asks for it."""
    print(json.dumps(measured, indent=1))
    if out is not None:
        write(out, command, measured)


def write(file: Path, command: str, measured: dict) -> None:
    """Write a result file. command: what was run, without its arguments."""
    arguments = shlex.join(sys.argv[1:])
    has_gpu = torch.cuda.is_available()
    machine = {
        "device": torch.cuda.get_device_name() if has_gpu else _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    report = {
        "command": f"{command} {arguments}".strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine,
        **measured,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    files.replace(file, json.dumps(report, indent=1) + "\n")


def _processor() -> str:
    """Name the processor; on Linux as /proc/cpuinfo does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
