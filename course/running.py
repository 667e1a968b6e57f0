"""A `course serve` process of its own, for tests and measurements."""

import os
import re
import signal
import subprocess
import sys
import time
from types import TracebackType

import httpx
import openai

from course.labs import ROOT

IDLE = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


class ServerProcess:
    """A server of the reference on a free port, and what it says of itself; a context manager.

    model: its checkpoint's folder. name: what clients call the model. words: more options of
    `course serve`. said: what it printed until it was ready; url: where it is. http: a client
    without OpenAI's words, client: with them.
    Raises RuntimeError, with what the process said, when it does not start.
    """

    def __init__(self, model: str, name: str, *words: str):
        self.name = name
        command = [sys.executable, "-m", "course", "serve", "--engine", "solutions", "--port", "0"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("COURSE_")}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
        self.process = subprocess.Popen(
            [*command, "--model", model, "--name", name, *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        self.said = ""
        for line in self.process.stdout:
            self.said += line
            if line.startswith("Try: curl"):
                break
        found = re.search(r"http://127\.0\.0\.1:\d+", self.said)
        if found is None:
            raise RuntimeError(f"the server did not start: {self.said}")
        self.url = found[0]
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = self.openai("no key")

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.http.close()
        self.process.kill()
        self.process.wait()

    def openai(self, key: str, **options) -> openai.OpenAI:
        """Make a client that tries nothing twice."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def complete(self, prompt, **params):
        """Ask for a completion."""
        return self.client.completions.create(model=self.name, prompt=prompt, **params)

    def metric(self, name: str) -> float:
        """Read the only value that /metrics has under a name."""
        lines = self.http.get("/metrics").text.splitlines()
        (value,) = (line.split()[-1] for line in lines if line.startswith(f"{name}{{"))
        return float(value)

    def wait_until_idle(self, seconds: float = 20.0) -> None:
        """Wait until nobody runs or waits and every block is free.

        Raises RuntimeError, with the metrics, when that is not so after these seconds.
        """
        end = time.monotonic() + seconds
        while any(self.metric(f"vllm:{name}") for name in IDLE):
            if time.monotonic() > end:
                raise RuntimeError(f"the server is not idle: {self.http.get('/metrics').text}")
            time.sleep(0.05)

    def num_resident_bytes(self) -> int:
        """Return the process' memory, on Linux."""
        with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def num_threads(self) -> int:
        """Return how many threads the process has, on Linux."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    def stop(self, how: signal.Signals = signal.SIGINT) -> int:
        """Ask it to stop, and wait until it has; returns its exit status."""
        self.process.send_signal(how)
        self.process.stdout.read()
        return self.process.wait(timeout=60)
