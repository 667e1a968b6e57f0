"""Which labs there are, in which order, and where their files lie."""

import difflib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The order in which labs are meant to be done; later ones import earlier ones, never the reverse.
WEEKS: dict[str, tuple[str, ...]] = {
    "week1": ("attention", "rope", "gqa", "mlp", "qwen", "generate", "sampling"),
    "week2": (
        "kv_cache",
        "roofline",
        "quantization",
        "fused_kernels",
        "flash_attention",
        "flash_decoding",
        "cuda_graphs",
        "continuous_batching",
    ),
    "week3": (
        "block_manager",
        "prefix_caching",
        "scheduler",
        "paged_attention",
        "paged_kernels",
        "model_runner",
        "engine",
        "async_engine",
        "protocol",
        "server",
        "moe",
        "speculative",
        "tensor_parallel",
    ),
}
# Small labs beside the weeks, in exercises/: no lab is built on them, and they import no week.
DRILLS: dict[str, tuple[str, ...]] = {
    "basic": ("ring_buffer", "free_list", "lru_cache", "hash_chain", "priority_queue"),
    "advanced": ("first_kernel",),
}
# Every folder of labs, with its labs.
GROUPS = {**WEEKS, **DRILLS}
_TREES = ("code", "exercises", "solutions", "sessions")


@dataclass(frozen=True, order=True)
class Lab:
    """One lab or drill: the same stem in every tree.

    week: the folder that it lies in, which for a drill is that of its group, such as "basic".
    """

    week: str
    stem: str

    @property
    def name(self) -> str:
        return f"{self.week}/{self.stem}"

    @property
    def module(self) -> str:
        return f"{self.week}.{self.stem}"

    @property
    def is_drill(self) -> bool:
        return self.week in DRILLS

    @property
    def path(self) -> str:
        """The learner's file as messages and commands name it: relative to the repository."""
        return f"{'exercises' if self.is_drill else 'code'}/{self.name}.py"

    @property
    def code(self) -> Path:
        return ROOT / self.path

    @property
    def solution(self) -> Path:
        return ROOT / "solutions" / self.week / f"{self.stem}.py"

    @property
    def tests(self) -> Path:
        return ROOT / "tests" / self.week / f"test_{self.stem}.py"

    @property
    def misconceptions(self) -> Path:
        return ROOT / "tests" / self.week / "misconceptions" / f"{self.stem}.toml"

    @property
    def benchmark(self) -> Path:
        return ROOT / "benchmarks" / self.week / f"{self.stem}.py"

    @property
    def note(self) -> Path:
        return ROOT / "sessions" / self.week / f"{self.stem}.md"

    @property
    def answers(self) -> Path:
        """What the predictions of its note come to, with those of the labs beside it."""
        return self.tests.with_name("answers.toml")


def week_labs() -> list[Lab]:
    """Every lab of the weeks in teaching order: what the engine is made of."""
    return [Lab(week, stem) for week, stems in WEEKS.items() for stem in stems]


def all_labs() -> list[Lab]:
    """Every lab of the weeks, then every drill, in teaching order."""
    return week_labs() + [Lab(group, stem) for group, stems in DRILLS.items() for stem in stems]


def find_labs(text: str) -> list[Lab]:
    """Resolve what a person typed: "week1", "week1/rope", "rope", or a path: code/week1/rope.py.

    Raises ValueError that names the nearest labs when nothing fits.
    """
    words = Path(text).with_suffix("").parts
    words = tuple(word for word in words if word not in (".", "/", *_TREES))
    wanted = "/".join(words[-2:])
    labs = all_labs()
    found = [lab for lab in labs if wanted in (lab.week, lab.name, lab.stem)]
    if found:
        return found
    known = [*GROUPS, *(lab.name for lab in labs), *(lab.stem for lab in labs)]
    near = difflib.get_close_matches(wanted, known, n=3)
    suggestion = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(GROUPS)}"
    raise ValueError(f"there is no lab {text!r}; {suggestion}")
