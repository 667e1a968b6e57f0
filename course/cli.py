"""The words of the `course` command. Each imports what it needs only when it is called."""

import argparse
import json
import os
import sys

from course import bootstrap
from course.labs import WEEKS, Lab, find_labs

ENGINES = ("hybrid", "solutions", "code")
FIRST_PROMPT = "What is the capital of France? Answer in one sentence."


def run(argv: list[str]) -> int:
    """Run `course` with the given words; returns the exit status: 0 fine, 1 no, 2 wrong usage."""
    options = _parser().parse_args(argv)
    if options.run is None:
        _parser().print_help()
        return 0
    bootstrap.ensure_environment(argv)
    try:
        return options.run(options) or 0
    except ValueError as error:
        print(f"course: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncourse: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="course",
        description="Socratic Serving: write a language-model serving engine, lab by lab.",
        epilog="Start with: python3 -m course learn",
    )
    parser.set_defaults(run=None)
    words = parser.add_subparsers(title="words", metavar="WORD")

    def word(name: str, function, text: str, example: str) -> argparse.ArgumentParser:
        added = words.add_parser(
            name, help=text, description=text, epilog=f"Example: course {name} {example}".rstrip()
        )
        added.set_defaults(run=function)
        return added

    word("learn", _learn, "set everything up, hear the model talk, see what to do next", "")
    test = word("test", _test, "prove that references, stubs, graders and tools agree", "")
    test.add_argument("lab", nargs="*", help=argparse.SUPPRESS)
    status = word("status", _status, "show which labs are green", "--json")
    status.add_argument("--json", action="store_true", help="print one JSON object")
    chat = word(
        "chat", _chat, "talk to the model through your labs", '--prompt "Why is the sky blue?"'
    )
    chat.add_argument("--prompt", help="answer this and stop, instead of asking for input")
    _add_generation(chat)
    generate = word(
        "generate", _generate, "continue a text", '--prompt "Once upon a time" --max-tokens 40'
    )
    generate.add_argument(
        "--prompt",
        required=True,
        action="append",
        help="the text to continue; give it several times to continue several texts",
    )
    generate.add_argument("--json", action="store_true", help="print one JSON object")
    _add_generation(generate)
    serve = word("serve", _serve, "serve the model over HTTP, as OpenAI does", "--port 8000")
    _add_model(serve)
    _add_serving(serve)
    trace = word("trace", _trace, "say what happened in a server's trace", "summary steps.jsonl")
    trace.add_argument("action", choices=("summary",))
    trace.add_argument("file", help="what `course serve --trace FILE` wrote")
    predict = word(
        "predict", _predict, "answer a lab's questions before you build it", "week1/rope"
    )
    predict.add_argument("lab", help="such as week1/rope")
    predict.add_argument(
        "--answer",
        action="append",
        default=[],
        metavar="ID=NUMBER:CONFIDENCE",
        help="answer without being asked, with a confidence from 1 to 5",
    )
    hint = word("hint", _hint, "show the next hint of a lab, and only that", "week1/rope")
    hint.add_argument("lab", help="such as week1/rope")
    hint.add_argument("name", nargs="?", help="the function or class that you are stuck on")
    reveal = word("reveal", _reveal, "compare your lab with the reference", "week1/rope")
    reveal.add_argument("lab", help="such as week1/rope")
    reveal.add_argument(
        "--give-up",
        action="store_true",
        help="see it before the lab is green, after three graded attempts",
    )
    watch = word("watch", _watch, "grade the current lab again whenever you save it", "week1/rope")
    watch.add_argument("lab", nargs="?", help="such as week1/rope; nothing means the next open lab")
    watch.add_argument("--poll", action="store_true", help="look at the files twice a second")
    bench = word("bench", _bench, "measure a lab's speed, for its medal", "week1/generate")
    bench.add_argument("lab", help="such as week1/generate")
    bench.add_argument("--runs", type=int, default=5, metavar="N", help="the median of N runs")
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    kernels = word(
        "kernels",
        _kernels,
        "compile Triton kernels for GPUs that are not here",
        "week2/flash_attention",
    )
    kernels.add_argument("labs", nargs="*", help="such as week2; nothing means every lab with some")
    of_whom = kernels.add_mutually_exclusive_group()
    of_whom.add_argument(
        "--solutions", action="store_true", help="those of the reference, not yours"
    )
    of_whom.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="LAB",
        help="take week2, or week2/flash_decoding, from the reference; yours call it",
    )
    lint = word(
        "lint-transcript",
        _lint_transcript,
        "look for given-away answers in a tutor's session",
        "session.md",
    )
    lint.add_argument("file", help="Markdown with ## Tutor and ## Learner turns")
    lint.add_argument("--json", action="store_true", help="print one JSON object")
    notebooks = word("notebooks", _notebooks, "write nbgrader's source notebooks", "week1/rope")
    notebooks.add_argument("labs", nargs="*", help="week1, week1/rope; nothing means every lab")
    notebooks.add_argument("--out", metavar="DIR", help="where; exercises/source by default")
    site = word("site", _site, "build the book as a site in site/", "--serve")
    site.add_argument("--serve", action="store_true", help="show it, and follow what is edited")
    model = word("model", _model, "make the default model ready, or check it", "fetch")
    model.add_argument("action", choices=("fetch", "check"))
    stubs = word("stubs", _stubs, "write the stubs from solutions/", "--check")
    stubs.add_argument("--check", action="store_true", help="only say what is out of date")
    reset = word("reset", _reset, "put a lab's stub back and keep your file", "week1/rope")
    reset.add_argument("lab", help="such as week1/rope")
    mutants = word("mutants", _mutants, "let the suites hunt wrong solutions", "week1/rope")
    mutants.add_argument("labs", nargs="*", help="week1, week1/rope; nothing means every lab")
    mutants.add_argument("--listed", action="store_true", help="only the misconceptions")
    mutants.add_argument(
        "--report", action="store_true", help="write tests/QUALITY.md from what was measured"
    )
    mutants.add_argument(
        "--diagnose", action="store_true", help="see whether each misconception is recognised"
    )
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="a checkpoint folder, or a name on the hub")
    parser.add_argument("--engine", choices=ENGINES, default="hybrid", help="whose labs are used")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--quantization", choices=("int8", "int4"), help="round the weights of the layers"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where the model runs; a GPU if there is one"
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="spread the model over N processes, each with a GPU if there is one",
    )
    parser.add_argument(
        "--speculative",
        choices=("ngram", "draft"),
        help="guess tokens ahead, from the text so far or by a smaller model",
    )
    parser.add_argument(
        "--draft-model", metavar="DIR", help="the smaller model: a folder, or a name on the hub"
    )
    parser.add_argument("--num-drafts", type=int, default=4, metavar="N", help="at most, in a step")


def _add_serving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="who may connect: this machine only")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one")
    parser.add_argument("--name", help="what clients call the model; its folder's name")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("COURSE_API_KEY"),
        help="what clients have to send; better in the environment, as COURSE_API_KEY",
    )
    parser.add_argument("--kv-gb", type=float, metavar="GB", help="memory of the KV pool")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens of one request")
    parser.add_argument("--max-num-seqs", type=int, default=32, metavar="N")
    parser.add_argument("--max-waiting", type=int, default=256, metavar="N")
    parser.add_argument("--token-budget", type=int, default=512, metavar="N", help="of one step")
    parser.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens a block")
    parser.add_argument(
        "--no-prefix-caching", action="store_true", help="compute every prompt from its beginning"
    )
    parser.add_argument("--trace", metavar="FILE", help="write a line of JSON for each step")


def _add_generation(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--until", choices=tuple(WEEKS)[:-1], help="leave the labs of later weeks off"
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument(
        "--show-speed",
        action="store_true",
        help="say how fast it was, with and without later weeks",
    )


def _learn(options: argparse.Namespace) -> int:
    from course import talk

    return talk.learn(FIRST_PROMPT)


def _test(options: argparse.Namespace) -> int:
    from course import prove

    if options.lab:
        files = " ".join(f"code/{name.removesuffix('.py')}.py" for name in options.lab)
        raise ValueError(f"this word takes no lab; to grade one: pytest {files}")
    return prove.prove()


def _status(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from course import progress, status, tracker

    grades = status.grade_all()
    problems = tracker.write(grades)
    events, _ = progress.read()
    if options.json:
        standings = tracker.standing(grades, events)
        print(json.dumps({lab.name: asdict(found) for lab, found in standings.items()}, indent=1))
    else:
        print(tracker.board(grades, events))
        print(f"\n{status.next_step(grades)}")
    print("".join(f"course: {problem}\n" for problem in problems), end="", file=sys.stderr)
    return 0


def _chat(options: argparse.Namespace) -> int:
    from course import talk

    return talk.chat(_request(options), options.prompt)


def _generate(options: argparse.Namespace) -> int:
    from course import talk

    return talk.generate(_request(options), options.prompt, as_json=options.json)


def _serve(options: argparse.Namespace) -> int:
    from course import serve

    given = vars(options)
    names = (name for name in serve.Serving.__dataclass_fields__ if name in given)
    wanted = {name: given[name] for name in names}
    return serve.serve(serve.Serving(**wanted, prefix_caching=not options.no_prefix_caching))


def _trace(options: argparse.Namespace) -> int:
    from pathlib import Path

    from course import trace

    print(trace.summary(Path(options.file)))
    return 0


def _request(options: argparse.Namespace):
    from course import talk

    return talk.Request(
        model=options.model,
        engine=options.engine,
        dtype=options.dtype,
        quantization=options.quantization,
        device=options.device,
        tensor_parallel=options.tensor_parallel,
        speculative=options.speculative,
        draft_model=options.draft_model,
        num_drafts=options.num_drafts,
        until=options.until,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        show_speed=options.show_speed,
    )


def _predict(options: argparse.Namespace) -> int:
    from course import predict

    return predict.predict(_one_lab(options.lab), options.answer)


def _hint(options: argparse.Namespace) -> int:
    from course import hints

    return hints.hint(_one_lab(options.lab), options.name)


def _reveal(options: argparse.Namespace) -> int:
    from course import hints

    return hints.reveal(_one_lab(options.lab), give_up=options.give_up)


def _watch(options: argparse.Namespace) -> int:
    from course import watch

    return watch.watch(options.lab and _one_lab(options.lab), poll=options.poll)


def _bench(options: argparse.Namespace) -> int:
    from course import bench

    return bench.bench(_one_lab(options.lab), options.runs, as_json=options.json)


def _kernels(options: argparse.Namespace) -> int:
    from course import kernels, layers
    from course.grading import LabUnusable

    labs = [lab for text in options.labs for lab in find_labs(text)]
    if len(options.labs) < len(labs):  # a week, of which not every lab has kernels
        labs = [lab for lab in labs if lab in kernels.labs_with_kernels()]
    try:
        if options.solutions:
            return kernels.kernels(labs, "solutions")
        return kernels.kernels(labs, "code", layers.named_references(options.reference))
    except LabUnusable as error:
        print(f"course: {error}")
        return 1


def _lint_transcript(options: argparse.Namespace) -> int:
    from pathlib import Path

    from course import transcripts

    return transcripts.lint(Path(options.file), as_json=options.json)


def _notebooks(options: argparse.Namespace) -> int:
    from pathlib import Path

    from course import notebooks
    from course.labs import all_labs

    labs = [lab for text in options.labs for lab in find_labs(text)] or all_labs()
    return notebooks.write(labs, Path(options.out) if options.out else None)


def _site(options: argparse.Namespace) -> int:
    from course import site

    return site.build(options.serve)


def _model(options: argparse.Namespace) -> int:
    from course import models

    if options.action == "fetch":
        print(f"the default model is ready in {models.fetch_default_model()}")
        return 0
    problems = models.verify_default_model()
    print("\n".join(problems) if problems else "the default model is whole")
    return 1 if problems else 0


def _stubs(options: argparse.Namespace) -> int:
    from course import stubs
    from course.labs import all_labs

    if not options.check:
        stubs.write_stubs(all_labs())
        return 0
    problems = stubs.check_stubs()
    print("\n".join(problems) if problems else "every stub that you have not edited is up to date")
    return 1 if problems else 0


def _reset(options: argparse.Namespace) -> int:
    from course import stubs

    stubs.reset_lab(_one_lab(options.lab))
    return 0


def _one_lab(text: str) -> Lab:
    labs = find_labs(text)
    if len(labs) != 1:
        raise ValueError(f"this takes one lab, and {text} is {len(labs)} of them")
    return labs[0]


def _mutants(options: argparse.Namespace) -> int:
    from course import mutants
    from course.labs import all_labs

    if options.report + options.diagnose + options.listed > 1:
        raise ValueError("--report, --diagnose and --listed are three different things")
    labs = [lab for text in options.labs for lab in find_labs(text)] or all_labs()
    if options.report:
        from course import quality

        return quality.write_report()
    if options.diagnose:
        return mutants.measure_diagnosis(labs)
    return mutants.hunt(labs, listed_only=options.listed)
