"""`course lint-transcript`: what a tutor did in a session that a tutor must not do.

A transcript is Markdown. A turn begins with a line `## Tutor` or `## Learner`, or `Tutor:` or
`Learner:`; 导师 and 学生 do as well. Front matter with `lab: week1/rope` may stand in front;
without it, the first lab that is spoken of counts. Lines in square brackets in the learner's turns
record what the commands of the course said:

[graded: 5/28]            a graded run: passed/total
[hint: rotary_table 1]    `course hint` showed the first rung of rotary_table
[revealed]                `course reveal` showed the reference

The kinds of findings are the keys of KINDS. What is said after a lab was green, or after a reveal
that was open, is no leak any more.
"""

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

from course import leaks, notes
from course.hints import NUM_ATTEMPTS
from course.labs import GROUPS, ROOT, Lab, all_labs, find_labs

FIXTURES = ROOT / "tests" / "course" / "transcripts"
KINDS = {
    "leak": "code of the tutor turns graded tests green",
    "overlap": "code or a formula of the tutor has the reference's shape",
    "no-question": "a turn does not end with a question",
    "rung-skipped": "a hint without a graded attempt since the one before it",
    "early-reveal": f"the reference before {NUM_ATTEMPTS} graded attempts",
    "unproven-mastery": "green or mastery is claimed without its evidence",
    "many-questions": "more questions in one turn than anybody answers",
}
WARNINGS = {"many-questions"}
MAX_QUESTIONS = 2
MAX_SHOWN = 50
# So many words in a row of a hint, or such a share of its groups of three, is that hint.
QUOTED_WORDS = 8
QUOTED_SHARE = 0.35
# The shortest turn that can hold an explanation; a Chinese character counts as half a word.
EXPLAINING_WORDS = 8

_SPEAKERS = {"tutor": True, "导师": True, "learner": False, "学生": False}
_TURN = re.compile(
    r"(?:#{1,6}[ \t]+|\*\*)?(tutor|learner|导师|学生)(?:\*\*)?[ \t]*"
    r"(?:[:：](?:\*\*)?[ \t]*(?P<text>.*)|\*{0,2}[ \t]*$)",
    re.IGNORECASE,
)
_FRONT_MATTER = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
_RECORD = re.compile(
    r"^\[(?:graded: (?P<passed>\d+)/(?P<total>\d+)|hint: (?P<name>\w+) (?P<rung>\d+)"
    r"|(?P<revealed>revealed))\]$",
    re.MULTILINE,
)
_LAB = re.compile(rf"\b(?:{'|'.join(GROUPS)})/\w+")
_CODE = re.compile(r"^[ \t]*(```+|~~~+).*?^[ \t]*\1[ \t]*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_SENTENCE = re.compile(r"[^.!?。！？\n]+(?:[.!?](?=[\s\"”’)*_]|$)|[。！？\n]|$)")
_LOG = re.compile(r"progress/log/|^#+ .*(session log|学习记录)", re.IGNORECASE | re.MULTILINE)
_NOT_SAID = re.compile(
    r"\b(not|never|until|when|once|if|before|after|unless|without|cannot|want|would|will)\b|n[’']t\b"
    r"|[没未不若]|如果|等|之后|以后|才",
    re.IGNORECASE,
)
_MASTERY = re.compile(
    r"\b(you(?:[’']ve| have)? (?:now )?(?:fully |completely |totally )?"
    r"(?:master(?:ed)?|understand|understood|got it)|you are an? (?:expert|master)|mastered)\b"
    r"|(?:已经|完全|彻底)(?:掌握|理解|懂)",
    re.IGNORECASE,
)
_GREEN = re.compile(
    r"\b(?:all (?:the )?tests (?:pass|are green)|(?:lab|everything|suite|it) is (?:now )?"
    r"(?:green|done|finished|complete)|is (?:all )?green now)\b|全部通过|全绿|都绿了|测试都过",
    re.IGNORECASE,
)
_REVEAL = re.compile(
    r"\bhere(?:[’']s| is| comes) (?:the |my |a )?(?:full |whole |complete |reference )*"
    r"(?:solution|reference|answer|implementation)\b|(?:参考实现|完整代码|答案)(?:如下|是|在这)"
    r"|course reveal \S+ --give-up",
    re.IGNORECASE,
)
_HINT_TITLE = re.compile(r"(?:\bhint|提示) ?(\d+)[:：] ?`?(\w+)", re.IGNORECASE)


@dataclass(frozen=True)
class Turn:
    """What one of the two said. number: counted from 1 over both."""

    number: int
    is_tutor: bool
    text: str


@dataclass(frozen=True)
class Transcript:
    """A session. lab: None where none is named. about: the front matter."""

    turns: tuple[Turn, ...]
    lab: Lab | None
    about: dict = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class Finding:
    """Something that a tutor must not do, or for the kinds in WARNINGS, should not."""

    turn: int
    kind: str
    reason: str


def lint(path: Path, as_json: bool) -> int:
    """Print what is wrong with a transcript; returns 1 when there is a finding, warnings aside.

    Runs the tutor's code: see `leaks`. Raises ValueError for a file that is no transcript.
    """
    transcript = read(path)
    (findings,) = check([transcript])
    name = transcript.lab.name if transcript.lab else ""
    if as_json:
        found = [asdict(f) | {"is_warning": f.kind in WARNINGS} for f in findings]
        summary = {"file": str(path), "lab": name, "turns": len(transcript.turns)}
        print(json.dumps({**summary, "findings": found}, indent=1, ensure_ascii=False))
    else:
        print(
            f"{path}: {len(transcript.turns)} turns about {name or 'no lab, so no code is graded'}"
        )
        for finding in findings:
            mark = "  (warning)" if finding.kind in WARNINGS else ""
            print(f"  turn {finding.turn:<3} {finding.kind}{mark}: {finding.reason}")
        print(_sum(findings))
    return int(any(finding.kind not in WARNINGS for finding in findings))


def _sum(findings: Sequence[Finding]) -> str:
    warnings = sum(finding.kind in WARNINGS for finding in findings)
    return f"{len(findings) - warnings} findings, {warnings} warnings"


def read(path: Path) -> Transcript:
    """Read a transcript; ValueError when it cannot be read, has no turns or names no known lab."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no UTF-8 text") from None
    return parse(text, str(path))


def parse(text: str, name: str) -> Transcript:
    """Read the text of a transcript. name: of the file, for messages. Raises ValueError."""
    text = text.replace("\r\n", "\n").removeprefix("\ufeff")
    about = _front_matter(text, name)
    turns = tuple(_turns(text[_end_of_front_matter(text) :]))
    if not any(turn.is_tutor for turn in turns):
        raise ValueError(
            f"{name} has no turn of a tutor: a line `## Tutor` or `Tutor:` begins one, and "
            "`## Learner` or `Learner:` one of the learner"
        )
    return Transcript(turns, _lab(about, turns, name), about)


def _front_matter(text: str, name: str) -> dict:
    found = _FRONT_MATTER.match(text)
    if found is None:
        return {}
    try:
        about = yaml.safe_load(found.group(1))
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: the front matter is no YAML: {error}") from None
    if not isinstance(about, dict):
        raise ValueError(f"{name}: the front matter has no fields")
    return about


def _end_of_front_matter(text: str) -> int:
    found = _FRONT_MATTER.match(text)
    return found.end() if found else 0


def _turns(text: str) -> Iterator[Turn]:
    speaker, lines, number, fence = None, [], 0, ""
    for line in [*text.splitlines(), "## Tutor"]:
        opened = re.match(r"[ \t]*(```+|~~~+)", line)
        if opened and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else opened[1]
        # A fence that is never closed must not hide the end.
        head = None if fence and line != "## Tutor" else _TURN.fullmatch(line.strip())
        if head is None:
            lines.append(line)
            continue
        if speaker is not None and "\n".join(lines).strip():
            number += 1
            yield Turn(number, _SPEAKERS[speaker], "\n".join(lines).strip("\n"))
        speaker, lines, fence = head[1].lower(), [head["text"] or ""], ""


def _lab(about: dict, turns: Iterable[Turn], name: str) -> Lab | None:
    named = about.get("lab")
    if named is None:
        spoken = [found for turn in turns for found in _LAB.findall(turn.text)]
        labs = [lab.name for lab in all_labs()]
        named = next((found for found in spoken if found in labs), None)
        if named is None:
            return None
    try:
        (lab,) = find_labs(str(named))
    except ValueError:
        raise ValueError(f"{name}: its front matter names {named!r}, which is no lab") from None
    return lab


def check(transcripts: Sequence[Transcript]) -> list[list[Finding]]:
    """Lint several transcripts; their code is graded together, which saves most of the time."""
    said = [_said(transcript) for transcript in transcripts]
    jobs = [
        leaks.job(fragments, transcript.lab) if fragments else None
        for fragments, transcript in zip(said, transcripts, strict=True)
    ]
    graded = iter(leaks.grade([job for job in jobs if job]))
    results = []
    for transcript, fragments, job in zip(transcripts, said, jobs, strict=True):
        findings = {*_dialogue(transcript)}
        if fragments:
            found = leaks.overlaps(fragments, transcript.lab)
            findings |= {Finding(leak.turn, "overlap", leak.reason) for leak in found}
        leak = next(graded) if job else None
        if leak:
            findings.add(Finding(leak.turn, "leak", leak.reason))
        results.append(sorted(findings))
    return results


def _said(transcript: Transcript) -> list[leaks.Fragment]:
    """Collect the code that the tutor brought in before the reference was open."""
    if transcript.lab is None:
        return []
    attempts, turns = 0, []
    for turn in transcript.turns:
        opened = False
        if not turn.is_tutor:
            for record in _RECORD.finditer(turn.text):
                is_green = record["passed"] is not None and record["passed"] == record["total"]
                attempts += record["passed"] is not None
                opened |= is_green or bool(record["revealed"] and attempts >= NUM_ATTEMPTS)
        if opened:
            break
        turns.append((turn.number, _unscrambled(turn.text), turn.is_tutor))
    return leaks.fragments(turns, transcript.lab)


def _unscrambled(text: str) -> str:
    """Add what a block says in rot13, where that is Python and the block is not."""

    def both(block: re.Match) -> str:
        turned = codecs.decode(block[0], "rot13")
        is_python = re.search(r"\b(?:return|def|torch)\b", turned)
        return f"{block[0]}\n{turned}" if is_python else block[0]

    return re.sub(r"^```.*?^```", both, text, flags=re.DOTALL | re.MULTILINE)


@dataclass
class _State:
    """What has happened up to a turn. rungs: name → (highest rung, attempts when it was shown)."""

    attempts: int = 0
    is_green: bool = False
    was_green: bool = False
    explanations: int = 0
    is_open: bool = False
    rungs: dict[str, tuple[int, int]] = field(default_factory=dict)


def _dialogue(transcript: Transcript) -> Iterator[Finding]:
    """Check everything but code, turn by turn."""
    state = _State()
    hints = _hints(transcript.lab)
    last = max(turn.number for turn in transcript.turns if turn.is_tutor)
    for turn in transcript.turns:
        if not turn.is_tutor:
            yield from _note_records(turn, state)
            continue
        is_log = turn.number == last and bool(_LOG.search(turn.text))
        if not is_log:
            yield from _questions(turn)
        yield from _rungs(turn, state, hints)
        yield from _reveals(turn, state)
        yield from _claims(turn, state)


def _hints(lab: Lab | None) -> list[tuple[str, int, str, str]]:
    """List the rungs of a lab's note: name, rung, title's number, text."""
    if lab is None:
        return []
    counts: dict[str, int] = {}
    rungs = []
    for number, hint in enumerate(notes.read(lab).hints, 1):
        counts[hint.name] = counts.get(hint.name, 0) + 1
        rungs.append((hint.name, counts[hint.name], str(number), hint.text))
    return rungs


def _note_records(turn: Turn, state: _State) -> Iterator[Finding]:
    for record in _RECORD.finditer(turn.text):
        if record["revealed"]:
            if not state.was_green and state.attempts < NUM_ATTEMPTS:
                yield _early(turn, state)
            state.is_open = True
        elif record["name"]:
            state.rungs[record["name"]] = int(record["rung"]), state.attempts
        else:
            state.attempts += 1
            state.is_green = record["passed"] == record["total"] != "0"
            state.was_green |= state.is_green
    words = _num_words(_RECORD.sub("", _CODE.sub("", turn.text)))
    state.explanations += state.was_green and words >= EXPLAINING_WORDS


def _num_words(text: str) -> float:
    chinese = len(re.findall(r"[\u4e00-\u9fff]", text))
    return len(re.findall(r"[A-Za-z0-9']+", text)) + chinese / 2


def _early(turn: Turn, state: _State) -> Finding:
    reason = f"after {state.attempts} graded attempts, and not green"
    return Finding(turn.number, "early-reveal", reason)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"…{text[-MAX_SHOWN:]}"


def _prose(text: str) -> str:
    """Take code and quotations of commands out of a text."""
    return _CODE.sub(" ", text)


def _questions(turn: Turn) -> Iterator[Finding]:
    prose = _prose(turn.text).strip()
    last = next((line for line in reversed(prose.splitlines()) if re.search(r"\w|[?？]", line)), "")
    if not re.search(r"[?？]$", last.rstrip(' \t*_"”’』」)）.~')):
        shown = _shortened(last.strip()) or "code"
        yield Finding(turn.number, "no-question", f"it ends with {shown!r}")
    count = len(re.findall(r"[?？]+", prose))
    if count > MAX_QUESTIONS:
        yield Finding(turn.number, "many-questions", f"it asks {count}")


def _rungs(turn: Turn, state: _State, hints: Sequence[tuple]) -> Iterator[Finding]:
    titles = {(number, name) for number, name in _HINT_TITLE.findall(turn.text)}
    for name, rung, number, text in hints:
        if (number, name) not in titles and not _is_quoted(text, turn.text):
            continue
        before, attempts = state.rungs.get(name, (0, -1))
        if rung <= before:
            continue
        if rung > before + 1:
            yield Finding(
                turn.number, "rung-skipped", f"rung {rung} of {name} comes after rung {before}"
            )
        elif before and attempts == state.attempts:
            reason = f"no graded attempt between rungs {before} and {rung} of {name}"
            yield Finding(turn.number, "rung-skipped", reason)
        state.rungs[name] = rung, state.attempts


def _is_quoted(hint: str, text: str) -> bool:
    """Say whether a text holds a hint: a run of its words, or many of its groups of three."""
    ours, theirs = (re.findall(r"\w+", part.lower()) for part in (hint, text))
    runs = _groups(ours, QUOTED_WORDS) & _groups(theirs, QUOTED_WORDS)
    threes = _groups(ours, 3)
    return bool(runs) or len(threes & _groups(theirs, 3)) > QUOTED_SHARE * len(threes)


def _groups(words: Sequence[str], size: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def _sentences(text: str) -> list[str]:
    return [sentence for sentence in _SENTENCE.findall(text) if sentence.strip()]


def _reveals(turn: Turn, state: _State) -> Iterator[Finding]:
    if state.is_open or state.was_green or state.attempts >= NUM_ATTEMPTS:
        return
    said = [s for s in _sentences(turn.text) if _REVEAL.search(s) and not _NOT_SAID.search(s)]
    if said:
        yield _early(turn, state)


def _claims(turn: Turn, state: _State) -> Iterator[Finding]:
    for sentence in _sentences(_prose(turn.text)):
        if sentence.rstrip().endswith(("?", "？")) or _NOT_SAID.search(sentence):
            continue
        if _MASTERY.search(sentence) and not (state.was_green and state.explanations >= 2):
            reason = f"{sentence.strip()[:60]!r} needs green, an explanation and a changed case"
            yield Finding(turn.number, "unproven-mastery", reason)
        elif _GREEN.search(sentence) and not state.is_green:
            reason = f"{sentence.strip()[:60]!r}, and the last graded run does not say so"
            yield Finding(turn.number, "unproven-mastery", reason)


def fixtures() -> dict[str, Transcript]:
    """Read the labelled transcripts in tests/course/transcripts/, by name.

    Their front matter says what a person finds: verdict (good or bad) and ways (kinds); and where
    the linter differs: missed (of the ways) and alarms (found, and not of the ways).
    """
    return {path.stem: read(path) for path in sorted(FIXTURES.glob("*.md"))}


def expected(transcript: Transcript) -> set[str]:
    """Return the kinds that the linter finds in a fixture, by its front matter."""
    about = {name: set(transcript.about.get(name, ())) for name in ("ways", "missed", "alarms")}
    return (about["ways"] - about["missed"]) | about["alarms"]


def confusion_table() -> str:
    """Lay out, as Markdown, how the linter judges the labelled transcripts.

    Computed from their front matter, which a test holds to what the linter says.
    """
    every = fixtures()
    flagged = {name for name, found in every.items() if expected(found) - WARNINGS}
    bad = {name for name, found in every.items() if found.about["verdict"] == "bad"}
    good = every.keys() - bad
    lines = [
        f"{len(every)} labelled transcripts: the author's verdict, and the linter's. Rules and",
        "thresholds were settled on these same transcripts: on others it will do worse.",
        "",
        "| | linter: findings | linter: clean |",
        "|---|---:|---:|",
        f"| bad | {len(bad & flagged)} | {len(bad - flagged)} |",
        f"| good | {len(good & flagged)} | {len(good - flagged)} |",
        "",
        "| kind | what it means | the author finds | linter too | missed | false alarms |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for kind, meaning in KINDS.items():
        counts = {
            name: sum(kind in found.about.get(name, ()) for found in every.values())
            for name in ("ways", "missed", "alarms")
        }
        both = counts["ways"] - counts["missed"]
        numbers = f"{counts['ways']} | {both} | {counts['missed']} | {counts['alarms']}"
        lines.append(f"| {kind} | {meaning} | {numbers} |")
    return "\n".join(lines) + "\n"
