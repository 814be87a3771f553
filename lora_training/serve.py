"""Serve a tuned model over HTTP: entities ranked as answers to a query or a question, and a page to look at them.

    python lora_training/serve.py --lora_adapter lora_training/lora_outputs/lora_adapters

POST /rank takes "head" and "relation", or "question", and if wanted "top" and "candidates". GET / is a page for people,
/health, /card and /docs say what runs. Waiting requests are computed in one batch. The scores are those of inference.py
--decode likelihood. Needs two more packages: python -m pip install fastapi uvicorn
"""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import socket
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from Class.source import Source
from common.device import find_device
from common.errors import CommandParser, InputError, at_least, run_command
from common.record import versions
from lora_training.ask import Asker, add_entity_flags, open_model
from lora_training.base_model import quiet_libraries
from lora_training.inference import Reader, add_model_flags, load_model, memory_advice
from lora_training.memory import enough_memory

NEEDED = ("fastapi", "uvicorn")
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
MORE_CONNECTIONS = 256  # open connections beyond --queue: idle ones, and those that get their 503


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(prog="lora_training/serve.py", description=__doc__.split("\n")[0])
    add_model_flags(parser.add_argument_group("model"))
    add_entity_flags(parser.add_argument_group("entities"))
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; others than loopback are public")
    group.add_argument("--port", type=int, default=8000, help="0: any free one")
    group.add_argument(
        "--beams", type=at_least(1), default=20, help="width of the search over all entities; the largest top"
    )
    group.add_argument("--batch_size", type=at_least(1), default=8, help="most requests in one forward pass")
    group.add_argument("--queue", type=at_least(1), default=64, help="most requests at a time; more get 503")
    group.add_argument("--timeout", type=float, default=30, help="seconds for a request; then it gets 503")
    args = parser.parse_args(argv)
    if not 0 < args.timeout <= 3600:
        parser.error(f"--timeout must be above 0 and at most 3600, got {args.timeout:g}")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port must be 0..65535, got {args.port}")
    return args


def need_packages() -> None:
    """InputError if a package of the server is not installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serve.py needs {' and '.join(missing)}: python -m pip install {' '.join(missing)}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; InputError if the address is not this machine's, or the port is taken."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(found[0], socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(found[4])
        bound.listen()  # two sockets may be bound to one port until one of them listens; clients wait for the model
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot listen on --host {host} --port {port}: {reason}; give another --port") from error
    return bound


def make_card(args: argparse.Namespace, reader: Reader, source: Source, model: Any) -> dict[str, Any]:
    """What GET /card returns. Folders of this machine are left out."""
    assert reader.saved is not None, "open_model needs one"
    shown = ("file", "sha256", "dataset", "seq_len", "num_code", "num_quantizers", "code_format", "shuffled", "origin")
    hashes = {name: value for name, value in reader.identity().items() if name != "base_model"}
    trained = {key: reader.saved.record.get(key) for key in ("finished", "git_commit", "seed", "steps")}
    base = reader.base_model
    return {
        "dataset": source.kg.name,
        "entities": source.kg.num_entities,
        "relations": source.relations,
        "codes": {key: source.codes_info[key] for key in shown if key in source.codes_info}
        if source.with_codes
        else None,
        "base_model": Path(base).name if Path(base).is_dir() else base,
        "model": reader.saved.folder.name,
        "merged": reader.merged,
        "sha256": hashes,
        "trained": trained,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "limits": {name: getattr(args, name) for name in ("beams", "batch_size", "queue", "timeout")},
        "versions": versions(),
    }


def serve(args: argparse.Namespace, asker: Asker, card: dict[str, Any], bound: socket.socket) -> None:
    """Answer requests until Ctrl-C or SIGTERM; those in the queue are answered first."""
    import uvicorn

    from lora_training.serve_app import Limits, build_app

    public = not is_loopback(args.host)
    limits = Limits(args.batch_size, args.queue, args.timeout)
    app = build_app(asker, limits, card, frozenset() if public else LOOPBACK | {args.host})
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, ws="none", lifespan="on",
        limit_concurrency=args.queue + MORE_CONNECTIONS, timeout_graceful_shutdown=int(args.timeout) + 1,
    )  # fmt: skip
    host, port = bound.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if public:
        print(f"warning: --host {args.host} is not loopback: whoever reaches it can send requests, without a password")
    kg = asker.source.kg
    print(
        f"serving {card['model']}: {kg.num_entities:,} entities of {kg.name}; page {address}/, interface {address}/docs"
    )
    print("Ctrl-C stops; requests in the queue are answered first", flush=True)
    uvicorn.Server(config).run(sockets=[bound])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    need_packages()
    quiet_libraries()
    bound = listen(args.host, args.port)
    try:
        reader, source = open_model(args)
        device = find_device(args.device)
        with enough_memory(memory_advice(device)):
            model: Any = load_model(reader, device, args.dtype)
        asker = Asker(model, reader.tokenizer, source, args.beams)
        serve(args, asker, make_card(args, reader, source, model), bound)
    finally:
        bound.close()


if __name__ == "__main__":
    run_command(main)
