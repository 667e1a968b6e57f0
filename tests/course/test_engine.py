"""The hybrid engine: the board, whose lab runs, and what happens when a learner's lab fails."""

import json
import re

import pytest

from course import status
from course.labs import week_labs

ATTENTION, KV_CACHE = "code/week1/attention.py", "code/week2/kv_cache.py"
BLOCKS, RUNNER = "code/week3/block_manager.py", "code/week3/model_runner.py"
BATCHING = "code/week2/continuous_batching.py"


@pytest.fixture(scope="module")
def model(make_checkpoint) -> str:
    return make_checkpoint()


def generate(tree, model, *words):
    result = tree.run(
        *("course", "generate", "--model", model, "--prompt", "Hello", "--max-tokens", "12"),
        *("--json", *words),
    )
    line = result.stdout.strip().splitlines()[-1]
    return result, json.loads(line) if line.startswith("{") else None


def test_generate_reports_everything(tree, model):
    result, report = generate(tree, model)
    assert result.returncode == 0, result.stdout
    assert report["prompt_tokens"] == 5 and report["finish_reason"] in ("length", "stop")
    assert len(report["token_ids"]) <= 12 and report["seconds"] >= 0
    assert isinstance(report["text"], str)
    labs = report["labs"]
    assert {source for name, source in labs.items() if name.startswith("week1/")} == {"reference"}
    assert labs["week2/kv_cache"] == "off"


def test_a_green_lab_runs_in_the_engine_and_says_the_same(tree, model):
    _, before = generate(tree, model, "--engine", "solutions")
    tree.solve("week1/attention")
    # Its own file, not a byte-for-byte copy of the reference.
    tree.write(ATTENTION, tree.read(ATTENTION) + "\n# mine\n")
    _, after = generate(tree, model)
    assert after["labs"]["week1/attention"] == "yours"
    assert after["labs"]["week1/rope"] == "reference"
    assert (after["text"], after["token_ids"]) == (before["text"], before["token_ids"])
    chat = tree.run("course", "chat", "--model", model, "--prompt", "Hi", "--max-tokens", "3")
    assert "attention  yours" in chat.stdout and "rope       reference" in chat.stdout
    assert "; cut at --max-tokens 3)" in chat.stdout
    status = tree.run("course", "status")
    assert (
        "✅ week1/attention" in status.stdout
        and f"1 of {len(week_labs())} labs are green" in status.stdout
    )
    assert "code/week1/rope.py" in status.stdout


def test_what_is_next_when_nothing_is_open():
    labs = week_labs()
    grades = dict.fromkeys(labs, status.Grade("green", 1, 1))
    assert f"course reveal {labs[-1].name}" in status.next_step(grades)
    grades[labs[1]] = status.Grade("reference")
    text = status.next_step(grades)
    assert f"Taken from the reference: {labs[1].name};" in text and "Every lab" not in text


def test_a_wrong_lab_is_left_out_and_the_engine_says_so(tree, model):
    tree.solve("week1/attention")
    wrong = tree.read(ATTENTION).replace("num_keys - num_queries)", ")")
    tree.write(ATTENTION, wrong)
    chat = tree.run("course", "chat", "--model", model, "--prompt", "Hi", "--max-tokens", "3")
    assert chat.returncode == 0, chat.stdout
    assert "attention  reference" in chat.stdout
    assert "tests pass, so the reference runs, not yours" in chat.stdout
    status = json.loads(tree.run("course", "status", "--json").stdout)
    grade = status["week1/attention"]
    assert grade["state"] == "started" and 0 < grade["passed"] < grade["total"]
    assert "causal_mask" in grade["message"]


def test_a_lab_that_crashes_later_is_named_and_replaced(tree, model):
    _, before = generate(tree, model, "--engine", "solutions")
    tree.solve("week1/attention")
    text = tree.read(ATTENTION)
    crash = "    if q.shape[-2] > 14:\n        raise RuntimeError('too long for me')\n"
    tree.write(ATTENTION, text.replace("    scale = q.shape", crash + "    scale = q.shape"))
    result, after = generate(tree, model)
    assert result.returncode == 0, result.stdout
    assert "code/week1/attention.py, line" in result.stdout
    assert "too long for me" in result.stdout
    assert after["labs"]["week1/attention"] == "reference"
    assert after["token_ids"] == before["token_ids"]


def test_a_lab_of_a_later_week_is_switched_on_by_passing(tree, model):
    tree.write("progress/reference.txt", "week1\n")
    _, before = generate(tree, model)
    tree.solve("week2/kv_cache")
    tree.write(KV_CACHE, tree.read(KV_CACHE) + "\n# mine\n")
    _, after = generate(tree, model)
    assert after["labs"]["week2/kv_cache"] == "yours"
    assert after["token_ids"] == before["token_ids"]
    tree.write(KV_CACHE, tree.read(KV_CACHE).replace("range(start, start + count)", "range(count)"))
    _, wrong = generate(tree, model)
    assert wrong["labs"]["week2/kv_cache"] == "off"
    chat = tree.run("course", "chat", "--model", model, "--prompt", "Hi", "--max-tokens", "3")
    assert "tests pass, so the engine runs without it" in chat.stdout


@pytest.mark.parametrize("way", ["--engine solutions", "reference.txt"])
def test_a_lab_of_a_later_week_is_switched_on_by_asking(tree, model, way):
    _, before = generate(tree, model)
    if way == "reference.txt":
        tree.write("progress/reference.txt", "week2/kv_cache\n")
        _, after = generate(tree, model)
    else:
        _, after = generate(tree, model, *way.split(), "--until", "week2")
    assert after["labs"]["week2/kv_cache"] == "reference"
    assert after["token_ids"] == before["token_ids"]


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_weights_are_quantized_on_demand(tree, model, kind):
    _, exact = generate(tree, model, "--engine", "solutions")
    assert exact["labs"]["week2/quantization"] == "off"
    result, rounded = generate(tree, model, "--engine", "solutions", "--quantization", kind)
    assert result.returncode == 0, result.stdout
    assert rounded["labs"]["week2/quantization"] == "reference"
    assert len(rounded["token_ids"]) > 0
    tree.write("progress/reference.txt", "week2/quantization\n")
    _, same = generate(tree, model, "--quantization", kind)
    assert same["labs"]["week2/quantization"] == "reference"


def test_quantizing_without_its_lab_says_what_to_do(tree, model):
    result, _ = generate(tree, model, "--quantization", "int4")
    assert result.returncode == 2
    (line,) = result.stdout.strip().splitlines()
    for mention in ("--quantization int4", "code/week2/quantization.py", "reference.txt"):
        assert mention in line
    tree.write("progress/reference.txt", "week1\n")
    tree.solve("week2/quantization")
    lab = "code/week2/quantization.py"
    tree.write(lab, tree.read(lab) + "\n# mine\n")
    _, report = generate(tree, model, "--quantization", "int4")
    assert report["labs"]["week2/quantization"] == "yours"
    result, _ = generate(tree, model, "--quantization", "int2")
    assert result.returncode == 2 and "int8" in result.stdout


def test_quantized_weights_are_counted_in_the_bytes_of_a_token(tree, model):
    words = ("course", "chat", "--model", model, "--prompt", "Hi", "--max-tokens", "5")
    chat = tree.run(*words, "--show-speed", "--engine", "solutions", "--quantization", "int8")
    assert chat.returncode == 0, chat.stdout
    assert re.search(r"quantization +reference", chat.stdout)
    assert chat.stdout.count("tokens/s, which read") == 2


def test_speed_is_shown_with_and_without_later_weeks(tree, model):
    words = ("course", "chat", "--model", model, "--prompt", "Hi", "--max-tokens", "5")
    plain = tree.run(*words, "--show-speed").stdout
    assert re.search(r"first token after \d+\.\d\d s, then \d+\.\d tokens/s", plain), plain
    assert "with week 1 alone" not in plain
    both = tree.run(*words, "--show-speed", "--engine", "solutions").stdout
    assert both.count("tokens/s, which read") == 2 and "with week 1 alone: first token" in both


def test_a_crash_of_a_later_week_is_survived(tree, model):
    tree.write("progress/reference.txt", "week1\n")
    _, before = generate(tree, model)
    tree.solve("week2/kv_cache")
    # Only with this model, so that the suite passes.
    here = "model.embed_tokens.weight.shape[0] == 258 and cache.num_computed_tokens[0] == 9"
    crash = f"    if {here}:\n        raise RuntimeError('nine')\n"
    text = tree.read(KV_CACHE).replace("    counts = {row", crash + "    counts = {row")
    tree.write(KV_CACHE, text)
    result, after = generate(tree, model)
    assert "nine" in result.stdout and after["labs"]["week2/kv_cache"] == "reference"
    assert after["token_ids"] == before["token_ids"]


MORE_PROMPTS = ("--prompt", "Bye, and thanks", "--prompt", "x")


@pytest.mark.parametrize("sampled", [(), ("--temperature", "0.8", "--seed", "4")], ids=str)
def test_several_prompts_run_together_and_say_the_same(tree, model, sampled):
    _, apart = generate(tree, model, *MORE_PROMPTS, *sampled)
    assert apart["labs"]["week2/continuous_batching"] == "off"
    words = (*MORE_PROMPTS, *sampled, "--engine", "solutions")
    _, together = generate(tree, model, *words, "--until", "week2")
    assert together["labs"]["week2/continuous_batching"] == "reference"
    assert len(together["completions"]) == 3 and together["seconds"] >= 0
    assert together["completions"] == apart["completions"]
    _, paged = generate(tree, model, *words)
    assert paged["labs"]["week2/continuous_batching"] == "replaced"
    assert paged["labs"]["week3/engine"] == "reference"
    assert paged["completions"] == apart["completions"]
    _, alone = generate(tree, model, *sampled)
    first = together["completions"][0]
    assert {key: alone[key] for key in first} == first


def test_several_prompts_are_shown_with_their_speed(tree, model):
    words = ("course", "generate", "--model", model, "--prompt", "Hello", *MORE_PROMPTS)
    result = tree.run(*words, "--max-tokens", "3", "--engine", "solutions", "--show-speed")
    assert result.returncode == 0, result.stdout
    places = [result.stdout.index(f"\n{prompt}") for prompt in ("Hello", "Bye, and thanks", "x")]
    assert places == sorted(places)
    assert re.search(r"3 prompts, 9 tokens in \d+\.\d s: \d+\.\d tokens/s over all", result.stdout)


def test_a_crash_in_a_batch_is_survived(tree, model):
    tree.write("progress/reference.txt", "week1\nweek2/kv_cache\n")
    _, before = generate(tree, model, *MORE_PROMPTS)
    tree.solve("week2/continuous_batching")
    # Only with this model, so that the suite passes.
    crash = (
        "        if model.config.vocab_size == 258:\n            raise RuntimeError('so many')\n"
    )
    here = "        max_model_len = model.config"
    text = tree.read(BATCHING)
    tree.write(BATCHING, text.replace(here, crash + here))
    result, after = generate(tree, model, *MORE_PROMPTS)
    assert "so many" in result.stdout
    assert after["labs"]["week2/continuous_batching"] == "reference"
    assert after["completions"] == before["completions"]


def test_one_green_lab_of_the_third_week_switches_its_engine_on(tree, model):
    tree.write("progress/reference.txt", "week1\nweek2/kv_cache\n")
    _, before = generate(tree, model)
    assert before["labs"]["week3/engine"] == "off"
    tree.solve("week3/block_manager")
    tree.write(BLOCKS, tree.read(BLOCKS) + "\n# mine\n")
    _, after = generate(tree, model)
    assert after["labs"]["week3/block_manager"] == "yours"
    assert after["labs"]["week3/engine"] == "reference"
    assert after["labs"]["week2/kv_cache"] == "replaced"
    assert after["token_ids"] == before["token_ids"]
    _, earlier = generate(tree, model, "--until", "week2")
    assert earlier["labs"]["week3/block_manager"] == "off"
    assert earlier["labs"]["week2/kv_cache"] == "reference"


def test_a_crash_in_a_step_is_survived_and_blamed_on_whose_it_is(tree, model):
    tree.write("progress/reference.txt", "week1\nweek3\n")
    _, before = generate(tree, model)
    others = [lab.name for lab in week_labs() if lab.week == "week3" and lab.stem != "model_runner"]
    tree.write("progress/reference.txt", "\n".join(["week1", *others]))
    tree.solve("week3/model_runner")
    # Only with this model, so that the suite passes.
    is_here = "self._model.embed_tokens.weight.shape[0] == 258 and len(step.parts[0].token_ids) < 5"
    crash = f"        if {is_here}:\n            raise RuntimeError('so soon')\n"
    here = "        input_ids, positions, batch = self._buffers.fill"
    tree.write(RUNNER, tree.read(RUNNER).replace(here, crash + here))
    result, after = generate(tree, model)
    assert "code/week3/model_runner.py, line" in result.stdout and "so soon" in result.stdout
    assert after["labs"]["week3/model_runner"] == "reference"
    assert after["token_ids"] == before["token_ids"]


def test_engine_code_stops_at_the_first_unwritten_lab(tree, model):
    result = tree.run("course", "chat", "--model", model, "--engine", "code", "--prompt", "Hi")
    assert result.returncode == 1
    assert "is not written yet → sessions/week1/" in result.stdout
    assert "Traceback" not in result.stdout
    assert len(result.stdout.strip().splitlines()) == 1


def test_grades_are_kept_until_a_file_changes(tree, model):
    tree.solve("week1/attention")
    assert '"green"' in tree.run("course", "status", "--json").stdout
    suite = tree.read("tests/week1/test_attention.py")
    tree.write(".course/grades.json", tree.read(".course/grades.json").replace("green", "started"))
    assert '"green"' not in tree.run("course", "status", "--json").stdout
    tree.write("tests/week1/test_attention.py", suite + "\n# changed\n")
    assert '"green"' in tree.run("course", "status", "--json").stdout
    tree.write(".course/grades.json", "{damaged")
    assert '"green"' in tree.run("course", "status", "--json").stdout


@pytest.mark.parametrize(
    ("words", "mentions"),
    [
        (["--max-tokens", "0"], ["max_tokens", "1", "0"]),
        (["--temperature", "nan"], ["temperature", "nan"]),
        (["--temperature", "-1"], ["temperature", "-1"]),
        (["--top-p", "0"], ["top_p", "(0, 1]", "0.0"]),
        (["--top-p", "1.5"], ["top_p", "(0, 1]", "1.5"]),
        (["--seed", "-3"], ["seed", "-3"]),
        (["--prompt", ""], ["0 tokens", "63"]),
        (["--prompt", "x" * 64], ["64 tokens", "63"]),
        (["--model", "/no/such/folder"], ["/no/such/folder"]),
        (["--model", "what is this"], ["what is this"]),
    ],
)
def test_bad_input_is_one_line(tree, model, words, mentions):
    result, _ = generate(tree, model, *words)
    assert result.returncode == 2, result.stdout
    assert len(result.stdout.strip().splitlines()) == 1
    for mention in mentions:
        assert mention in result.stdout


def test_a_conversation_goes_on_until_the_input_ends(tree, model):
    result = tree.run("course", "chat", "--model", model, "--max-tokens", "3")
    assert result.returncode == 0
    assert "ends the conversation" in result.stdout


def test_every_word_has_help_with_an_example(tree):
    overview = tree.run("course", "--help").stdout
    for word in (
        "learn",
        "test",
        "status",
        "chat",
        "generate",
        "model",
        "stubs",
        "reset",
        "mutants",
    ):
        assert word in overview
        result = tree.run("course", word, "--help")
        assert result.returncode == 0 and f"Example: course {word}" in result.stdout
    assert tree.run("course", "dance").returncode == 2
