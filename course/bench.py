"""`course bench LAB`: the speed of a lab as a ratio to what it is compared with, and its medal.

What is timed lies in benchmarks/weekN/LAB.py: a function `workload(yours)` that returns a Workload.
The thresholds lie in the lab's TOML under [medal]. Every round times every side once, so that a
machine that is busy for a moment slows all of them; the ratio of a round is one number, and the
median of the rounds counts.
"""

import importlib.util
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import torch

from course import grading, layers, models, mutants, progress, status
from course.engine import Engine, assemble, takes_part
from course.labs import ROOT, Lab, all_labs, find_labs, week_labs
from course.paged import PagedParams

MEDALS = ("gold", "silver", "bronze")
YOURS = "yours"


@dataclass(frozen=True)
class Workload:
    """What to time.

    sides: name → one run of it; "yours" and `against` are among them. count, unit: what one run
    gets done, such as 32 tokens. flops, num_bytes: the least work of one run, for the limit.
    device: where it runs. dtype: of its matrix products.
    """

    sides: Mapping[str, Callable[[], object]]
    against: str
    count: int
    unit: str
    flops: float
    num_bytes: float
    device: str = "cpu"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Machine:
    """What a device does at best, measured here.

    name: of the device. flops: a second, in matrix products. bytes_per_second: read and written.
    """

    name: str
    flops: float
    bytes_per_second: float


def bench(lab: Lab, num_runs: int, as_json: bool) -> int:
    """Time a lab and name its medal; returns 1 when it is not green. Raises ValueError."""
    thresholds = mutants.medal(lab)
    if not thresholds:
        raise ValueError(_no_medal(lab))
    if num_runs < 1:
        raise ValueError(f"--runs must be at least 1, got {num_runs}")
    grades = status.grade_all()
    if grades[lab].state != "green":
        print(f"{lab.name} is not green: right before fast. Grade it: pytest {lab.path}")
        return 1
    try:
        yours = {other for other, grade in grades.items() if grade.state == "green"}
        work = load_benchmark(lab).workload(yours)
    except models.ModelUnavailable as error:
        print(f"course: {error}")
        return 1
    seconds = _time(work, num_runs)
    report = _report(lab, work, seconds, measure_machine(work.device, work.dtype), thresholds)
    progress.append("bench", lab, ratio=report["ratio"], medal=report["medal"])
    print(json.dumps(report, indent=1) if as_json else _table(report))
    return 0


def medal_of(ratio: float, thresholds: Mapping[str, float]) -> str:
    """Return the best medal whose threshold the ratio reaches, or ""."""
    return next((name for name in MEDALS if ratio >= thresholds[name]), "")


def measure_machine(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Measure the copy bandwidth and the rate of a matrix product, the best of five.

    dtype: of the product.
    """
    size = 1024 if device == "cpu" else 8192
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    a = torch.ones(size, size, dtype=dtype, device=device)
    for run in (lambda: target.copy_(source), lambda: a @ a):
        run()
    copying = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
    multiplying = min(_seconds(lambda: a @ a) for _ in range(5))
    is_gpu = device != "cpu"
    name = torch.cuda.get_device_name() if is_gpu else platform.processor() or platform.machine()
    return Machine(name, 2 * size**3 / multiplying, 2 * source.nbytes / copying)


def _no_medal(lab: Lab) -> str:
    if lab.benchmark.is_file():
        return f"{lab.name} has no medal; to measure: python -m benchmarks.{lab.module}"
    others = ", ".join(other.name for other in all_labs() if mutants.medal(other))
    return f"{lab.name} has no medal: speed is not its point; there is one for {others}"


def load_benchmark(lab: Lab) -> ModuleType:
    """Load what stands in benchmarks/ for a lab: its workload, or the calls of its kernels."""
    name = f"benchmarks.{lab.module}"
    spec = importlib.util.spec_from_file_location(name, lab.benchmark)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def import_for_gpu(yours: set[Lab], *names: str) -> list[ModuleType]:
    """Import labs for a workload that needs a GPU: those in yours from code/, others the reference.

    names: the lab that is measured first. Raises ValueError where there is no GPU.
    """
    if not torch.cuda.is_available():
        raise ValueError(f"{names[0]} is measured on a GPU, and this machine has none")
    grading.activate(layers.folders("solutions", {f"{lab.name}.py": lab.code for lab in yours}))
    return [grading.import_lab(lab) for name in names for lab in find_labs(name)]


def assemble_paged(yours: set[Lab], prefix_caching: bool = True) -> Engine:
    """Load the default model in bfloat16 into week 3's engine, in which no token ends an answer.

    yours: the labs to take from code/; the rest is the reference.
    """
    folder = models.resolve_model(None)
    parts = {lab for lab in yours if takes_part(lab)}
    return assemble(
        parts,
        folder,
        "bfloat16",
        models.load_tokenizer(folder),
        frozenset(),
        set(week_labs()) - parts,
        paged_params=PagedParams(kv_gb=0.5, prefix_caching=prefix_caching),
    )


def _time(work: Workload, num_runs: int) -> dict[str, list[float]]:
    for run in work.sides.values():
        run()  # what happens only once is not counted
    seconds: dict[str, list[float]] = {name: [] for name in work.sides}
    for _ in range(num_runs):
        for name, run in work.sides.items():
            seconds[name].append(_seconds(run))
    return seconds


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _report(
    lab: Lab,
    work: Workload,
    seconds: dict[str, list[float]],
    machine: Machine,
    thresholds: Mapping[str, float],
) -> dict:
    rounds = zip(seconds[work.against], seconds[YOURS], strict=True)
    ratio = statistics.median(theirs / ours for theirs, ours in rounds)
    best = max(work.flops / machine.flops, work.num_bytes / machine.bytes_per_second)
    rates = {name: work.count / statistics.median(times) for name, times in seconds.items()}
    return {
        "lab": lab.name,
        "medal": medal_of(ratio, thresholds),
        "ratio": round(ratio, 3),
        "against": work.against,
        "thresholds": dict(thresholds),
        "unit": f"{work.unit}/s",
        "rates": {name: round(rate, 2) for name, rate in rates.items()},
        "share_of_limit": round(rates[YOURS] * best / work.count, 3),
        "machine": {
            "name": machine.name,
            "cores": os.cpu_count(),
            "gflops": round(machine.flops / 1e9, 1),
            "gigabytes_per_second": round(machine.bytes_per_second / 1e9, 1),
            "torch": torch.__version__,
            "commit": commit(),
        },
        "seconds": {name: [round(t, 4) for t in times] for name, times in seconds.items()},
    }


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip()


def _table(report: dict) -> str:
    unit = report["unit"]
    lines = [f"{name:<24} {rate:>10.2f} {unit}" for name, rate in report["rates"].items()]
    machine, limits = report["machine"], report["thresholds"]
    lines.append(
        f"this machine: {machine['gflops']:.0f} GFLOP/s, "
        f"{machine['gigabytes_per_second']:.1f} GB/s copied; "
        f"yours reaches {report['share_of_limit']:.0%} of what that allows"
    )
    steps = ", ".join(f"{name} {limits[name]:g}" for name in reversed(MEDALS))
    lines.append(f"{report['ratio']:.2f} × {report['against']} ({steps})")
    lines.append(f"medal: {report['medal'] or 'none yet'}")
    return "\n".join(lines)
