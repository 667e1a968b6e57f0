"""Which labs there are, in which order, and where their files lie."""

import difflib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The order in which labs are meant to be done; later ones import earlier ones, never the reverse.
WEEKS: dict[str, tuple[str, ...]] = {
    "week1": ("attention", "rope", "gqa", "mlp", "qwen", "generate", "sampling"),
}


@dataclass(frozen=True, order=True)
class Lab:
    """One lab: the same stem in every tree."""

    week: str
    stem: str

    @property
    def name(self) -> str:
        return f"{self.week}/{self.stem}"

    @property
    def module(self) -> str:
        return f"{self.week}.{self.stem}"

    @property
    def code(self) -> Path:
        return ROOT / "code" / self.week / f"{self.stem}.py"

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
    def note(self) -> Path:
        return ROOT / "sessions" / self.week / f"{self.stem}.md"


def all_labs() -> list[Lab]:
    """Every lab of the course in teaching order."""
    return [Lab(week, stem) for week, stems in WEEKS.items() for stem in stems]


def find_labs(text: str) -> list[Lab]:
    """Resolve what a person typed: "week1", "week1/rope", "rope", or a path: code/week1/rope.py.

    Raises ValueError that names the nearest labs when nothing fits.
    """
    words = Path(text).with_suffix("").parts
    words = tuple(word for word in words if word not in (".", "/", "code", "solutions", "sessions"))
    wanted = "/".join(words[-2:])
    labs = all_labs()
    found = [lab for lab in labs if wanted in (lab.week, lab.name, lab.stem)]
    if found:
        return found
    known = [*WEEKS, *(lab.name for lab in labs), *(lab.stem for lab in labs)]
    near = difflib.get_close_matches(wanted, known, n=3)
    suggestion = f"did you mean {' or '.join(near)}?" if near else f"weeks: {', '.join(WEEKS)}"
    raise ValueError(f"there is no lab {text!r}; {suggestion}")
