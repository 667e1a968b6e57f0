"""What a graded suite sees of Triton kernels: that one ran, and that it kept to its memory.

Without a GPU kernels run in Triton's interpreter: one program after the other, on the memory of
this process. It forgives what a GPU does not, so that it is watched here:

- an access outside of the tensors that were handed in, which may hit anything;
- a value that a masked load has left undefined: the interpreter gives 0, here it is NaN;
- programs of one launch that meet at an address, while a GPU runs them in any order;
- bfloat16 in `tl.dot`, which the interpreter computes wrongly without a word;
- float32 in `tl.dot`, which it multiplies exactly where a GPU rounds.

A suite of kernels imports this module, and the plugin has chosen the interpreter by then.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from course.grading import TOLERANCE, GradedFailure, LabUnusable

try:
    import triton
    from triton.runtime import interpreter
    from triton.runtime.jit import JITFunction
except ImportError:  # the plugin says what to install
    triton = None

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What `tl.dot` multiplies here, and what a graded kernel therefore meets.
DTYPES = (torch.float32, torch.float16, *((torch.bfloat16,) if DEVICE == "cuda" else ()))
# Of the three sides of a product, the one that disappears: the compiler takes no shorter one.
_SMALLEST_INNER = 16
# What torch may do around a kernel: make memory, and look at it in another way.
_MEMORY = re.compile(
    r"(new_)?(empty|zeros|full)(_like|_strided)?|zero_|fill_|_?(unsafe_view|reshape_alias)|view|"
    r"as_strided|alias|detach|expand|permute|transpose|t|select|slice|squeeze|unsqueeze|unfold|"
    r"split|split_with_sizes|unbind|diagonal"
)
# Undefined integers: no index that anybody uses.
_UNDEFINED_INTEGER = 0x5A


class KernelFault(Exception):
    """What a kernel did that a GPU would not forgive, in one sentence."""


@contextlib.contextmanager
def observed() -> Iterator[list[str]]:
    """A block that notes the name of every kernel that is launched in it."""
    names: list[str] = []

    def note(function: Any, run: Callable, *args: Any, **kwargs: Any) -> Any:
        names.append(function.__name__)
        return run(function, *args, **kwargs)

    with _launching(note):
        yield names


def count_programs(call: Callable[[], Any]) -> int:
    """Run a call, and count the programs of all its launches."""
    counts: list[int] = []

    def count(function: Any, run: Callable, *args: Any, grid: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(function.arg_names, args, strict=False)), **kwargs}
        counts.append(math.prod(grid(named) if callable(grid) else grid))
        return run(function, *args, grid=grid, **kwargs)

    with _launching(count):
        call()
    return sum(counts)


@contextlib.contextmanager
def suppressed() -> Iterator[None]:
    """A block in which no kernel runs, and memory that torch has not written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with _launching(lambda *_, **__: None):
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def check_kernel_computes(call: Callable[[], Tensor], of: str, num_launches: int = 1) -> None:
    """Hold a call to having its result from a kernel, by what it gives when no kernel runs.

    call: gives one floating tensor, from arguments of its own at each call. num_launches: how many
    it may need at most.
    """
    with observed() as names:
        result = call()
    if not names:
        raise GradedFailure(f"{of}\nno Triton kernel was launched")
    if len(names) > num_launches:
        text = f"{of}\n{len(names)} kernels were launched, at most {num_launches} are allowed"
        raise GradedFailure(f"{text}: {', '.join(names[:4])}", names)
    with suppressed():
        try:
            other = call()
        except Exception:
            return  # what it needs from its kernel was not there
    close = (other.double() - result.double()).abs() <= TOLERANCE[result.dtype] * result.abs().max()
    if bool(close.all()):
        text = f"{of}\nthe kernel {names[0]} was launched, and without it the result is the same"
        raise GradedFailure(f"{text}: what computed it?", names)


def check_only_kernels_compute(
    function: Callable[..., Any], *args: Any, of: str, **kwargs: Any
) -> None:
    """Hold a call to leaving all work to its kernels: torch makes memory and views, nothing else.

    On a GPU every other operation would be one more launch, and one more way through memory.
    """
    with suppressed(), _OnlyMemory() as mode:
        try:
            function(*args, **kwargs)
        except (NotImplementedError, LabUnusable):
            raise
        except Exception:
            pass  # what becomes of values that no kernel wrote is not looked at
    if mode.computed:
        names = ", ".join(dict.fromkeys(mode.computed))
        raise GradedFailure(f"{of}\nbeside its kernels, torch computes: {names}", names)


class _OnlyMemory(TorchDispatchMode):
    """Notes the operations that make neither memory nor a view."""

    def __init__(self):
        super().__init__()
        self.computed: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not _MEMORY.fullmatch(name):
            self.computed.append(name)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_reads(tensor: Tensor) -> Iterator[Tensor]:
    """A block that counts how often kernels load each element of a tensor.

    Yields int64 counts of the tensor's shape, which grow with every launch. Only the interpreter
    sees loads: on a GPU they stay 0.
    """
    with _watched(tensor, 0, lambda counts, places: np.add.at(counts, places, 1)) as counts:
        yield counts


@contextlib.contextmanager
def reading_programs(tensor: Tensor) -> Iterator[Tensor]:
    """A block that notes which program of a launch loads each element of a tensor last.

    Yields int64 numbers of the tensor's shape, -1 where nobody did; as `counted_reads`, only for
    the interpreter.
    """

    def note(programs: np.ndarray, places: np.ndarray) -> None:
        programs[places] = _program()

    with _watched(tensor, -1, note) as programs:
        yield programs


@contextlib.contextmanager
def _watched(
    tensor: Tensor, fill: int, note: Callable[[np.ndarray, np.ndarray], None]
) -> Iterator[Tensor]:
    noted = torch.full((_extent(tensor),), fill, dtype=torch.int64)
    watch = _Watch(tensor.data_ptr(), tensor.itemsize, noted.numpy(), note)
    _watches.append(watch)
    try:
        yield noted.as_strided(tensor.shape, tensor.stride())
    finally:
        _watches.remove(watch)


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """A block in which the host may not look into a tensor: on a GPU it would have to wait there.

    No kernel runs in the interpreter meanwhile, since that looks into every tensor.
    """
    if DEVICE == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    else:
        with suppressed(), _NoCopying(), _NoLooking():
            yield


class _NoCopying(TorchFunctionMode):
    """Refuses to bring a whole tensor to the host."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        # By __dlpack__ another library, such as NumPy, takes a tensor's memory for its own.
        refused = {"tolist", "numpy", "__array__", "__dlpack__", "cpu"}
        _refuse(getattr(function, "__name__", ""), refused)
        return function(*args, **(kwargs or {}))


class _NoLooking(TorchDispatchMode):
    """Refuses operations of which the host needs the result, such as int(x.max()) and x[:n]."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1]):
            name = "nonzero"  # how many elements a mask picks out is what it holds
        _refuse(name, {"_local_scalar_dense", "nonzero", "masked_select", "equal"})
        return function(*args, **(kwargs or {}))


def _refuse(name: str, refused: set[str]) -> None:
    if name in refused:
        what = "item" if name == "_local_scalar_dense" else name.strip("_")
        raise KernelFault(
            f"the host asks for what a tensor holds ({what}), and would wait for a GPU there"
        )


@contextlib.contextmanager
def _launching(launch: Callable) -> Iterator[None]:
    """Let `launch(function, run, *args, **kwargs)` decide what becomes of every launch."""
    kinds = (interpreter.InterpretedFunction, JITFunction) if triton is not None else ()
    kept = [(kind, kind.run) for kind in kinds]
    for kind, run in kept:

        def replaced(self, *args, _run=run, **kwargs):
            return launch(self, _run, *args, **kwargs)

        kind.run = replaced
    try:
        yield
    finally:
        for kind, run in kept:
            kind.run = run


@dataclass
class _Launch:
    """One launch in the interpreter: its tensors, and who has touched which address.

    bounds: name, first address and end of each tensor, as the kernel may use it.
    """

    kernel: str
    bounds: list[tuple[str, int, int]] = field(default_factory=list)
    reads: list[tuple[int, np.ndarray]] = field(default_factory=list)
    writes: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)
    has_atomics: bool = False

    def add_tensor(self, name: str, value: Any) -> None:
        value = getattr(value, "base", value) if not isinstance(value, Tensor) else value
        if isinstance(value, Tensor):
            start = value.data_ptr()
            self.bounds.append((name, start, start + _extent(value) * value.itemsize))

    def check(self, addresses: np.ndarray, itemsize: int, verb: str) -> None:
        """Hold an access to the launch's tensors."""
        outside = np.ones(addresses.shape, dtype=bool)
        for _, start, end in self.bounds:
            outside &= (addresses < start) | (addresses + np.uint64(itemsize) > end)
        if outside.any():
            names = ", ".join(name for name, *_ in self.bounds)
            raise KernelFault(
                f"the kernel {self.kernel} {verb} {int(outside.sum())} of {outside.size} elements "
                f"outside of its tensors ({names}), in program {_position()}"
            )

    def check_order(self) -> None:
        """Hold the result to not depending on the order in which programs run."""
        if self.has_atomics or not self.writes:
            return
        writers, written, values = (np.concatenate(parts) for parts in self._joined_writes())
        if not len(written):
            return  # every store was masked altogether
        order = np.argsort(written, kind="stable")
        writers, written, values = writers[order], written[order], values[order]
        same = written[1:] == written[:-1]
        differ = same & (writers[1:] != writers[:-1]) & (values[1:] != values[:-1])
        if differ.any():
            raise KernelFault(
                f"programs of the kernel {self.kernel} write different values to the same elements "
                f"({int(differ.sum())} times), and on a GPU nobody knows which of them is last"
            )
        for reader, read in self.reads:
            places = np.searchsorted(written, read)
            places[places == len(written)] = 0
            foreign = (written[places] == read) & (writers[places] != reader)
            if foreign.any():
                raise KernelFault(
                    f"a program of the kernel {self.kernel} reads what another program of the same "
                    f"launch writes ({int(foreign.sum())} of the {foreign.size} elements of one "
                    "load), and on a GPU nobody knows which of them comes first"
                )

    def _joined_writes(self) -> tuple[list, list, list]:
        programs = [np.full(len(addresses), program) for program, addresses, _ in self.writes]
        bits = [
            np.ascontiguousarray(values).view(f"u{values.itemsize}").astype(np.uint64)
            for _, _, values in self.writes
        ]
        return programs, [addresses for _, addresses, _ in self.writes], bits


@dataclass(frozen=True, eq=False)
class _Watch:
    """A tensor whose reads are noted: its first address, and a number for each of its elements."""

    start: int
    itemsize: int
    noted: np.ndarray
    note: Callable[[np.ndarray, np.ndarray], None]

    def see(self, addresses: np.ndarray) -> None:
        end = self.start + self.noted.size * self.itemsize
        inside = addresses[(addresses >= self.start) & (addresses < end)]
        self.note(self.noted, (inside - np.uint64(self.start)) // np.uint64(self.itemsize))


_current: _Launch | None = None
_watches: list[_Watch] = []


def _extent(tensor: Tensor) -> int:
    """Return how many elements lie between a tensor's first and last, both included."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs) if tensor.numel() else 0


def _position() -> tuple[int, ...]:
    """Return the program that the interpreter is running."""
    return tuple(interpreter.interpreter_builder.grid_idx)


def _program() -> int:
    x, y, z = _position()
    _, height, depth = interpreter.interpreter_builder.grid_dim
    return (x * height + y) * depth + z


def _selected(values: Any, pointers: Any, mask: Any) -> np.ndarray:
    """Return, of values that belong to pointers, those that the mask lets through."""
    shape = np.shape(pointers.data)
    chosen = np.broadcast_to(np.asarray(mask.data, dtype=bool), shape)
    return np.broadcast_to(np.asarray(values.data), shape)[chosen]


def _touched(pointers: Any, mask: Any, verb: str) -> np.ndarray:
    addresses = _selected(pointers, pointers, mask)
    if _current is not None:
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        _current.check(addresses, itemsize, verb)
    return addresses


def _load(original, self, ptrs, mask, other, *rest, **named):
    addresses = _touched(ptrs, mask, "reads")
    if _current is not None:
        _current.reads.append((_program(), addresses))
        for watch in _watches:
            watch.see(addresses)
    if other is None:
        other = _undefined(ptrs)
    return original(self, ptrs, mask, other, *rest, **named)


def _undefined(pointers: Any) -> Any:
    element = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(element)
    if element.is_bf16():
        fill = 0x7FC0  # held as the bits of a NaN
    else:
        fill = np.nan if np.issubdtype(dtype, np.floating) else _UNDEFINED_INTEGER
    return interpreter.TensorHandle(np.full(np.shape(pointers.data), fill, dtype=dtype), element)


def _store(original, self, ptrs, value, mask, *rest, **named):
    addresses = _touched(ptrs, mask, "writes")
    if _current is not None:
        _current.writes.append((_program(), addresses, _selected(value, ptrs, mask)))
    return original(self, ptrs, value, mask, *rest, **named)


def _compare_and_swap(original, self, ptr, *rest, **named):
    everywhere = np.ones(np.shape(ptr.data), dtype=bool)
    _touched(ptr, interpreter.TensorHandle(everywhere, triton.language.int1), "changes")
    if _current is not None:
        _current.has_atomics = True
    return original(self, ptr, *rest, **named)


def _read_modify_write(original, self, operation, ptr, value, mask, *rest, **named):
    _touched(ptr, mask, "changes")
    if _current is not None:
        _current.has_atomics = True
    return original(self, operation, ptr, value, mask, *rest, **named)


def _dot(original, self, a, b, d, input_precision, *rest, **named):
    inner = np.shape(a.data)[-1]
    if inner < _SMALLEST_INNER:
        raise KernelFault(
            f"tl.dot adds up over a side of {inner} here; for a GPU it has to be "
            f"{_SMALLEST_INNER} or more"
        )
    if a.dtype.scalar.is_bf16() or b.dtype.scalar.is_bf16():
        raise KernelFault("Triton's interpreter cannot multiply bfloat16 in tl.dot; a GPU can")
    if a.dtype.scalar.is_fp32() and input_precision.name == "TF32":
        raise KernelFault(
            "tl.dot multiplies float32 here; a GPU would round both factors to 10 bits (TF32) "
            "first, unless it is told otherwise"
        )
    return original(self, a, b, d, input_precision, *rest, **named)


def _splat(original, self, ret_ty, arg):
    # The interpreter takes what a comparison of two single numbers gives for an int32, and refuses
    # it in a mask together with a block; the compiler does neither.
    if arg.data.dtype == np.bool_:
        arg = interpreter.TensorHandle(arg.data, triton.language.int1)
    return original(self, ret_ty, arg)


def _run_grid(original, self, *args, **kwargs):
    global _current
    before, _current = _current, _Launch(self.fn.__name__)
    try:
        # Infinities and overflows are what the suites look for, in the results.
        with np.errstate(all="ignore"):
            original(self, *args, **kwargs)
        _current.check_order()
    finally:
        _current = before


def _take_arguments(original, self, args_dev, kwargs):
    args, named = original(self, args_dev, kwargs)
    if _current is not None:
        for name, value in [*zip(self.arg_names, args, strict=False), *named.items()]:
            _current.add_tensor(name, value)
    return args, named


def _watch_the_interpreter() -> None:
    builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
    for owner, name, wrapper in (
        (builder, "create_masked_load", _load),
        (builder, "create_masked_store", _store),
        (builder, "create_atomic_cas", _compare_and_swap),
        (builder, "create_atomic_rmw", _read_modify_write),
        (builder, "create_dot", _dot),
        (builder, "create_splat", _splat),
        (grid, "__call__", _run_grid),
        (grid, "_init_args_hst", _take_arguments),
    ):
        setattr(owner, name, _calling(wrapper, getattr(owner, name)))


def _calling(wrapper: Callable, original: Callable) -> Callable:
    @functools.wraps(original)
    def call(self, *args, **kwargs):
        return wrapper(original, self, *args, **kwargs)

    return call


if triton is not None:
    _watch_the_interpreter()
