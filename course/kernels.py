"""`course kernels`: compile every Triton kernel for real GPUs, on a machine that has none.

The interpreter that grades kernels without a GPU accepts programs which the compiler refuses, and
knows nothing of registers. So the calls that benchmarks/weekN/LAB.py lists in `kernel_calls(lab)`,
with shapes and dtypes of real models, are made with a driver that compiles each launch, in every
configuration that it would be tuned over, and launches nothing.
"""

import contextlib
import functools
import importlib.util
import os
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course import grading, layers, stubs
from course.bench import load_benchmark
from course.labs import Lab, all_labs

# Compute capability → bytes of shared memory that one program may have (CUDA C++ Programming Guide,
# table of technical specifications: 163 KiB on an A100, 227 KiB on an H100 or H200).
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch.

    options: the constants and warps that it was compiled with. arch: compute capability. digest: of
    all that it was compiled from.
    num_registers: a thread. spilled, shared: bytes, a thread and a program. problem: why it failed.
    """

    kernel: str
    options: str
    arch: int
    num_registers: int = 0
    spilled: int = 0
    shared: int = 0
    problem: str = ""
    digest: str = ""

    @property
    def verdict(self) -> str:
        """What is wrong with it, in a few words; "" when nothing is."""
        if self.problem:
            return self.problem
        if self.spilled:
            return f"spills {self.spilled} bytes a thread"
        limit = SHARED_LIMITS[self.arch]
        if self.shared > limit:
            return f"{self.shared:,} bytes of shared memory, there are {limit:,}"
        return ""


def kernels(labs: Sequence[Lab], tree: str, references: Sequence[Lab] = ()) -> int:
    """Compile the kernels of some labs, or of all, and print what became of them.

    tree: "code" or "solutions". references: labs to take from the reference, which none of the
    named ones is. Returns 1 when one spills, does not fit or is refused. Raises ValueError when a
    named lab has no kernels.
    """
    known = labs_with_kernels()
    without = [lab for lab in labs if lab not in known]
    if without:
        others = ", ".join(lab.name for lab in known)
        raise ValueError(f"{without[0].name} has no kernels; these have: {others}")
    if importlib.util.find_spec("triton") is None:
        print(f"course: kernels need {grading.WHERE_TRITON_RUNS}")
        return 1
    # What was compiled once stays in the repository's own folder; fusing is what GPUs run with.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_CACHE_DIR", str(layers.STATE / "triton"))
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    grading.session.tree = tree
    references = [lab for lab in references if lab not in labs]
    overlaid = {f"{lab.name}.py": lab.solution for lab in references}
    grading.activate(layers.folders(tree, overlaid))
    worst = 0
    for lab in labs or known:
        if lab in references:
            print(f"{lab.name}: taken from the reference, nothing of yours to compile")
            continue
        if tree == "code" and stubs.is_untouched(lab):
            print(f"{lab.name}: not written yet")
            continue
        worst = max(worst, _report(lab, compile_lab(lab)))
    return worst


def labs_with_kernels() -> list[Lab]:
    """Return the labs whose kernels can be compiled here."""
    files = {lab: lab.benchmark for lab in all_labs() if lab.benchmark.is_file()}
    return [lab for lab, file in files.items() if "def kernel_calls(" in file.read_text("utf-8")]


def compile_lab(lab: Lab) -> dict[str, list[Compiled] | str]:
    """Compile everything that a lab's calls launch; returns it by the call, in words.

    A text stands for a call of something that is not written yet, and says what that is. The lab
    comes from the active layer. Raises LabUnusable when it cannot be imported.
    """
    calls = load_benchmark(lab).kernel_calls
    compiled: dict[str, list[Compiled] | str] = {}
    for arch in SHARED_LIMITS:
        with _compiling(arch) as launches:
            for what, call in calls(grading.import_lab(lab)):
                start = len(launches)
                try:
                    call()
                except NotImplementedError as error:
                    compiled[what] = _not_written(lab, str(error))
                else:
                    compiled.setdefault(what, []).extend(launches[start:])
    return compiled


def _not_written(lab: Lab, message: str) -> str:
    """Say what is missing: a function of this lab, or one of another lab that it calls."""
    missing = message.partition(" →")[0]
    if missing.startswith(f"{lab.name}.py:") or "is not written yet" not in missing:
        return missing or "raises NotImplementedError"
    other = missing.partition(".py:")[0]
    return (
        f"{missing}; to go on with the reference for it: "
        f"course kernels {lab.name} --reference {other}"
    )


def _report(lab: Lab, compiled: dict[str, list[Compiled] | str]) -> int:
    print(f"{lab.name}")
    worst, shown, as_above = 0, set(), []
    for what, launches in compiled.items():
        if isinstance(launches, str):
            print(f"  {what}\n    {launches}")
            continue
        new = [one for one in dict.fromkeys(launches) if one not in shown]
        shown.update(new)
        if launches and not new:
            as_above.append(what)
            continue
        print(f"  {what}")
        if not launches:
            print("    launches no kernel")
            worst = 1
        for one in new:
            worst = max(worst, int(bool(one.verdict)))
            figures = f"{one.num_registers:>4} registers, {one.shared / 1024:>6.1f} KiB shared"
            line = f"    sm_{one.arch} {one.kernel:<28} {figures}  {one.options}"
            print(f"{line}\n      RED: {one.verdict}" if one.verdict else line)
    if as_above:
        text = f"the same kernels as above: {'; '.join(as_above)}"
        print(textwrap.fill(text, 98, initial_indent="  ", subsequent_indent="    "))
    return worst


class _OfflineDriver:
    """The part of Triton's driver that compiling asks for, for a GPU that is not there."""

    def __init__(self, arch: int):
        self._arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device: one for every architecture.
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _compiling(arch: int) -> Iterator[list[Compiled]]:
    """A block in which every launch is compiled for an architecture, and noted, instead of run."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches: list[Compiled] = []
    run, tune = JITFunction.run, Autotuner.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        made = _compile(lambda: run(self, *args, grid=grid, warmup=True, **kwargs), self, arch)
        launches.append(made)

    def compile_every_configuration(self, *args, **kwargs):
        for config in self.configs:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    before, driver._active = driver._active, _OfflineDriver(arch)
    JITFunction.run, Autotuner.run = compile_only, compile_every_configuration
    try:
        yield launches
    finally:
        JITFunction.run, Autotuner.run = run, tune
        driver._active = before


def _compile(run: Callable[[], Any], function: Any, arch: int) -> Compiled:
    try:
        kernel = run()
    except Exception as error:
        # The last lines of the compiler's message are the place and the reason.
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip(" ^")]
        problem = f"{type(error).__name__}: {'; '.join(lines[-2:])}"
        return Compiled(function.__name__, "", arch, problem=problem, digest=problem)
    constants = kernel.src.constants
    names = {(i,): name for i, name in enumerate(function.arg_names)}
    parts = [f"{names[path]}={value}" for path, value in constants.items() if path in names]
    parts.append(f"num_warps={kernel.metadata.num_warps}")
    usage = _resource_usage(kernel.asm["cubin"])
    return Compiled(
        function.__name__,
        " ".join(parts),
        arch,
        *usage,
        shared=kernel.metadata.shared,
        digest=kernel.hash,
    )


@functools.cache
def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread and the bytes that it spills."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, _USAGE.search(printed).groups())
    return registers, stack + local
