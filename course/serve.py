"""`course serve`: the engine that the labs make, behind an OpenAI-compatible HTTP server."""

import functools
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course import models, talk
from course.engine import REFERENCE, YOURS, Engine, LabCrashed, assemble
from course.grading import LabUnusable
from course.labs import week_labs

PAGE = Path(__file__).parent / "pages" / "chat.html"
WEEK = "week3"
# How long requests may go on after somebody has asked the server to stop.
DRAIN_SECONDS = 30
# Of a CPU's memory that is free, and of a GPU's whole memory: what the pool may take.
CPU_SHARE, GPU_SHARE = 0.25, 0.9
UNKNOWN_CPU_BYTES = 1e9


@dataclass(frozen=True)
class Serving:
    """What the command line asks of the server.

    model, engine, dtype, quantization, device: as in `talk.Request`. name: what clients call the
    model; None means its folder's name. kv_gb: 10**9 bytes of the KV pool, None means a share of
    the memory that there is. max_waiting: as in `AsyncEngine`. trace: a file that gets a line for
    each step. The others as in week3's EngineLimits and ServerParams; max_model_len None means the
    model's whole context.
    Raises ValueError for a number below 1.
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
    kv_gb: float | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_waiting: int = 256
    token_budget: int = 512
    block_size: int = 16
    prefix_caching: bool = True
    trace: str | None = None

    def __post_init__(self):
        for name in ("max_model_len", "max_num_seqs", "token_budget", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.kv_gb is not None and not self.kv_gb > 0:
            raise ValueError(f"kv_gb must be above 0, got {self.kv_gb}")
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")


def serve(wanted: Serving) -> int:
    """Serve until somebody stops the process; returns the exit status."""
    try:
        folder = models.resolve_model(wanted.model, report=talk.tell)
        tokenizer = models.load_tokenizer(folder)
        engine, table = _engine(wanted, folder, tokenizer)
    except (LabCrashed, LabUnusable, models.ModelUnavailable) as error:
        return talk.refuse(error)
    print(table)
    server = importlib.import_module("week3.server")
    threaded = importlib.import_module("week3.async_engine")
    asynchronous = threaded.AsyncEngine(engine, wanted.max_waiting)
    params = server.ServerParams(
        wanted.name or folder.name, wanted.api_key, page=PAGE.read_text(encoding="utf-8")
    )
    _run(server.create_app(asynchronous, tokenizer, params), wanted, params.model_name)
    return 0


def paged_engine(
    assembled: Engine,
    device: str,
    wanted: Serving,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Any:
    """Put week 3's engine around a model that `assemble` has loaded.

    device: where the model lies. Raises ValueError where the KV pool has no room.
    """
    lab, model = importlib.import_module("week3.engine"), assembled.model
    itemsize = model.embed_tokens.weight.itemsize
    num_bytes = _pool_bytes(device) if wanted.kv_gb is None else int(wanted.kv_gb * 1e9)
    num_blocks, max_model_len = lab.plan_pool(
        model.config, num_bytes, itemsize, wanted.block_size, wanted.max_model_len
    )
    # More than all requests together can fill would lie there for nothing.
    blocks = importlib.import_module("week3.block_manager")
    per_request = blocks.num_blocks_for(max_model_len, wanted.block_size)
    limits = lab.EngineLimits(
        num_blocks=min(num_blocks, per_request * wanted.max_num_seqs + 1),
        max_model_len=max_model_len,
        max_num_seqs=wanted.max_num_seqs,
        token_budget=max(wanted.token_budget, wanted.max_num_seqs),
        block_size=wanted.block_size,
        prefix_caching=wanted.prefix_caching,
    )
    asked = wanted.max_model_len or model.config.max_position_embeddings
    if max_model_len < asked:
        talk.tell(f"The KV pool holds {max_model_len} tokens, so no request may have {asked}.")
    return lab.Engine(
        model,
        assembled.tokenizer,
        assembled.eos_token_ids,
        limits,
        _make_attend(device),
        on_step,
    )


def _engine(wanted: Serving, folder: Path, tokenizer: Any) -> tuple[Any, str]:
    """Load the model and make the engine; returns it, and whose labs it is made of."""
    device = talk.choose_device(wanted.device)
    yours, _, remarks = talk.chosen_labs(wanted.engine, serving=True)
    assembled = assemble(
        yours,
        folder,
        wanted.dtype,
        tokenizer,
        models.eos_token_ids(folder, tokenizer),
        set(week_labs()) - yours,
        wanted.quantization,
        device,
    )
    on_step = None if wanted.trace is None else _recorder(Path(wanted.trace))
    engine = paged_engine(assembled, device, wanted, on_step)
    # A server needs all of them, so that the reference stands in for what is not green.
    sources = assembled.sources | {
        lab: YOURS if lab in yours else REFERENCE for lab in week_labs() if lab.week == WEEK
    }
    return engine, "\n".join([talk.sources_table(sources), *remarks])


def _make_attend(device: str) -> Callable:
    attention = importlib.import_module("week3.paged_attention")
    if device == "cpu":
        return attention.paged_attend
    kernels = importlib.import_module("week3.paged_kernels")
    return functools.partial(
        attention.paged_attend,
        store=kernels.store_kv,
        prefill=kernels.paged_prefill,
        decode=kernels.paged_decode,
    )


def _pool_bytes(device: str) -> int:
    """Say how many bytes a KV pool may take beside what this process holds already."""
    if device == "cpu":
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, ValueError):  # macOS and Windows do not tell it this way
            return int(UNKNOWN_CPU_BYTES)
        return int(CPU_SHARE * free)
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    return max(0, int(GPU_SHARE * total) - torch.cuda.memory_reserved(device))


def _recorder(file: Path) -> Callable[[dict[str, Any]], None]:
    """Open a trace; every step becomes a line of it at once."""
    stream = file.open("w", encoding="utf-8", buffering=1)
    return lambda record: print(json.dumps(record), file=stream)


def _run(app: Any, wanted: Serving, name: str) -> None:
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
    Announcing(config).run()


def _announce(wanted: Serving, name: str, port: int) -> None:
    url = f"http://{wanted.host}:{port}"
    key = "" if wanted.api_key is None else ' -H "Authorization: Bearer $API_KEY"'
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Who are you?"}]})
    print(f"\nServing {name} at {url} (a chat page), {url}/v1 (for clients). Ctrl-C stops it.")
    print(
        f"Try: curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )
    sys.stdout.flush()
