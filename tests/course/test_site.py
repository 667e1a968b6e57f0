"""The built site: strict, whole, closed to the outside, and true to the files that it shows."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from course import mutants, notes, site, stubs
from course.labs import GROUPS, ROOT, WEEKS, all_labs

pytestmark = pytest.mark.xdist_group("site")  # one build
LABS = pytest.mark.parametrize("lab", all_labs(), ids=lambda lab: lab.name)
COPIED = ("README.md", "mkdocs.yml", "sessions", "course", "solutions", "tests")
NUM_WEEKS = 4
VOID = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}


class Page(HTMLParser):
    """What the tests ask of one built page: its parts as (tag, attributes, path of tags above)."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = path
        self.html = path.read_text(encoding="utf-8")
        self.parts: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self._open: list[str] = []
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts.append((tag, dict(attrs), tuple(self._open)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def values(self, name: str, *tags: str) -> list[str]:
        """List an attribute's values, of some tags or of all."""
        found = [a.get(name) for tag, a, _ in self.parts if not tags or tag in tags]
        return [value for value in found if value is not None]

    def ids(self) -> set[str]:
        """List what an anchor may point to."""
        return {*self.values("id"), *self.values("name", "a")}

    def article(self) -> str:
        """Return the HTML of the page's own text."""
        return self.html.split("<article", 1)[1].split("</article>")[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A copy of what the site is made of, in which a learner has begun to write."""
    root = tmp_path_factory.mktemp("site")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, root / name)
    for lab in all_labs():
        file = root / lab.path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("what the learner wrote", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def built(root):
    """The run of `course site` in the copy."""
    return build(root)


@pytest.fixture(scope="module")
def pages(root, built):
    """Every built page, by its path in the site."""
    assert built.returncode == 0, built.stdout
    folder = root / "site"
    return {path.relative_to(folder).as_posix(): Page(path) for path in folder.rglob("*.html")}


def build(root: Path) -> subprocess.CompletedProcess:
    """Run what `course site` runs; its output is text, both streams in stdout."""
    return subprocess.run(
        [sys.executable, "-c", "import sys; from course import site; sys.exit(site.build(False))"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )


def test_it_builds_without_a_warning(built):
    assert built.returncode == 0, built.stdout
    assert "WARNING" not in built.stdout and "mkdocs 2" not in built.stdout.lower()
    assert built.stdout.rstrip().endswith("makes the search work, too")


def test_every_page_is_in_the_menu(root, pages):
    sources = {p.relative_to(ROOT / "sessions") for p in (ROOT / "sessions").rglob("*.md")}
    expected = {
        (p.with_name("index.html") if p.name == "README.md" else p.with_suffix(".html")).as_posix()
        for p in sources
    }
    assert expected == set(pages) - {"404.html"}
    menu = {
        (page.path.parent / link).resolve()
        for page in [pages["index.html"]]
        for link in page.values("href", "a")
        if not urlsplit(link).scheme and not link.startswith("#")
    }
    assert {(root / "site" / name).resolve() for name in expected} <= menu


def test_no_dead_link_and_no_dead_anchor(root, pages):
    folder, dead, checked = root / "site", [], 0
    for name, page in pages.items():
        for link in page.values("href") + page.values("src"):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            checked += 1
            target = (folder if parts.path.startswith("/") else page.path.parent) / unquote(
                parts.path.lstrip("/") if parts.path else page.path.name
            )
            if target.is_dir():
                target /= "index.html"
            if not target.is_file():
                dead.append(f"{name}: {link}")
            elif parts.fragment and target.suffix == ".html":
                other = pages[target.resolve().relative_to(folder.resolve()).as_posix()]
                # The theme's own link to the top of a page has no id of that name.
                if unquote(parts.fragment) not in other.ids() | {"__toc"}:
                    dead.append(f"{name}: {link}")
    assert not dead
    assert checked > 500


def test_nothing_is_loaded_from_elsewhere(root, pages):
    loads = []
    for name, page in pages.items():
        loads += [(name, value) for value in page.values("src") + page.values("srcset")]
        loads += [(name, value) for value in page.values("href", "link", "use")]
        loads += [(name, value) for value in page.values("action") + page.values("data")]
    for style in (root / "site").rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        found = re.findall(r"url\(\s*[\"']?([^)\"']+)", text)
        found += re.findall(r"@import\s+[\"']([^\"']+)", text)
        loads += [(style.name, value) for value in found]
    outside = [load for load in loads if re.match(r"(https?:)?//", load[1])]
    assert not outside and len(loads) > 100


def test_scripts_have_no_reason_to_load_from_elsewhere(root, pages):
    """The theme can load three things when a page asks for them; no page does."""
    addresses = set()
    for script in (root / "site").rglob("*.js"):
        if "lunr" in script.parts:
            continue  # word cutters of other languages, full of addresses in comments
        text = re.sub(r"/\*.*?\*/", "", script.read_text(encoding="utf-8"), flags=re.DOTALL)
        addresses |= set(re.findall(r"https?://([^/\"'`\s)]+)", text))
    # unpkg.com has mermaid for diagrams, and a polyfill for browsers without ResizeObserver; two
    # count the stars of a repository; the search points to bit.ly in a message to programmers.
    assert addresses == {"unpkg.com", "api.github.com", "${e}", "bit.ly"}
    for page in pages.values():
        assert "mermaid" not in page.html and 'data-md-component="source"' not in page.html


def test_search_knows_every_page_and_no_hint_or_answer(root, pages):
    index = json.loads((root / "site/search/search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert found == set(pages) - {"404.html"}
    text = html.unescape("\n".join(f"{entry['title']}\n{entry['text']}" for entry in index["docs"]))
    for lab in all_labs():
        answers = [prediction.answer for prediction in notes.read(lab).predictions]
        assert not [answer for answer in answers if answer in text]
        for hint in notes.read(lab).hints:
            assert f"Hint {hint.title}" not in text
            assert max(re.split(r"[`*\"\n]", hint.text), key=len) not in text


def test_light_and_dark(pages):
    schemes = pages["index.html"].values("data-md-color-scheme", "input")
    assert schemes == ["default", "slate"]


@LABS
def test_hints_are_formatted_and_closed(lab, pages):
    note = lab.note.read_text(encoding="utf-8")
    page = pages[f"{lab.name}.html"]
    hints = [a for tag, a, _ in page.parts if tag == "details"]
    assert len(hints) == note.count("<details>") >= 3
    assert all(a["class"] == "hint" and "open" not in a for a in hints)
    assert "markdown=" not in page.article()
    inside = [tag for tag, _, above in page.parts if "details" in above]
    assert inside.count("p") >= len(hints) and inside.count("summary") == len(hints)
    texts = re.findall(r"</summary>(.*?)</details>", note, re.DOTALL)
    assert inside.count("code") == sum(text.count("`") // 2 for text in texts)


@pytest.mark.parametrize("name", [lab.name for lab in all_labs()] + [f"{w}/README" for w in GROUPS])
def test_lists_keep_the_numbers_of_their_source(name, pages):
    source = (ROOT / "sessions" / f"{name}.md").read_text(encoding="utf-8")
    source = re.sub(r"^---\n.*?\n---\n", "", source, count=1, flags=re.DOTALL)
    written = [int(n) for n in re.findall(r"^(\d+)\. ", source, re.MULTILINE)]
    shown: list[int] = []
    for tag, attributes, above in pages[f"{name.replace('README', 'index')}.html"].parts:
        if "article" in above and tag == "ol":
            following = int(attributes.get("start") or 1)
        if "article" in above and tag == "li" and above[-1] == "ol":
            shown.append(following)
            following += 1
    assert shown == written


@LABS
def test_contracts_are_the_stubs_whatever_the_learner_wrote(lab, pages):
    page = pages[f"{lab.week}/contracts.html"]
    assert lab.stem in page.ids()
    text = re.sub(r"<[^>]+>", "", page.article())
    for line in stubs.make_stub(lab).splitlines():
        shown = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert shown.replace('"', "&quot;") in text or shown in text, line


def test_the_path_tells_built_weeks_from_others(pages):
    parts = re.split(r"<h2", pages["path.html"].article())[1:]
    assert len(parts) == NUM_WEEKS
    for number, part in enumerate(parts, 1):
        assert f"Week {number}" in part
        built = f"week{number}" in WEEKS
        assert built == (f'href="week{number}/index.html"' in part)
        assert built != ("Not built yet." in part)


def test_the_menu_lists_labs_in_their_order(pages):
    links = pages["index.html"].values("href", "a")
    for week, stems in GROUPS.items():
        order = [links.index(f"{week}/{stem}.html") for stem in stems]
        assert order == sorted(order)


def test_the_home_page_shows_the_readme_s_screen(pages):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    screen = readme.split("[start:first-minute] -->\n```\n")[1].split("```")[0]
    assert screen.strip() in re.sub(r"<[^>]+>", "", pages["index.html"].article())


def test_the_benchmarks_page_shows_the_medals(pages):
    text = re.sub(r"<[^>]+>", "", pages["resources/benchmarks.html"].article())
    labs = [lab for lab in all_labs() if mutants.medal(lab)]
    assert labs
    for lab in labs:
        assert f"course bench {lab.name}" in text
        for name, threshold in mutants.medal(lab).items():
            assert f"{name} = {threshold}" in text


def test_grader_quality_is_the_report(pages):
    report = (ROOT / "tests/QUALITY.md").read_text(encoding="utf-8")
    title = report.splitlines()[0].removeprefix("# ")
    assert title in pages["resources/quality.html"].article()
    tables = [tag for tag, _, _ in pages["resources/quality.html"].parts if tag == "table"]
    assert len(tables) == len(re.findall(r"^\|-", report, re.MULTILINE))


def test_the_map_of_vllm_names_what_we_have():
    text = (ROOT / "sessions/resources/vllm.md").read_text(encoding="utf-8")
    ours = text.split("## What comes later")[0]
    defined = "\n".join(lab.solution.read_text(encoding="utf-8") for lab in all_labs())
    for row in re.findall(r"^\| (`.+?) \|", ours, re.MULTILINE):
        for name in re.findall(r"`([\w.]+)`", row):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", defined), name
    for lab in all_labs():
        assert f"(../{lab.name}.md)" in ours


def test_every_figure_has_words(pages):
    shown = set()
    for page in pages.values():
        for tag, attributes, _ in page.parts:
            if tag == "img" and "figures/" in attributes["src"]:
                assert len(attributes["alt"]) > 40
                shown.add(Path(attributes["src"]).stem)
    assert shown == {path.stem for path in (ROOT / "sessions/figures").glob("*.svg")}


def test_figures_are_what_the_code_draws(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "course.figures", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "missing from font" not in done.stderr
    committed = {path.name: path for path in (ROOT / "sessions/figures").glob("*.svg")}
    drawn = {path.name: path for path in tmp_path.glob("*.svg")}
    assert set(committed) == set(drawn)
    number = re.compile(r"-?\d+\.\d+")
    for name, path in drawn.items():
        old, new = (file.read_text(encoding="utf-8") for file in (committed[name], path))
        assert number.sub("#", old) == number.sub("#", new), f"{name}: python -m course.figures"
        # Processors differ in the last digits; what moves by a hundredth of a point is no drawing.
        pairs = zip(number.findall(old), number.findall(new), strict=True)
        assert all(abs(float(a) - float(b)) < 0.01 for a, b in pairs), name


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[gone](gone.md)", "gone.md"),
        ("[gone](path.md#gone)", "gone"),
        ('--8<-- "gone.py"', "gone.py"),
    ],
)
def test_a_dead_link_anchor_or_snippet_fails(root, pages, text, complaint):
    page = root / "sessions/setup.md"
    before = page.read_text(encoding="utf-8")
    page.write_text(f"{before}\n{text}\n", encoding="utf-8")
    try:
        result = build(root)
    finally:
        page.write_text(before, encoding="utf-8")
    assert result.returncode == 1 and complaint in result.stdout


def test_without_mkdocs_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(site, "_NEEDED", ("mkdocs_that_nobody_has",))
    assert site.build(serve=False) == 1
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "pip install -r requirements.txt" in said
