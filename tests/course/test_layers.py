"""Whose code is graded, and what a learner's accident does to everybody else's grade: nothing."""

import json
import sys

import pytest

from course.labs import DRILLS, ROOT, all_labs

# How many tests each lab's suite holds. A change here is a decision; a lost test is an accident.
NUM_TESTS = {
    "week1/attention": 94,
    "week1/rope": 111,
    "week1/gqa": 288,
    "week1/mlp": 120,
    "week1/qwen": 142,
    "week1/generate": 193,
    "week1/sampling": 303,
    "week2/kv_cache": 269,
    "week2/roofline": 289,
    "week2/flash_attention": 235,
    "week2/cuda_graphs": 187,
    "week2/fused_kernels": 233,
    "week2/quantization": 220,
    "week2/flash_decoding": 209,
    "week2/continuous_batching": 241,
    "week3/block_manager": 296,
    "week3/prefix_caching": 231,
    "week3/scheduler": 377,
    "week3/paged_attention": 360,
    "week3/paged_kernels": 453,
    "week3/model_runner": 247,
    "week3/engine": 340,
    "week3/async_engine": 120,
    "week3/protocol": 409,
    "week3/server": 466,
    "week3/moe": 441,
    "week3/speculative": 441,
    "week3/tensor_parallel": 204,
    "basic/ring_buffer": 75,
    "basic/free_list": 54,
    "basic/lru_cache": 35,
    "basic/hash_chain": 114,
    "basic/priority_queue": 48,
    "advanced/first_kernel": 249,
}

ATTENTION, ROPE = "week1/attention", "week1/rope"
BOTH = ("code/week1/attention.py", "code/week1/rope.py")


def attention_is_green_and_rope_says(tree, *sentences, args=()):
    """Grade a solved attention beside a broken rope: one clear message, no other grade changed."""
    tree.solve(ATTENTION)
    result = tree.pytest(*BOTH, "--grade-json", "grades.json", *args)
    grades = json.loads(tree.read("grades.json"))
    assert grades[ATTENTION]["failed"] == 0 and grades[ATTENTION]["passed"] > 0, result.stdout
    assert grades[ROPE]["passed"] == 0 and grades[ROPE]["failed"] > 0, result.stdout
    for sentence in sentences:
        assert sentence in " ".join(result.stdout.split())  # a sentence may be wrapped
    assert "Traceback" not in result.stdout
    return result


def test_no_package_files_in_the_learners_tree():
    assert not list(ROOT.glob("code/**/__init__.py"))
    for group in DRILLS:
        assert not list(ROOT.glob(f"exercises/{group}/**/__init__.py"))
    assert not list(ROOT.glob("solutions/**/__init__.py"))


def test_no_lab_is_named_like_a_standard_module():
    assert not {lab.stem for lab in all_labs()} & sys.stdlib_module_names


@pytest.mark.parametrize("path", ["code", "exercises"])
def test_pristine_stubs_are_red_only_because_nothing_is_written(tree, path):
    target = tree.root / "grades.json"
    labs = [lab for lab in all_labs() if lab.path.startswith(f"{path}/")]
    num_tests = {lab.name: NUM_TESTS[lab.name] for lab in labs}
    result = tree.pytest(path, "--grade-json", str(target))
    grades = json.loads(target.read_text())
    assert {name: grade["not_written"] for name, grade in grades.items()} == num_tests
    for grade in grades.values():
        assert (grade["passed"], grade["skipped"]) == (0, 0)
        assert grade["failed"] == grade["not_written"]
    assert result.returncode == 1
    assert f"{sum(num_tests.values())} failed" in result.stdout
    for lab in labs:
        # A lab whose tests all begin with an earlier one says which.
        own = result.stdout.count(f"{lab.name}.py: not written yet")
        assert own == 1 or (own == 0 and f"{lab.name}.py uses " in result.stdout)
    assert "Traceback" not in result.stdout and "FAILURES" not in result.stdout
    # A whole red week is one screen: the dots of a file fill a few lines.
    assert len(result.stdout.splitlines()) <= 60 * len({lab.week for lab in labs})


def test_a_learners_file_is_graded_as_it_is(tree):
    tree.solve(ATTENTION)
    text = tree.read("code/week1/attention.py")
    tree.write("code/week1/attention.py", text.replace("num_keys - num_queries)", ")"))
    result = tree.pytest("code/week1/attention.py")
    assert result.returncode == 1
    assert "causal_mask(num_queries: 1, num_keys: 9)" in result.stdout
    assert "sessions/week1/attention.md" in result.stdout
    assert "more failing tests" in result.stdout


def test_a_deleted_file_is_missing_and_not_the_reference(tree):
    (tree.root / "code/week1/rope.py").unlink()
    attention_is_green_and_rope_says(
        tree, "code/week1/rope.py does not exist", "course reset week1/rope"
    )


def test_a_file_elsewhere_on_the_path_is_not_graded_in_its_place(tree):
    (tree.root / "code/week1/rope.py").unlink()
    tree.write("elsewhere/week1/rope.py", tree.read("solutions/week1/rope.py"))
    paths = f"{tree.root}/elsewhere:{tree.root}/solutions"
    result = tree.pytest("code/week1/rope.py", PYTHONPATH=paths)
    assert result.returncode == 1 and " passed" not in result.stdout
    assert "code/week1/rope.py does not exist" in result.stdout


def test_a_misspelt_file_is_named(tree):
    (tree.root / "code/week1/rope.py").rename(tree.root / "code/week1/roope.py")
    attention_is_green_and_rope_says(tree, "code/week1/roope.py (is it meant to be rope.py?)")


def test_an_import_from_a_later_week_is_named(tree):
    tree.write("code/week1/rope.py", "from week2.kv_cache import Cache\n")
    attention_is_green_and_rope_says(tree, "imports week2.kv_cache, which belongs to a later week")


@pytest.mark.parametrize("name", ["pytest", "_pytest.runner", "course.grading", "solutions.week1"])
def test_an_import_of_the_grader_is_refused(tree, name):
    tree.write("code/week1/rope.py", f"def late():\n    import {name}\n")
    attention_is_green_and_rope_says(tree, f"week1/rope.py imports {name}, which")


def test_a_link_is_refused(tree):
    file = tree.root / "code/week1/rope.py"
    file.unlink()
    file.symlink_to(tree.root / "solutions/week1/rope.py")
    attention_is_green_and_rope_says(tree, "week1/rope.py is a link to another file")


def test_a_syntax_error_has_its_line(tree):
    text = tree.read("code/week1/rope.py")
    tree.write("code/week1/rope.py", text.replace("def apply_rotary(", "def apply_rotary(("))
    result = attention_is_green_and_rope_says(tree, "week1/rope.py, line", "SyntaxError")
    assert result.stdout.count("SyntaxError") == 1


def test_an_error_while_importing_has_its_line(tree):
    tree.write("code/week1/rope.py", "import torch\n\nx = torch.zeros(2) + torch.zeros(3)\n")
    attention_is_green_and_rope_says(tree, "week1/rope.py, line 3: RuntimeError")


def test_sys_exit_while_importing(tree):
    tree.write("code/week1/rope.py", "import sys\nsys.exit(0)\n")
    attention_is_green_and_rope_says(tree, "week1/rope.py, line 2: sys.exit is called")


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "SystemExit"),
        ("import sys; sys.modules['pytest'].skip('later')", "Skipped: later"),
        ("import unittest; raise unittest.SkipTest('later')", "SkipTest: later"),
        ("import sys; sys.modules['pytest'].xfail('later')", "XFailed: later"),
        ("while True: print('x' * 1000)", "printed more than"),
        ("return undefined_name", "NameError"),
        ("return 3", "expected a tensor"),
    ],
)
def test_accidents_inside_a_function(tree, body, sentence):
    tree.write(
        "code/week1/rope.py",
        f"def rotary_table(*a, **k):\n    {body}\ndef apply_rotary(*a, **k):\n    {body}\n",
    )
    result = attention_is_green_and_rope_says(tree, sentence)
    assert len(result.stdout) < 20_000


@pytest.mark.parametrize("where", ["a function", "an import"])
def test_an_endless_loop_is_stopped(tree, where):
    loop = "while True:\n        pass\n"
    function = f"def rotary_table(*a, **k):\n    {loop}\ndef apply_rotary(*a, **k):\n    {loop}"
    at_import = f"if True:\n    {loop}"
    tree.write("code/week1/rope.py", function if where == "a function" else at_import)
    attention_is_green_and_rope_says(
        tree,
        "ran longer than 3 s",
        "is there a loop whose end is never reached?",
        "not run, because 2 tests of it ran out of time",
        args=("--seconds-per-test", "3"),
    )


def test_an_unwritten_earlier_lab_is_named_with_the_way_on(tree):
    tree.solve("week1/gqa")
    result = tree.pytest("code/week1/gqa.py", "-k", "grouped_attention")
    assert "week1/gqa.py uses week1/attention.py: attention is not written yet" in result.stdout
    assert "pytest code/week1/gqa.py --reference week1/attention" in result.stdout


def test_a_broken_earlier_lab_is_named_with_the_way_on(tree):
    tree.solve("week1/gqa")
    tree.write("code/week1/rope.py", "def (")
    result = tree.pytest("code/week1/gqa.py")
    assert "week1/gqa.py needs week1/rope.py, and that cannot be imported" in result.stdout
    assert "--reference week1/rope" in result.stdout


def test_reference_by_option_and_by_file(tree):
    tree.solve("week1/gqa")
    args = ("code/week1/gqa.py", "-k", "grouped_attention")
    assert tree.pytest(*args).returncode == 1
    by_option = tree.pytest(*args, "--reference", "week1/attention", "--reference", "rope")
    assert by_option.returncode == 0, by_option.stdout
    assert "with the reference for week1/attention, week1/rope" in by_option.stdout
    tree.write("progress/reference.txt", "# stuck\nweek1/attention\nrope  # later\n")
    assert tree.pytest(*args).returncode == 0


def test_what_is_taken_from_the_reference_is_not_graded(tree):
    result = tree.pytest("code/week1/rope.py", "--reference", "week1/rope")
    assert " passed" not in result.stdout and "skipped" in result.stdout
    assert "there is nothing of yours to grade" in result.stdout


def test_a_week_as_the_reference_leaves_out_what_is_graded(tree):
    result = tree.pytest("code/week1/rope.py", "--reference", "week1")
    assert " failed" in result.stdout and "skipped" not in result.stdout


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("code/week1", "solutions/week1"), "one run grades one tree"),
        (("code/week1/atention.py",), "did you mean"),
        (("code/week7",), "there is no lab"),
        (("code/week1/rope.py", "--reference", "week1/rop"), "did you mean"),
        (("solutions/week1/rope.py", "--reference", "week1"), "--reference goes with pytest code"),
    ],
)
def test_refusals_are_one_sentence(tree, args, sentence):
    result = tree.pytest(*args)
    assert result.returncode == 4
    assert sentence in result.stdout
    assert len(result.stdout.strip().splitlines()) <= 3


@pytest.mark.parametrize(
    ("args", "cwd", "count"),
    [
        (("code/week1/attention.py", "-k", "split_heads_by_hand"), ".", 2),
        (("code/week1/attention.py::test_softmax_leaves_its_input_alone",), ".", 1),
        (("week1/attention.py", "-k", "split_heads_by_hand"), "code", 2),
        (("-k", "split_heads_by_hand"), "code/week1", 2),
        (("-k", "split_heads_by_hand"), ".", 2),
        (("{root}/code/week1", "-k", "split_heads_by_hand"), ".", 2),
        (("tests/week1/test_attention.py", "-k", "split_heads_by_hand"), ".", 2),
        (("code/week1/attention.py", "-k", "split_heads_by_hand", "-n", "2"), ".", 2),
    ],
)
def test_every_way_to_call_pytest(tree, args, cwd, count):
    tree.solve(ATTENTION)
    args = [arg.format(root=tree.root) for arg in args]
    result = tree.pytest(*args, cwd=cwd)
    assert f"{count} passed" in result.stdout, result.stdout


def test_without_the_packages_it_says_what_to_do(tree):
    tree.write(
        "without.py", "import sys; sys.modules['torch'] = None; import pytest; pytest.main()"
    )
    result = tree.run("without")
    assert result.returncode == 4
    assert result.stdout.count("\n") == 2 and "python3 -m course learn" in result.stdout


def test_collect_only_lists_the_suite(tree):
    result = tree.pytest("code/week1/attention.py", "--collect-only", "-q")
    assert "tests/week1/test_attention.py::test_softmax_leaves_its_input_alone" in result.stdout


def test_last_failed(tree):
    tree.solve(ATTENTION)
    text = tree.read("code/week1/attention.py")
    tree.write("code/week1/attention.py", text.replace("num_keys - num_queries)", ")"))
    tree.run("pytest", "code/week1/attention.py", "-k", "causal_mask")
    tree.solve(ATTENTION)
    result = tree.run("pytest", "code/week1/attention.py", "--lf")
    assert "passed" in result.stdout and "run-last-failure" in result.stdout


def test_children_import_from_the_graded_layer(tree):
    tree.solve(ATTENTION)
    tree.write(
        "tests/week1/test_attention.py",
        "import subprocess, sys\n"
        "def test_child():\n"
        "    code = 'import week1.attention as a, course.labs as l; print(a.__file__, l.ROOT)'\n"
        "    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)\n"
        "    print(out.stderr)\n"
        "    file, root = out.stdout.split()\n"
        "    assert file == root + '/code/week1/attention.py'\n",
    )
    result = tree.pytest("code/week1/attention.py", "-s", cwd="code")
    assert "1 passed" in result.stdout, result.stdout
