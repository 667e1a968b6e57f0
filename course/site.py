"""`course site`: the book in sessions/ as a web site.

Pages take code in through snippets. Stubs are made anew for that, into .course/site/: in a clone,
code/ holds what the learner wrote.
"""

import importlib.util
import os
import subprocess
import sys

from course import files, layers, stubs
from course.labs import GROUPS, ROOT, Lab

GENERATED = layers.STATE / "site"
_NEEDED = ("mkdocs", "material", "pymdownx")


def build(serve: bool) -> int:
    """Build the site into site/, or serve it on localhost and build again when a page changes.

    Returns 1 after one sentence when a package is missing, and after mkdocs' own when there is a
    warning.
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(f"course: {', '.join(missing)} cannot be imported; pip install -r requirements.txt")
        return 1
    write_generated()
    # The variable silences a banner about mkdocs 2, to which this does not go.
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "serve" if serve else "build", "--strict"],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    if done.returncode:
        return 1
    if not serve:
        print("site/index.html is written; `course site --serve` makes the search work, too")
    return 0


def write_generated() -> None:
    """Write what pages take in and no committed file holds: the contracts of the labs."""
    for week, stems in GROUPS.items():
        links = " · ".join(f"[{stem}](#{stem})" for stem in stems)
        parts = [f"{links}\n", *(_contract(Lab(week, stem)) for stem in stems)]
        files.replace(GENERATED / "contracts" / f"{week}.md", "\n".join(parts))


def _contract(lab: Lab) -> str:
    fence = f'```python title="{lab.path}"\n{stubs.make_stub(lab)}```'
    return f"## {lab.stem}\n\nIts note: [{lab.stem}.md]({lab.stem}.md).\n\n{fence}\n"
