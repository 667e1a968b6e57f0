"""Thousands of requests that no client would send: is any of them answered with a 500?

Bodies are drawn by hypothesis: valid ones with one or two entries changed to something else, any
JSON, and any bytes, to every path and method. Whatever comes, the server refuses it as OpenAI
does, or answers it; afterwards it is idle and answers as before. The model is tiny and random.

    python -m benchmarks.fuzz --examples 5000 --out benchmarks/results/fuzz.json
"""

import argparse
import collections
import json
import tempfile
from pathlib import Path
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks import results
from course import tiny
from course.running import ServerProcess

NAME = "tiny"
PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/v1/models"),
    *("/v1/models/tiny", "/health", "/version", "/metrics", "/", "/v1/nothing", "/v1/models/%00"),
)
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS")
CONTENT_TYPES = ("application/json", "text/plain", "multipart/form-data; boundary=x", "")
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": NAME,
        "prompt": "abc",
        "max_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 1,
        "stream": False,
        "stop": ["x"],
        "logit_bias": {"5": 1.0},
        "logprobs": 1,
        "seed": 1,
    },
    "/v1/chat/completions": {
        "model": NAME,
        "messages": [{"role": "user", "content": "abc"}],
        "max_tokens": 2,
        "top_logprobs": 1,
        "logprobs": True,
        "stream_options": {"include_usage": True},
        "stream": True,
        "tools": [],
    },
    "/tokenize": {"prompt": "abc", "add_special_tokens": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}
EXTRA_NAMES = (
    *("min_p", "top_k", "min_tokens", "ignore_eos", "stop_token_ids", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "cache_salt", "user", "response_format", "echo"),
    *("best_of", "suffix", "tool_choice", "max_completion_tokens", "functions", "__class__"),
)
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.integers(),
    st.sampled_from((2**31, 2**63, -(2**63), 10**30)),
    st.floats(),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20))
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
# What a client may well send, so that many a request gets as far as the engine.
FITTING: dict[str, st.SearchStrategy] = {
    "prompt": st.one_of(st.text(max_size=30), st.lists(st.integers(0, 257), max_size=9)),
    "max_tokens": st.integers(1, 9),
    "max_completion_tokens": st.integers(1, 9),
    "min_tokens": st.integers(0, 2),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0.01, 1),
    "top_k": st.integers(-1, 300),
    "min_p": st.floats(0, 1),
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "stop": st.one_of(st.text(max_size=3), st.lists(st.text(max_size=3), max_size=5)),
    "seed": st.integers(),
    "logprobs": st.one_of(st.integers(0, 20), st.booleans()),
    "ignore_eos": st.booleans(),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "tokens": st.lists(st.integers(0, 257), max_size=9),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(("system", "user", "assistant", "tool")), "content": st.text()}
        ),
        max_size=3,
    ),
}


@st.composite
def changed_bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """Draw a path and a valid body with one or two entries changed, added or left out."""
    path = draw(st.sampled_from(sorted(VALID)))
    body = dict(VALID[path])
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from((*body, *EXTRA_NAMES)))
        if draw(st.booleans()) or name not in body:
            body[name] = draw(st.one_of(ANYTHING, FITTING.get(name, ANYTHING)))
        else:
            del body[name]
    return path, _encoded(body)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, str, bytes, str]:
    """Draw (method, path, body, content type)."""
    if draw(st.integers(0, 9)) < 7:
        path, content = draw(changed_bodies())
        return "POST", path, content, CONTENT_TYPES[0]
    content = draw(st.one_of(st.binary(max_size=60), ANYTHING.map(_encoded)))
    kind = draw(st.sampled_from(CONTENT_TYPES))
    return draw(st.sampled_from(METHODS)), draw(st.sampled_from(PATHS)), content, kind


def fuzz(num_examples: int) -> dict:
    """Run it; returns how often each status came. Raises AssertionError for a wrong answer."""
    statuses: collections.Counter = collections.Counter()

    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(requests())
    def one(request: tuple[str, str, bytes, str]) -> None:
        statuses[_send(server, *request)] += 1

    with tempfile.TemporaryDirectory() as folder:
        model = tiny.make_checkpoint(Path(folder), max_position_embeddings=256)
        with ServerProcess(model, NAME, "--kv-gb", "0.002") as server:
            for path, body in VALID.items():
                assert _send(server, "POST", path, _encoded(body), CONTENT_TYPES[0]) == 200
            before = _answer(server)
            one()
            server.wait_until_idle(60)
            assert _answer(server) == before, "it does not answer as before"
    return {"examples": num_examples, "statuses": {str(k): v for k, v in sorted(statuses.items())}}


def _send(server: ServerProcess, method: str, path: str, content: bytes, kind: str) -> int:
    headers = {"content-type": kind} if kind else {}
    try:
        response = server.http.request(method, path, content=content, headers=headers)
    except httpx.HTTPError as error:
        raise AssertionError(f"no answer: {error!r}") from None
    assert response.status_code < 500, response.text
    if response.status_code >= 400 and method != "HEAD":
        error = response.json()["error"]
        assert error["message"] and error["code"] == response.status_code, error
        assert "Traceback" not in response.text and "site-packages" not in response.text
    return response.status_code


def _answer(server: ServerProcess) -> str:
    return server.complete("abc", max_tokens=8, temperature=0.0).choices[0].text


def _encoded(body: Any) -> bytes:
    # Half of a surrogate pair has no bytes of its own; \ud800 in JSON is how it would come.
    return json.dumps(body).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=5000)
    parser.add_argument("--out", type=Path, help="write the result there, with the machine's name")
    options = parser.parse_args()
    results.tell(fuzz(options.examples), "python -m benchmarks.fuzz", options.out)


if __name__ == "__main__":
    main()
