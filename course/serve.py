"""`course serve`: the engine that the labs make, behind an OpenAI-compatible HTTP server."""

import functools
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from course import models, talk
from course.engine import REFERENCE, YOURS, Engine, LabCrashed, assemble
from course.grading import LabUnusable
from course.labs import week_labs
from course.paged import PagedParams, RanksEnded

PAGE = Path(__file__).parent / "pages" / "chat.html"
WEEK = "week3"
# How long requests may go on after somebody has asked the server to stop.
DRAIN_SECONDS = 30


@dataclass(frozen=True)
class Serving(PagedParams):
    """What the command line asks of the server.

    model, engine, dtype, quantization, device: as in `talk.Request`. name: what clients call the
    model; None means its folder's name. max_waiting: as in `AsyncEngine`. trace: a file that gets a
    line for each step. host, port, api_key: as in week3's ServerParams, and where to listen.
    Raises ValueError as PagedParams does, and for a port that is none.
    """

    model: str | None = None
    engine: str = "hybrid"
    dtype: str = "float32"
    quantization: str | None = None
    device: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key: str | None = None
    max_waiting: int = 256
    trace: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")


def serve(wanted: Serving) -> int:
    """Serve until somebody stops the process; returns the exit status."""
    try:
        folder = models.resolve_model(wanted.model, report=talk.tell)
        wanted = replace(wanted, draft_model=talk.draft_folder(wanted.draft_model))
        tokenizer = models.load_tokenizer(folder)
        assembled, table = _engine(wanted, folder, tokenizer)
    except (LabCrashed, LabUnusable, RanksEnded, models.ModelUnavailable) as error:
        return talk.refuse(error)
    print(table)
    server = importlib.import_module("week3.server")
    threaded = importlib.import_module("week3.async_engine")
    asynchronous = threaded.AsyncEngine(assembled.paged, wanted.max_waiting)
    params = server.ServerParams(
        wanted.name or folder.name, wanted.api_key, page=PAGE.read_text(encoding="utf-8")
    )
    # A learner's server of before there were experts takes no more than three.
    more = (_expert_load(assembled),) if models.has_experts(folder) else ()
    app = server.create_app(asynchronous, tokenizer, params, *more)
    try:
        return _run(app, wanted, params.model_name, assembled.ranks)
    finally:
        assembled.close()


def _expert_load(assembled: Engine) -> Callable[[], dict[int, list[int]]]:
    return functools.partial(importlib.import_module("week3.moe").expert_load, assembled.model)


def _engine(wanted: Serving, folder: Path, tokenizer: Any) -> tuple[Engine, str]:
    """Load the model and make the engine; returns it, and whose labs it is made of."""
    device = talk.choose_device(wanted.device)
    yours, _, remarks = talk.chosen_labs(wanted.engine, serving=True)
    if wanted.trace is not None:
        wanted = replace(wanted, on_step=_recorder(Path(wanted.trace)))
    assembled = assemble(
        yours,
        folder,
        wanted.dtype,
        tokenizer,
        models.eos_token_ids(folder, tokenizer),
        set(week_labs()) - yours,
        wanted.quantization,
        device,
        wanted,
    )
    # A server needs all of them, so that the reference stands in for what is not green.
    sources = {
        lab: assembled.sources.get(lab, YOURS if lab in yours else REFERENCE)
        for lab in week_labs()
        if lab in assembled.sources or lab.week == WEEK
    }
    return assembled, "\n".join([talk.sources_table(sources), *remarks])


def _recorder(file: Path) -> Callable[[dict[str, Any]], None]:
    """Open a trace; every step becomes a line of it at once."""
    stream = file.open("w", encoding="utf-8", buffering=1)
    return lambda record: print(json.dumps(record), file=stream)


def _run(app: Any, wanted: Serving, name: str, ranks: Any | None) -> int:
    """Serve until somebody stops the process, or a rank fails; returns the exit status."""
    import uvicorn

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: list | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                port = self.servers[0].sockets[0].getsockname()[1]
                _announce(wanted, name, port)

    config = uvicorn.Config(
        app,
        host=wanted.host,
        port=wanted.port,
        log_level="warning",
        timeout_graceful_shutdown=DRAIN_SECONDS,
    )
    server = Announcing(config)
    if ranks is None:
        server.run()
        return 0

    def end(reason: str) -> None:
        talk.tell(f"course: {reason}; the server ends")
        server.should_exit = True

    ranks.on_failure = end
    if ranks.failure is not None:  # before anybody was told
        end(ranks.failure)
    server.run()
    return 1 if ranks.failure is not None else 0


def _announce(wanted: Serving, name: str, port: int) -> None:
    url = f"http://{wanted.host}:{port}"
    key = "" if wanted.api_key is None else ' -H "Authorization: Bearer $API_KEY"'
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Who are you?"}]})
    print(f"\nServing {name} at {url} (a chat page), {url}/v1 (for clients). Ctrl-C stops it.")
    print(
        f"Try: curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )
    sys.stdout.flush()
