"""The HTTP side of serve.py: form and limits of requests, the queue that computes them in batches, and the endpoints.

Two threads beside the event loop: one looks names up and tokenizes, one runs the model. Every bad request is answered
by the first, so that it never waits for the model.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from Class.source import Source
from common.errors import InputError
from data.knowledge_graph import NameIndex
from lora_training.ask import Asker, Found, Query, Task, find_relation, mark_entity
from lora_training.memory import memory_wanted

PAGE = Path(__file__).resolve().parent / "serve_page.html"
MAX_BODY = 1 << 18  # bytes; 1,000 long names fit
MAX_CANDIDATES = 1000
Name = Annotated[str, Field(min_length=1, max_length=500)]


class Limits(NamedTuple):
    """What bounds the work of the server."""

    batch_size: int  # requests in one forward pass
    queue: int  # requests that wait or are computed
    timeout: float  # seconds until a request is given up


# ---------------------------------------------------------------- form of requests and answers


class RankRequest(BaseModel):
    """A query (head and relation) or a question in words."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"head": "Ada Ashley", "relation": "mother", "top": 3}]},
    )
    head: Name | None = Field(None, description="entity, by id, name or label")
    relation: Name | None = Field(None, description='relation, by id or label; "inverse of ..." ranks heads')
    question: Annotated[str, Field(min_length=1, max_length=2000)] | None = Field(
        None, description="a question in words, instead of head and relation; an entity's name in it gets its codes"
    )
    top: int = Field(10, ge=1, le=MAX_CANDIDATES, description="answers to return")
    candidates: Annotated[list[Name], Field(min_length=1, max_length=MAX_CANDIDATES)] | None = Field(
        None, description="entities to rank, by id, name or label; without them all entities are searched"
    )

    @model_validator(mode="after")
    def one_way_to_ask(self) -> RankRequest:
        if (self.head is None) != (self.relation is None) or (self.question is None) == (self.head is None):
            raise ValueError("give head and relation, or question")
        return self


class Entity(BaseModel):
    """An entity of the graph."""

    entity: str = Field(description="id, the raw name in the data set")
    name: str = Field(description="readable name, no two equal")
    codes: list[list[int]] | None = Field(description="codes [L][Q]; null in data without codes")


class RankedEntity(BaseModel):
    """One answer."""

    rank: int
    entity: str = Field(description="id, as in ``head``")
    name: str
    log_likelihood: float = Field(description="log P of the entity's codes (of its name, for a question)")
    known: str | None = Field(description="the split that contains this answer, or null")
    codes: list[list[int]] | None


class Ranking(BaseModel):
    """The answers, best first."""

    head: Entity | None = Field(description="the entity of the query, or the one recognised in the question")
    relation: str | None
    over: str = Field(description='"list": all candidates were scored; "all": beam search over all entities')
    answers: list[RankedEntity]


class Problem(BaseModel):
    """Why a request was not answered, in one line."""

    detail: str


# ---------------------------------------------------------------- names -> tasks -> answers


class Desk:
    """Turns requests into tasks, and what was found into answers."""

    def __init__(self, asker: Asker) -> None:
        self.asker = asker
        kg = asker.source.kg
        self.index = NameIndex(kg.entities, [asker.source.names.names, kg.labels])  # made once: M may be large
        asker.trie(False), asker.trie(True)  # now, since the two threads share them

    @property
    def source(self) -> Source:
        return self.asker.source

    def find(self, name: str) -> int:
        """The entity of a name."""
        return self.index.find(name, "entity")

    def prepare(self, asked: RankRequest) -> tuple[Task, dict[str, Any]]:
        """The task of a request, and what the answer says of it. InputError if it cannot be answered."""
        listed = None if asked.candidates is None else tuple(dict.fromkeys(map(self.find, asked.candidates)))
        if listed is None and asked.top > self.asker.beams:
            raise InputError(
                f"top is {asked.top}, and all entities are searched with {self.asker.beams} beams; ask for fewer, give "
                "candidates, or start the server with more --beams"
            )
        over = "all" if listed is None else "list"
        if asked.question is not None:
            about = mark_entity(asked.question, self.source)[1]
            head = None if about is None else self.entity(about)
            return self.asker.question_task(asked.question, listed), {"head": head, "relation": None, "over": over}
        assert asked.head is not None and asked.relation is not None, "checked by the form"
        query = Query(self.find(asked.head), find_relation(asked.relation, self.source))
        relation = self.source.query_fields(*query)["relation"]
        head = self.entity(query.head)
        return self.asker.query_task(query, listed), {"head": head, "relation": relation, "over": over}

    def entity(self, e: int) -> dict[str, Any]:
        """The fields of ``Entity``."""
        source = self.source
        codes = None if source.codes is None else source.codes[e].tolist()
        return {"entity": source.kg.entities[e], "name": source.names.names[e], "codes": codes}

    def answers(self, found: Sequence[Found]) -> list[RankedEntity]:
        """What was found, with its names and codes."""
        return [
            RankedEntity(rank=place, log_likelihood=one.score, known=one.known or None, **self.entity(one.entity))
            for place, one in enumerate(found, 1)
        ]


# ---------------------------------------------------------------- the queue


class Busy(Exception):
    """The request was not computed; answered with 503."""


class _Waiting(NamedTuple):
    task: Task
    found: asyncio.Future[list[Found]]


class Batcher:
    """Computes waiting tasks in one thread: the oldest, and with it others of its kind."""

    def __init__(self, rank: Callable[[list[Task]], list[list[Found]]], batch_size: int) -> None:
        self.rank, self.batch_size = rank, batch_size
        self.waiting: deque[_Waiting] = deque()
        self.wake = asyncio.Event()
        self.thread = ThreadPoolExecutor(1, "model")
        self.batches = self.computed = 0

    async def find(self, task: Task) -> list[Found]:
        """The answers to a task. What ``rank`` raises for this task alone is raised here."""
        one = _Waiting(task, asyncio.get_running_loop().create_future())
        self.waiting.append(one)
        self.wake.set()
        return await one.found

    async def run(self) -> None:
        """Compute whatever waits, until cancelled."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            while batch := self._next():
                await self._compute(batch)

    def _next(self) -> list[_Waiting]:
        """The next tasks of one kind, oldest first; those that were given up are dropped."""
        live = [one for one in self.waiting if not one.found.done()]
        batch = [one for one in live if one.task.kind == live[0].task.kind][: self.batch_size]
        chosen = set(map(id, batch))
        self.waiting = deque(one for one in live if id(one) not in chosen)
        return batch

    async def _compute(self, batch: list[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self.thread, self.rank, [one.task for one in batch])
        except Exception as error:
            if len(batch) == 1:
                if not batch[0].found.done():
                    batch[0].found.set_exception(error)
                return
            for one in batch:  # one task must not take the others with it
                await self._compute([one])
            return
        self.batches += 1
        self.computed += len(batch)
        for one, found in zip(batch, results, strict=True):
            if not one.found.done():
                one.found.set_result(found)


class Service:
    """Places in the queue, and the time that a request may take."""

    def __init__(self, desk: Desk, limits: Limits) -> None:
        self.desk, self.limits = desk, limits
        self.batcher = Batcher(desk.asker.rank, limits.batch_size)
        self.preparing = ThreadPoolExecutor(1, "names")
        self.inside = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue; Busy if there is none."""
        if self.inside >= self.limits.queue:
            raise Busy(f"{self.inside} requests are waiting, which is the limit (--queue); try again later")
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1

    async def answer(self, asked: RankRequest) -> Ranking:
        """The answer to a request. Raises InputError or Busy."""
        with self.place():
            try:
                async with asyncio.timeout(self.limits.timeout):
                    loop = asyncio.get_running_loop()
                    task, about = await loop.run_in_executor(self.preparing, self.desk.prepare, asked)
                    found = await self.batcher.find(task)
            except TimeoutError as error:
                raise Busy(f"no answer within {self.limits.timeout:g} s (--timeout); try again later") from error
            except Exception as error:
                if memory_wanted(error) is None:
                    raise
                raise Busy("not enough memory for this request; give fewer candidates, or try again later") from error
        return Ranking(answers=self.desk.answers(found[: asked.top]), **about)

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """The batcher runs while the server does."""
        worker = asyncio.create_task(self.batcher.run())
        yield
        worker.cancel()
        for thread in (self.preparing, self.batcher.thread):
            thread.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- before a request is read


class Guard:
    """Refuses foreign Host headers, bodies that are too large or too slow, before anything else sees the request."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str], timeout: float) -> None:
        """``hosts``: names that the server answers to; empty: any."""
        self.app, self.hosts, self.timeout = app, hosts, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = host_name(headers.get("host", ""))
        length = headers.get("content-length", "")
        body: bytes | None = b""
        if self.hosts and host not in self.hosts:  # a web page that renamed itself to this address (DNS rebinding)
            await problem(400, f"this server does not answer to the host {host[:100]!r}")(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.timeout):
                body = None if length.isdigit() and int(length) > MAX_BODY else await read_body(receive)
        except TimeoutError:
            await problem(408, f"the request was not complete within {self.timeout:g} s")(scope, receive, send)
            return
        if body is None:
            await problem(413, f"the request is larger than {MAX_BODY:,} bytes")(scope, receive, send)
            return
        first = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, replay, send)


def host_name(header: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return header


async def read_body(receive: Receive) -> bytes | None:
    """The body; None if it is larger than ``MAX_BODY``. A client that leaves sends what it has sent."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY:
            return None
    return body


def problem(status: int, detail: str) -> JSONResponse:
    """A ``Problem``."""
    headers = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"detail": " ".join(detail.split())}, status, headers)


# ---------------------------------------------------------------- endpoints


def page_headers(page: str) -> dict[str, str]:
    """Only the page's own script and style run, and nothing is loaded from elsewhere."""

    def sources(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in hashes)

    policy = (
        f"default-src 'none'; script-src {sources('script')}; style-src {sources('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def build_app(asker: Asker, limits: Limits, card: dict[str, Any], hosts: frozenset[str] = frozenset()) -> FastAPI:
    """The application; ``card`` is what GET /card returns, ``hosts`` as in ``Guard``."""
    service = Service(Desk(asker), limits)
    app = FastAPI(
        title="Entities ranked by an LLM that reads their codes", lifespan=service.running, version="1",
        description="POST /rank returns entities of the graph and nothing else. Errors: `{\"detail\": one line}`.",
    )  # fmt: skip
    app.state.service = service
    app.add_middleware(Guard, hosts=hosts, timeout=limits.timeout)
    page = PAGE.read_text(encoding="utf-8")
    refusals: dict[int | str, dict[str, Any]] = {
        408: {"model": Problem, "description": "The request came too slowly"},
        413: {"model": Problem, "description": f"The request is larger than {MAX_BODY:,} bytes"},
        422: {"model": Problem, "description": "A field is missing or wrong, or a name is unknown or ambiguous"},
        503: {"model": Problem, "description": "The queue is full, the time is over, or memory does not suffice"},
    }

    @app.post("/rank", responses=refusals)
    async def rank(asked: RankRequest) -> Ranking:
        """Rank entities as answers to a query or a question, over a list or over all entities."""
        return await service.answer(asked)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether the server runs, requests in the queue, and what was computed since the start."""
        batcher = service.batcher
        counts = {"requests": batcher.computed, "batches": batcher.batches}
        return {"status": "ok", "waiting": service.inside, "computed": counts}

    @app.get("/card")
    async def describe() -> dict[str, Any]:
        """Data set, model, codes, relations and limits."""
        return card

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=page_headers(page))

    @app.exception_handler(InputError)
    async def bad_input(request: Request, error: InputError) -> JSONResponse:
        return problem(422, str(error))

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> JSONResponse:
        return problem(503, str(error))

    @app.exception_handler(RequestValidationError)
    async def bad_form(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] in ("json_invalid", "model_attributes_type", "missing"):
            return problem(422, "the body is not a JSON object with the header Content-Type: application/json")
        where = ".".join(str(part) for part in first["loc"][1:])
        return problem(422, (f"{where}: " if where else "") + first["msg"].removeprefix("Value error, "))

    return app
