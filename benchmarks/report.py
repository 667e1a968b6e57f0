"""Write the tables of benchmarks/README.md from the files in benchmarks/results/.

python -m benchmarks.report
"""

import json
from pathlib import Path

from course import files

HERE = Path(__file__).parent
PAGE, RESULTS = HERE / "README.md", HERE / "results"
BEGIN = "<!-- Written by `python -m benchmarks.report`. -->"
END = "<!-- End of what was written. -->"


def page() -> str:
    """Return the page with tables of what the result files hold now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n\n{END}{rest.partition(END)[2]}"


def tables() -> str:
    """Lay out the result files as Markdown: medals first, then the others."""
    found = sorted(RESULTS.glob("*.json"))
    reports = {file: json.loads(file.read_text(encoding="utf-8")) for file in found}
    medals = [_medal_row(file, report) for file, report in reports.items() if "ratio" in report]
    others = [_row(file, report) for file, report in reports.items() if "ratio" not in report]
    parts = []
    if medals:
        head = "| lab | ratio | rates | share of the limit | machine | commit | file |"
        parts.append("\n".join([head, "|---|---|---|---:|---|---|---|", *medals]))
    if others:
        head = "| command | what came out | machine | date | commit | file |"
        parts.append("\n".join([head, "|---|---|---|---|---|---|", *others]))
    return "\n\n".join(parts)


def _medal_row(file: Path, report: dict) -> str:
    machine = report["machine"]
    rates = "<br>".join(
        f"{side}: {rate:,.1f} {report['unit']}" for side, rate in report["rates"].items()
    )
    cells = (
        f"`course bench {report['lab']}`",
        f"{report['ratio']:.2f} × {report['against']}",
        rates,
        f"{report['share_of_limit']:.0%}",
        f"{machine['name']}, {machine['cores']} cores, torch {machine['torch']}",
        machine["commit"],
        _link(file),
    )
    return f"| {' | '.join(cells)} |"


def _row(file: Path, report: dict) -> str:
    machine = report["machine"]
    kept = ("command", "date", "commit", "machine")
    seen = ", ".join(f"{key}: {_shown(value)}" for key, value in report.items() if key not in kept)
    device = f"{machine['device']}, {machine['cores']} cores"
    cells = (f"`{report['command']}`", seen, device, report["date"], report["commit"], _link(file))
    return f"| {' | '.join(cells)} |"


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key} {_shown(one)}" for key, one in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _link(file: Path) -> str:
    return f"[{file.name}](results/{file.name})"


def main() -> None:
    files.replace(PAGE, page())
    print("benchmarks/README.md is written")


if __name__ == "__main__":
    main()
