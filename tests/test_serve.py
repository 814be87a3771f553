"""The server: scores of inference.py, 50 clients, bounds, refused requests, the page in a browser, the command."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import uvicorn
from fastapi import FastAPI

from common import errors
from common.errors import InputError
from lora_training import serve
from lora_training.adapters import load_adapted, read_saved
from lora_training.ask import Asker, Found, Query, Task, find_query, open_codes
from lora_training.serve_app import MAX_BODY, Batcher, Limits, build_app, page_headers
from tests.browser import browser
from tests.conftest import M
from tests.test_inference import World, of, rows_by_id, run, world  # noqa: F401

CARD = {
    "entities": M,
    "dataset": "ring",
    "base_model": "tiny",
    "relations": ["next", "over"],
    "limits": {"beams": 2 * M},
}


class Reply(NamedTuple):
    status: int
    body: Any
    headers: Any


def call(url: str, path: str, body: Any = None, **headers: str) -> Reply:
    """GET, or POST of a value as JSON (bytes as they are)."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            text, status, found = reply.read(), reply.status, reply.headers
    except urllib.error.HTTPError as error:
        text, status, found = error.read(), error.code, error.headers
    json_text = (found["content-type"] or "").startswith("application/json")
    return Reply(status, json.loads(text) if json_text else text.decode(), found)


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of an application that runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    bound = serve.listen("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        bound.close()


def make_asker(world: World, ring: Path, named: bool = False, size: float = 1) -> Asker:  # noqa: F811
    saved = read_saved(world.named_adapter if named else world.adapter)
    model: Any = load_adapted(saved, str(world.base), torch.float32).merge_and_unload()
    model.lm_head.weight.data *= size  # 0.1: likelihoods of a trained model's size, where float32 resolves 1e-5
    source = open_codes(saved.record["codes"], None if named else world.codes, ring)
    return Asker(model, saved.tokenizer, source, beams=2 * M)


@pytest.fixture(scope="module")
def asker(world: World, ring: Path) -> Asker:  # noqa: F811
    return make_asker(world, ring, size=0.1)


@pytest.fixture(scope="module")
def url(asker: Asker) -> Iterator[str]:
    with served(build_app(asker, Limits(8, 64, 60), CARD, serve.LOOPBACK)) as address:
        yield address


def scores_of(body: Any) -> dict[str, float]:
    return {answer["entity"]: answer["log_likelihood"] for answer in body["answers"]}


# ---------------------------------------------------------------- what is answered


@pytest.mark.parametrize("named", [False, True])
def test_a_list_has_the_scores_of_inference(world: World, ring: Path, tmp_path: Path, named: bool) -> None:  # noqa: F811
    data = (world.named if named else world.mix) / "link_prediction"
    adapter = world.named_adapter if named else world.adapter
    answers = of(
        run(world, tmp_path, "--decode", "likelihood", "--limit", 6, data=data, adapter=adapter), "link_prediction"
    )
    rows = rows_by_id(data)
    with served(build_app(make_asker(world, ring, named), Limits(8, 64, 60), CARD)) as address:
        for answer in answers[:6]:
            row = rows[answer["id"]]
            asked = {"head": row["head"], "relation": row["relation"], "candidates": answer["candidates"]}
            reply = call(address, "/rank", asked)
            assert reply.status == 200 and reply.body["over"] == "list"
            expected = dict(zip(answer["candidates"], answer["scores"], strict=True))
            assert scores_of(reply.body) == pytest.approx(expected, abs=1e-5)
            assert {row["direction"] for row in rows.values() if row["candidates"]} == {"head", "tail"}


def test_all_entities_are_ranked_and_nothing_else(url: str, asker: Asker) -> None:
    source = asker.source
    for asked in ({"head": "e7", "relation": "inverse of over"}, {"question": "What is next to Entity 3?"}):
        everything = call(url, "/rank", {**asked, "top": 2 * M}).body
        listed = call(url, "/rank", {**asked, "top": M, "candidates": source.names.names}).body
        assert everything["over"] == "all" and everything["head"]["name"] in ("Entity 7", "Entity 3")
        assert scores_of(everything) == pytest.approx(scores_of(listed), abs=1e-5)
        found = everything["answers"]
        assert {answer["entity"] for answer in found} == set(source.kg.entities) and len(found) == M
        assert [answer["rank"] for answer in found] == list(range(1, M + 1))
        likelihoods = [answer["log_likelihood"] for answer in found]
        assert likelihoods == sorted(likelihoods, reverse=True)
        for answer in found:
            e = source.kg.entities.index(answer["entity"])
            assert source.codes is not None
            assert (answer["name"], answer["codes"]) == (source.names.names[e], source.codes[e].tolist())
        assert call(url, "/rank", {**asked, "top": 3}).body["answers"] == found[:3]


def test_a_narrow_search_returns_as_many_as_are_wanted(asker: Asker) -> None:
    narrow = replace(asker, beams=4)
    assert len(narrow.question("What is next to Entity 3?")) >= 4 and len(narrow.query(Query(7, 1))) >= 4


def test_candidates_go_by_any_of_their_names_and_count_once(url: str, asker: Asker) -> None:
    asked = {"head": "entity 7", "relation": "next", "candidates": ["e8", "Entity 8", "ENTITY 9", "Entity 10"]}
    body = call(url, "/rank", asked).body
    assert sorted(scores_of(body)) == ["e10", "e8", "e9"]
    triples = asker.source.kg.split("train").tolist()
    known = {answer["entity"]: answer["known"] for answer in body["answers"]}
    h, r = find_query("e7", "next", asker.source)
    assert known["e9"] is None and (known["e8"] == "train") == ([h, r, asker.source.kg.entities.index("e8")] in triples)


def test_fifty_clients_get_their_own_answers(asker: Asker) -> None:
    """Nothing lost, nothing mixed: every reply equals what the model computes for that request alone."""
    asker = replace(asker, beams=10)
    names, kg = asker.source.names.names, asker.source.kg
    asked: list[dict[str, Any]] = []
    for i in range(100):
        query: dict[str, Any] = {"head": names[i % M], "relation": ["next", "over", "inverse of hub"][i % 3]}
        listed = query | {"candidates": [names[(i * 7 + j * 5) % M] for j in range(i % 6 + 2)]}
        asked.append([query, listed, {"question": f"What is {i} from {names[i % M]}?"}][i // 2 % 3])

    def alone(request: dict[str, Any]) -> dict[str, float]:
        listed = tuple(names.index(name) for name in request["candidates"]) if "candidates" in request else None
        if "question" in request:
            task = asker.question_task(request["question"], listed)
        else:
            task = asker.query_task(find_query(request["head"], request["relation"], asker.source), listed)
        found = asker.rank([task])[0][:10]
        return {kg.entities[answer.entity]: answer.score for answer in found}

    app = build_app(asker, Limits(8, 64, 120), CARD)
    with served(app) as address, ThreadPoolExecutor(50) as clients:
        replies = list(clients.map(lambda request: call(address, "/rank", request), asked))
        computed = call(address, "/health").body["computed"]
    assert [reply.status for reply in replies] == [200] * len(asked)
    for request, reply in zip(asked, replies, strict=True):
        assert scores_of(reply.body) == pytest.approx(alone(request), abs=1e-5), request
    assert computed["requests"] == 100 and computed["batches"] < 80


def test_card_health_and_interface(url: str) -> None:
    assert call(url, "/card").body == CARD and call(url, "/health").body["status"] == "ok"
    interface = call(url, "/openapi.json").body
    replies = interface["paths"]["/rank"]["post"]["responses"]
    assert set(replies) == {"200", "408", "413", "422", "503"}
    assert "swagger" in call(url, "/docs").body.lower()
    assert "access-control-allow-origin" not in call(url, "/card", Origin="http://evil.example").headers


# ---------------------------------------------------------------- what is refused

QUERY = {"head": "e7", "relation": "next"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"head": "e7"}, "give head and relation, or question"),
        (QUERY | {"question": "x"}, "give head and relation, or question"),
        ({"head": "Entity 77", "relation": "next"}, "no entity is called 'Entity 77'"),
        ({"head": "e7", "relation": "likes"}, "no relation is called 'likes'"),
        (QUERY | {"candidates": ["e8", "e99"]}, "no entity is called 'e99'"),
        (QUERY | {"candidates": []}, "candidates: "),
        (QUERY | {"candidates": ["e8"] * 1001}, "candidates: "),
        (QUERY | {"top": 0}, "top: "),
        (QUERY | {"top": 2 * M + 1}, f"searched with {2 * M} beams"),
        (QUERY | {"tpo": 3}, "tpo: "),
        ({"head": "x" * 501, "relation": "next"}, "head: "),
        ({"question": "東" * 900}, "the model reads 2048"),
        (b'{"head": ', "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b"\xff\xfe", "not a JSON object"),
    ],
)
def test_a_bad_request_is_422_with_one_line(url: str, body: Any, words: str) -> None:
    reply = call(url, "/rank", body)
    assert reply.status == 422 and list(reply.body) == ["detail"]
    assert words in reply.body["detail"] and "\n" not in reply.body["detail"]


def test_large_slow_and_foreign_requests_are_refused(asker: Asker) -> None:
    with served(build_app(asker, Limits(8, 64, 0.4), CARD, serve.LOOPBACK)) as address:
        host, port = address.removeprefix("http://").split(":")

        def raw(head: str, body: bytes) -> str:
            with socket.create_connection((host, int(port)), timeout=20) as client:
                client.sendall(f"POST /rank HTTP/1.1\r\nHost: localhost:{port}\r\n{head}\r\n\r\n".encode() + body)
                return client.recv(4096).decode().split("\r\n")[0]

        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        assert "413" in raw(f"Content-Length: {MAX_BODY + 1}", b"")
        assert "413" in raw("Transfer-Encoding: chunked", chunk * (MAX_BODY // 0x10000 + 1))
        assert "408" in raw("Content-Length: 100", b'{"head"')
        assert call(address, "/card", Host="evil.example").status == 400
        for name in (f"localhost:{port}", "[::1]:80", "127.0.0.1"):
            assert call(address, "/card", Host=name).status == 200


@contextmanager
def held_model(app: FastAPI) -> Iterator[threading.Event]:
    """The model computes only after the event is set."""
    batcher, release = app.state.service.batcher, threading.Event()
    rank = batcher.rank
    batcher.rank = lambda tasks: release.wait(60) and rank(tasks)
    try:
        yield release
    finally:
        release.set()


def until_waiting(address: str, count: int) -> None:
    while call(address, "/health").body["waiting"] != count:
        time.sleep(0.01)


def test_a_full_queue_is_503_and_goes_on(asker: Asker) -> None:
    app = build_app(asker, Limits(1, 2, 60), CARD)
    with served(app) as address, held_model(app) as release, ThreadPoolExecutor(3) as clients:
        accepted = [clients.submit(call, address, "/rank", QUERY) for _ in range(2)]
        until_waiting(address, 2)
        refused = call(address, "/rank", QUERY)
        assert refused.status == 503 and "--queue" in refused.body["detail"] and refused.headers["retry-after"]
        release.set()
        assert [one.result().status for one in accepted] == [200, 200]
        assert call(address, "/rank", QUERY).status == 200 and call(address, "/health").body["waiting"] == 0


def test_a_late_answer_is_503_and_is_not_computed(asker: Asker) -> None:
    app = build_app(asker, Limits(1, 8, 3), CARD)
    with served(app) as address, held_model(app) as release, ThreadPoolExecutor(3) as clients:
        replies = list(clients.map(lambda _: call(address, "/rank", QUERY), range(3)))
        assert [reply.status for reply in replies] == [503] * 3 and "within 3 s" in replies[0].body["detail"]
        release.set()
        assert call(address, "/rank", QUERY).status == 200
        assert call(address, "/health").body["computed"]["requests"] == 2, "the one under way, and the last"


def test_one_failing_task_does_not_take_others_with_it() -> None:
    tasks = [Task([i], i % 2 == 0, None, {}) for i in range(8)]
    seen: list[list[int]] = []

    def rank(batch: list[Task]) -> list[list[Found]]:
        seen.append([task.prompt[0] for task in batch])
        if any(task.prompt == [4] for task in batch):
            raise RuntimeError("four")
        return [[Found(task.prompt[0], 0.0, "")] for task in batch]

    async def all_of_them() -> list[Any]:
        batcher = Batcher(rank, 3)
        worker = asyncio.create_task(batcher.run())
        found = await asyncio.gather(*map(batcher.find, tasks), return_exceptions=True)
        worker.cancel()
        return found

    found = asyncio.run(all_of_them())
    assert [one[0].entity for i, one in enumerate(found) if i != 4] == [0, 1, 2, 3, 5, 6, 7]
    assert isinstance(found[4], RuntimeError)
    assert seen == [[0, 2, 4], [0], [2], [4], [1, 3, 5], [6], [7]], "one kind at a time, the oldest first"


# ---------------------------------------------------------------- the page


def test_the_page_ranks_tails_and_marks_shared_codes(asker: Asker, tmp_path: Path, monkeypatch: Any) -> None:
    source = asker.source
    assert source.codes is not None
    evil = "<img src=x onerror=\"document.title='taken'\">"
    names = [evil if e == 5 else name for e, name in enumerate(source.names.names)]
    monkeypatch.setattr(source, "names", source.names._replace(names=names))
    with served(build_app(asker, Limits(8, 64, 60), CARD, serve.LOOPBACK)) as address, browser(tmp_path) as tab:
        tab.open(address)
        tab.wait("document.querySelectorAll('#relations option').length === 4")
        tab.type("#head", "Entity 7")
        tab.type("#relation", "next")
        tab.type("#top", str(M))
        tab.press_enter()
        tab.wait(f"document.querySelectorAll('tr.answer').length === {M}")
        body = call(address, "/rank", QUERY | {"top": M}).body
        shown = tab.run("[...document.querySelectorAll('tr.answer .id')].map((one) => one.textContent)")
        assert shown == [f"[{answer['entity']}]" for answer in body["answers"]]
        assert evil in tab.run("document.querySelector('#answers').textContent")
        assert tab.run("document.images.length") == 0 and tab.run("document.title") != "taken"
        head = source.kg.entities.index("e7")
        for place, answer in enumerate(body["answers"]):
            codes = source.codes[source.kg.entities.index(answer["entity"])]
            row = f"[...document.querySelectorAll('tr.answer')[{place}].querySelectorAll('.code')]"
            assert tab.run(f"{row}.map((one) => Number(one.textContent))") == codes.ravel().tolist()
            marked = tab.run(f"{row}.map((one) => one.classList.contains('head'))")
            assert marked == (codes == source.codes[head]).ravel().tolist()
            among = tab.run(f"{row}.map((one) => one.classList.contains('among'))")
            assert among == ((source.codes == codes).sum(axis=0) > 1).ravel().tolist()
        tab.type("#head", "Entity 77")
        tab.press_enter()
        tab.wait("document.querySelector('#status.problem')")
        assert "no entity is called 'Entity 77'" in tab.run("document.querySelector('#status').textContent")


def test_the_page_runs_only_its_own_script() -> None:
    one, other = (page_headers(f"<style>a</style><script>{text}</script>") for text in ("b", "c"))
    assert one != other and "default-src 'none'" in one["Content-Security-Policy"]


# ---------------------------------------------------------------- the command


def flags(world: World, ring: Path, *words: str) -> list[str]:  # noqa: F811
    given = ["--lora_adapter", world.adapter, "--codes", world.codes, "--dataset", ring, "--device", "cpu", *words]
    return [str(word) for word in given]


def test_ctrl_c_answers_what_waits_and_ends(
    world: World, ring: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    rank, started, replies = Asker.rank, threading.Event(), []
    port = free_port()

    def slow(self: Asker, tasks: list[Task]) -> list[list[Found]]:
        started.set()
        time.sleep(0.5)
        return rank(self, tasks)

    def client() -> None:
        while True:
            try:
                call(f"http://127.0.0.1:{port}", "/health")
                break
            except OSError:
                time.sleep(0.05)
        replies.append(call(f"http://127.0.0.1:{port}", "/card"))
        threading.Thread(target=interrupt).start()
        replies.append(call(f"http://127.0.0.1:{port}", "/rank", QUERY))

    def interrupt() -> None:
        started.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Asker, "rank", slow)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as end:
        errors.run_command(lambda: serve.main(flags(world, ring, "--port", str(port))))
    signal.signal(signal.SIGINT, before)
    thread.join(30)
    captured = capsys.readouterr()
    assert end.value.code == 130 and f"http://127.0.0.1:{port}/" in captured.out
    assert captured.err.splitlines()[-1] == "stopped by Ctrl-C" and "Traceback" not in captured.err
    card, ranking = replies
    assert ranking.status == 200 and len(ranking.body["answers"]) == 10
    assert card.body["entities"] == M and card.body["codes"]["num_code"] == 8
    assert str(world.folder) not in json.dumps(card.body), "no folders of this machine"


def free_port() -> int:
    with serve.listen("127.0.0.1", 0) as bound:
        return int(bound.getsockname()[1])


def test_two_servers_that_start_at_once_do_not_share_a_port() -> None:
    with serve.listen("127.0.0.1", 0) as first, pytest.raises(InputError, match="in use; give another --port"):
        serve.listen("127.0.0.1", first.getsockname()[1])


def test_wrong_flags_are_refused_before_the_weights(
    world: World, ring: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(serve, "load_model", lambda *_: pytest.fail("weights were loaded"))
    with serve.listen("127.0.0.1", 0) as taken, pytest.raises(InputError, match="in use; give another --port"):
        serve.main(flags(world, ring, "--port", str(taken.getsockname()[1])))
    with pytest.raises(InputError, match="cannot listen on --host"):
        serve.main(flags(world, ring, "--port", "0", "--host", "192.0.2.1"))
    for words in (["--queue", "0"], ["--timeout", "0"], ["--timeout", "nan"], ["--port", "70000"], ["--beams", "-1"]):
        with pytest.raises(SystemExit) as end:
            serve.main(flags(world, ring, *words))
        assert end.value.code == 2 and words[0] in capsys.readouterr().err
    monkeypatch.setattr(serve, "NEEDED", ("fastapi", "no_such_package"))
    with pytest.raises(InputError, match="needs no_such_package: python -m pip install no_such_package"):
        serve.main(flags(world, ring))
