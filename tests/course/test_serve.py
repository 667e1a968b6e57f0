"""`course serve` as its users meet it: a process, and the official client of OpenAI.

Cases are those of the engine's list: each is a bug that a real engine had.
"""

import concurrent.futures
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import openai
import pytest

from course.labs import ROOT
from course.running import ServerProcess

CONTEXT, NAME = 256, "tiny"
KEY = "a key of this test"


def serving(model: str, *words: str) -> ServerProcess:
    return ServerProcess(model, NAME, "--kv-gb", "0.002", *words)


@pytest.fixture(scope="module")
def model(make_checkpoint) -> str:
    return make_checkpoint(max_position_embeddings=CONTEXT)


@pytest.fixture(scope="module")
def server(model) -> Iterator[ServerProcess]:
    with serving(model) as running:
        yield running


def events_of(server: ServerProcess, path: str, body: dict) -> list[str]:
    """Post, and return the server-sent events, as they were written."""
    response = server.http.post(path, json={"model": NAME, "stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = response.text.split("\n\n")
    assert end == ""
    return events


def test_it_says_where_it_is_and_whose_labs_it_is_made_of(server):
    assert re.search(r"attention +reference", server.said)
    assert f"Serving {NAME} at {server.url} (a chat page), {server.url}/v1" in server.said
    assert f"Try: curl {server.url}/v1/chat/completions" in server.said


def test_the_line_of_curl_works_as_it_is_printed(server):
    line = server.said.split("Try: ")[1].strip()
    done = subprocess.run(line, shell=True, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout)["object"] == "chat.completion", done


def test_models_and_version_and_health(server):
    assert [model.id for model in server.client.models.list()] == [NAME]
    assert server.client.models.retrieve(NAME).id == NAME
    assert server.http.get("/health").status_code == 200
    assert set(server.http.get("/version").json()) == {"version"}


def test_the_page_is_whole_and_asks_nobody_else(server):
    page = server.http.get("/").text
    assert "<title>Socratic Serving</title>" in page
    assert not re.search(r"https?://", page)


def test_tokenize_and_detokenize(server):
    answer = server.http.post("/tokenize", json={"model": NAME, "prompt": "Hé!"}).json()
    assert answer["count"] == len(answer["tokens"]) == 4
    assert answer["max_model_len"] == CONTEXT
    body = {"tokens": answer["tokens"]}
    assert server.http.post("/detokenize", json=body).json() == {"prompt": "Hé!"}


def test_a_completion_is_what_the_first_week_generates(server, model):
    """Case: parity of the paged path with week 1's plain one."""
    words = ("--engine", "solutions", "--model", model, "--prompt", "Hello", "--max-tokens", "40")
    done = subprocess.run(
        [sys.executable, "-m", "course", "generate", *words, "--json"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    expected = json.loads(done.stdout)
    got = server.complete("Hello", max_tokens=40, temperature=0)
    assert got.choices[0].text == expected["text"]
    assert got.choices[0].finish_reason == expected["finish_reason"]
    assert got.usage.prompt_tokens == expected["prompt_tokens"]
    assert got.usage.completion_tokens == len(expected["token_ids"])


@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 5}, {"seed": 5, "top_p": 0.5}])
def test_a_stream_says_what_the_whole_says(server, params):
    """Case 16 and 23: UTF-8 over tokens; deltas equal the full decode; one finish chunk."""
    for prompt in ("Hello", "Ünïcödé 🙂", [1, 200, 17]):
        whole = server.complete(prompt, max_tokens=30, **params).choices[0]
        chunks = [
            c.choices[0] for c in server.complete(prompt, max_tokens=30, stream=True, **params)
        ]
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert [c.finish_reason for c in chunks if c.finish_reason] == [whole.finish_reason]


def test_events_are_exactly_those_of_openai(server):
    """Case 23: the opening chunk, parts, one finish chunk, usage, and [DONE]."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "seed": 1, "n": 2}
    *events, usage, done = events_of(
        server, "/v1/chat/completions", body | {"stream_options": {"include_usage": True}}
    )
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all(chunk["usage"] is None for chunk in chunks)
    for index in range(2):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert [c["finish_reason"] for c in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["delta"] == {} and own[-1]["finish_reason"] in ("length", "stop")
    counted = json.loads(usage.removeprefix("data: "))
    assert counted["choices"] == []
    assert counted["usage"]["completion_tokens"] <= 10
    assert "usage" not in events_of(server, "/v1/chat/completions", body)[0]


def test_a_chat_takes_parts_tools_and_every_role(server):
    messages = [
        {
            "role": "system",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief"}],
        },
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "content": "4", "tool_call_id": "x"},
    ]
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    answer = server.client.chat.completions.create(
        model=NAME, messages=messages, tools=[tool], tool_choice="auto", max_tokens=3
    )
    assert answer.choices[0].message.role == "assistant"


def test_logprobs_belong_to_the_tokens_that_are_shown(server):
    params = {"max_tokens": 12, "seed": 3, "logprobs": 3}
    whole = server.complete("abc", **params).choices[0]
    assert len(whole.logprobs.tokens) == len(whole.logprobs.token_logprobs)
    # The chosen one is told beside the three most likely ones.
    assert all(len(top) <= 4 for top in whole.logprobs.top_logprobs)
    pairs = zip(whole.logprobs.tokens, whole.logprobs.top_logprobs, strict=True)
    assert all(token in top for token, top in pairs)
    chat = server.client.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": "abc"}],
        **params | {"logprobs": True, "top_logprobs": 2},
    )
    for token in chat.choices[0].logprobs.content:
        assert (token.bytes is None) == ("\ufffd" in token.token)
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 2
        assert all(token.logprob <= 0 for token in token.top_logprobs)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_string_ends_text_and_tokens_alike(server, length):
    """Case 17: never a part of a stop string, whole or streamed."""
    params = {"max_tokens": 40, "temperature": 0, "logprobs": 1}
    free = server.complete("Hello", **params).choices[0]
    start = next(i for i in range(8, len(free.text)) if free.text[i : i + length].isprintable())
    stop = free.text[start : start + length]
    end = free.text.index(stop)
    for others in ([], [stop + "never", "nowhere"]):
        whole = server.complete("Hello", stop=[stop, *others], **params).choices[0]
        assert (whole.text, whole.finish_reason) == (free.text[:end], "stop")
        assert whole.logprobs is None or len(whole.logprobs.tokens) <= end
        stream = server.complete("Hello", stop=[stop, *others], stream=True, **params)
        assert "".join(chunk.choices[0].text for chunk in stream) == free.text[:end]


def test_the_same_seed_gives_the_same_text_whoever_else_is_there(server):
    """Case 15: alone, and beside neighbours that are seeded or not."""
    alone = [server.complete("abc", seed=seed, max_tokens=25).choices[0].text for seed in range(6)]
    with concurrent.futures.ThreadPoolExecutor(18) as pool:
        seeded = [
            pool.submit(server.complete, "abc", seed=seed, max_tokens=25) for seed in range(6)
        ]
        others = [pool.submit(server.complete, f"{i}", max_tokens=20) for i in range(12)]
        assert [future.result().choices[0].text for future in seeded] == alone
        assert all(future.result().choices for future in others)


BAD = {
    "an empty prompt": ({"prompt": ""}, "prompt"),
    "no prompts": ({"prompt": []}, "prompt"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens below 0": ({"max_tokens": -3}, "max_tokens"),
    "an id outside": ({"prompt": [1, 99_999]}, "99999"),
    "a negative id": ({"prompt": [-1]}, "prompt"),
    "a word for a number": ({"temperature": "hot"}, "temperature"),
    "a bool for a number": ({"max_tokens": True}, "max_tokens"),
    "a temperature below 0": ({"temperature": -0.1}, "temperature"),
    "top_p 0": ({"top_p": 0}, "top_p"),
    "n 0": ({"n": 0}, "n"),
    "too many choices": ({"n": 1000}, "n"),
    "too many logprobs": ({"logprobs": 21}, "logprobs"),
    "an empty stop": ({"stop": [""]}, "stop"),
    "a bias too large": ({"logit_bias": {"5": 101}}, "logit_bias"),
    "a bias without an id": ({"logit_bias": {"five": 1}}, "logit_bias"),
    "min above max": ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
    "a seed below 0": ({"seed": -1}, "seed"),
    "an unknown name": ({"frobnicate": 1}, "frobnicate"),
    "a name that is not supported": ({"best_of": 3}, "best_of"),
    "an option of streams alone": ({"stream_options": {"include_usage": True}}, "stream"),
    "a prompt that fills the context": ({"prompt": "x" * CONTEXT}, f"{CONTEXT}"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_request_is_refused_alone(server, case, stream):
    """Cases 1 and 14: 400, before any byte of an answer, that names what is wrong."""
    changes, named = BAD[case]
    body = {"model": NAME, "prompt": "abc", "stream": stream, **changes}
    if case == "an option of streams alone" and stream:
        pytest.skip("it goes with a stream")
    response = server.http.post("/v1/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    assert named in error["message"] or named == error["param"]
    assert set(error) == {"message", "type", "param", "code"}
    assert server.complete("abc", max_tokens=2).choices[0].finish_reason


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"model": "tiny"}', b"\xff\xfe", b"[" * 5000, b'"' + b"x" * 99],
    ids=range(8),
)
def test_a_broken_body_is_refused(server, content):
    headers = {"content-type": "application/json"}
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        response = server.http.post(path, content=content, headers=headers)
        assert response.status_code == 400 and "error" in response.json(), response.text


def test_numbers_that_are_none_and_halves_of_characters_are_refused(server):
    headers = {"content-type": "application/json"}
    for change in ('"temperature": NaN', '"top_p": Infinity', '"prompt": "\\ud800"'):
        body = f'{{"model": "tiny", "prompt": "abc", {change}}}'
        response = server.http.post("/v1/completions", content=body, headers=headers)
        assert response.status_code == 400, response.text


def test_another_model_is_not_found(server):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'"):
        server.client.completions.create(model="gpt-4", prompt="abc")
    assert server.http.get("/v1/models/gpt-4").status_code == 404
    assert "error" in server.http.get("/nowhere").json()


def test_a_response_format_is_refused_until_it_exists(server):
    with pytest.raises(openai.BadRequestError, match="response_format"):
        server.client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "Hi"}],
            response_format={"type": "json_object"},
        )


def test_a_client_that_goes_away_ends_its_request(server):
    """Case 12: streams that are closed, and whole answers that nobody waits for."""
    stream = server.complete("abc", max_tokens=200, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    server.wait_until_idle()
    impatient = server.openai("no key", timeout=0.15)
    with pytest.raises(openai.APITimeoutError):
        impatient.completions.create(
            model=NAME, prompt="abc", n=20, max_tokens=220, extra_body={"ignore_eos": True}
        )
    server.wait_until_idle()


def test_a_common_beginning_is_found_again(server):
    prompt = "A beginning that two requests share, long enough for several blocks of the pool. "
    first = server.complete(f"{prompt}One", max_tokens=2).usage
    second = server.complete(f"{prompt}Two", max_tokens=2).usage
    assert first.prompt_tokens_details.cached_tokens == 0
    assert second.prompt_tokens_details.cached_tokens >= 64
    salted = server.complete(f"{prompt}Two", max_tokens=2, extra_body={"cache_salt": "x"}).usage
    assert salted.prompt_tokens_details.cached_tokens == 0


def test_metrics_have_the_names_that_dashboards_know(server):
    before = server.metric("vllm:generation_tokens_total")
    server.complete("abc", max_tokens=7, extra_body={"ignore_eos": True})
    assert server.metric("vllm:generation_tokens_total") == before + 7
    text = server.http.get("/metrics").text
    for name in (
        "vllm:num_preemptions_total",
        "vllm:prefix_cache_hits_total",
        "vllm:prompt_tokens_total",
        "vllm:request_success_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_bucket",
        "vllm:e2e_request_latency_seconds_bucket",
    ):
        assert f"\n{name}{{" in text


def test_hundreds_of_streams_with_random_cancels_leave_nothing(server):
    """Case 25, in short; the pool is small, so that requests lose their blocks as well."""
    draw = random.Random(0)
    rss = server.num_resident_bytes()

    def one(seed: int) -> str | None:
        stream = server.complete(
            "abc" * (1 + seed % 9), max_tokens=20 + seed % 90, stream=True, seed=seed
        )
        finished = None
        for number, chunk in enumerate(stream):
            finished = finished or chunk.choices[0].finish_reason
            if seed % 3 == 0 and number == seed % 7:
                stream.close()
                return "cancelled"
        return finished

    seeds = [draw.randrange(1, 10_000) for _ in range(200)]
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        outcomes = list(pool.map(one, seeds))
    assert set(outcomes) <= {"cancelled", "stop", "length"}
    server.wait_until_idle()
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        list(pool.map(one, seeds))
    server.wait_until_idle()
    # The event loop keeps up to 40 threads for what must not block it.
    assert server.num_threads() < 64
    assert server.num_resident_bytes() < rss + 200e6


def test_keys_lengths_and_queues_are_limited(model):
    """Case 26, and back-pressure: 401, 413 and 429 with Retry-After."""
    words = ("--max-num-seqs", "2", "--max-waiting", "3", "--api-key", KEY)
    with serving(model, *words) as server:
        keys = ("Bearer no key", f"Bearer {KEY[:-1]}", f"Bearer {KEY}x", "Bearer ключ", KEY)
        for headers in ({}, *({"authorization": key.encode()} for key in keys)):
            for path in ("/v1/models", "/metrics", "/version"):
                assert server.http.get(path, headers=headers).status_code == 401
        assert server.http.get("/").status_code == server.http.get("/health").status_code == 200
        server.http.headers["authorization"] = f"Bearer {KEY}"
        server.client = server.openai(KEY)
        for content in (b"x" * (5 << 20), (b"x" * 65536 for _ in range(100))):
            response = server.http.post("/v1/completions", content=content)
            assert response.status_code == 413, response.text
        extra = {"ignore_eos": True}
        streams = [
            server.complete("abc", max_tokens=240, stream=True, extra_body=extra) for _ in range(5)
        ]
        with pytest.raises(openai.RateLimitError) as refused:
            server.complete("abc")
        assert int(refused.value.response.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            server.complete("abc", n=2, stream=True)
        for stream in streams:
            stream.close()
        server.wait_until_idle()
        assert server.complete("abc", max_tokens=2).choices


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_server_lets_requests_end(model, how):
    with serving(model) as server:
        extra = {"ignore_eos": True}
        stream = iter(server.complete("abc", max_tokens=150, stream=True, extra_body=extra))
        next(stream)
        server.process.send_signal(how)
        *_, last = stream
        assert last.choices[0].finish_reason == "length"
        assert server.stop(how) in (0, 130, -how)


def test_a_killed_server_starts_again(model):
    with serving(model) as server:
        stream = server.complete("abc", max_tokens=200, stream=True)
        next(iter(stream))
        server.process.kill()
        with pytest.raises(Exception):  # noqa: B017 (whatever the client makes of it)
            list(stream)
    with serving(model) as server:
        assert server.complete("abc", max_tokens=2).choices


def test_a_trace_says_what_happened(model, tmp_path):
    trace = tmp_path / "steps.jsonl"
    with serving(model, "--trace", str(trace), "--max-num-seqs", "4") as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda i: server.complete(f"abc {i}", max_tokens=9, seed=i), range(8)))
        server.stop()
    steps = [json.loads(line) for line in trace.read_text(encoding="utf-8").splitlines()]
    assert max(step["num_running"] for step in steps) == 4
    assert sum(len(step["finished"]) for step in steps) == 8
    words = ("-m", "course", "trace", "summary", str(trace))
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"{len(steps):,} steps in" in done.stdout
    assert "8 took part" in done.stdout
    trace.write_text("no trace\n{}\n")
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "line 1: this is no step of a trace" in done.stderr


@pytest.mark.parametrize(
    ("words", "mentions"),
    [
        (("--max-model-len", "9999"), "exceeds the model's context of 256"),
        (("--kv-gb", "0.0000001"), "has no room for a block"),
        (("--kv-gb", "0"), "kv_gb must be above 0"),
        (("--max-num-seqs", "0"), "max_num_seqs must be at least 1"),
        (("--port", "99999"), "port must be in"),
    ],
)
def test_bad_options_are_one_line(model, words, mentions):
    command = [sys.executable, "-m", "course", "serve", "--engine", "solutions", "--model", model]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and mentions in done.stderr and "Traceback" not in done.stderr


def test_a_pool_that_is_too_small_for_the_context_shortens_it(model):
    with serving(model, "--kv-gb", "0.00004") as server:
        assert "so no request may have 256" in server.said
        with pytest.raises(openai.BadRequestError, match="leaves no room"):
            server.complete("x" * 200)
