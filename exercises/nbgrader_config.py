"""What nbgrader reads when it runs in this folder."""

import os
import sys
from pathlib import Path

from nbgrader import preprocessors
from nbgrader.preprocessors import NbGraderPreprocessor

HERE = Path(__file__).resolve().parent


class WriteStubs(NbGraderPreprocessor):
    """Give a released solution cell the lab's stub; before it, ClearSolutions emptied the cell."""

    def preprocess(self, nb, resources):
        for cell in nb.cells:
            cell.source = cell.metadata.pop("stub", cell.source)
        return nb, resources


c = get_config()  # noqa: F821
c.CourseDirectory.root = str(HERE)
c.CourseDirectory.course_id = "socratic-serving"
# nbgrader copies what lies beside a notebook into the release; only notebooks and pictures may go.
c.CourseDirectory.ignore = [
    ".ipynb_checkpoints",
    "__pycache__",
    "feedback",
    "*.pyc",
    "*.py",
    "*.md",
    "*.json",
]
c.GenerateAssignment.preprocessors = [
    preprocessors.IncludeHeaderFooter,
    preprocessors.LockCells,
    preprocessors.ClearSolutions,
    WriteStubs,
    preprocessors.ClearOutput,
    preprocessors.CheckCellMetadata,
    preprocessors.ComputeChecksums,
    preprocessors.SaveCells,
    preprocessors.ClearHiddenTests,
    preprocessors.ClearMarkScheme,
    preprocessors.ComputeChecksums,
    preprocessors.CheckCellMetadata,
]
# `nbgrader zip_collect` takes the person from the name of a file that an LMS hands out, up to the
# first underscore: ada_1234_assignsubmission_file_rope.ipynb, or a folder with such a name.
c.FileNameCollectorPlugin.named_regexp = (
    r"(?:.*/)?(?P<student_id>[^/_]+)_(?:.*[/_])?(?P<file_id>[a-z_]+\.ipynb)"
)
# Without it, whoever deletes a test cell loses its points.
c.OverwriteCells.add_missing_cells = True
# Seconds for one cell. A graded test has 20 s and a run of a suite 120 s, and few loops get past
# those; a cell may need two runs.
c.Execute.timeout = 300
# nbgrader starts alembic by its name alone; it lies beside the interpreter.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
# The kernels import `course`, wherever nbgrader is called from.
paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
