"""Hands every pytest run of this repository to the course's plugin."""

import sys
from pathlib import Path

try:
    import torch  # noqa: F401
except ImportError:
    print("The packages of the course are missing here. Run `python3 -m course learn` once, then")
    print("`source .venv/bin/activate` in this terminal.")
    sys.exit(4)

# First only until the plugin is imported, so that a copy of the repository uses its own tools; the
# plugin then moves the root to the end of sys.path.
sys.path.insert(0, str(Path(__file__).parent))

pytest_plugins = ["course.plugin"]
