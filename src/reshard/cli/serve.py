"""Serve evaluations over HTTP: merge what has to be merged, evaluate it, keep the queue over restarts.

Speaks lmms-eval's protocol, for `reshard watch`, LMMs-Engine's trainer and lmms_eval's EvalClient. A page is at /.
"""

from __future__ import annotations

import argparse
import gc
import os
from importlib.util import find_spec
from pathlib import Path

from reshard.cli import output
from reshard.errors import InputError, ReshardError

_SHUTDOWN_S = 5


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--backend", choices=("lm_eval", "lmms_eval", "command"), help="what evaluates (default: lm_eval)"
    )
    parser.add_argument(
        "--command", metavar="CMD",
        help='of the backend command: "CMD {model} {step} {output}", which leaves metrics as JSON in {output}',
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="P", help="(default: %(default)s)")
    parser.add_argument(
        "--root", action="append", default=[], metavar="DIR",
        help="nothing outside is read or written; may be given several times (default: the working directory)",
    )  # fmt: skip
    parser.add_argument("--slots", type=int, default=1, metavar="N", help="evaluations at a time; GPUs are dealt out")
    parser.add_argument(
        "--token", metavar="T", help="who has it is let in (default: $RESHARD_TOKEN; none on the loopback)"
    )
    parser.add_argument("--timeout", type=float, default=24 * 3600.0, metavar="S", help="seconds that a job may take")
    parser.add_argument("--include-path", metavar="DIR", help="further tasks of lm_eval")
    parser.add_argument("--base", metavar="DIR", help="config and tokenizer of checkpoints that have none")
    parser.add_argument("--state", metavar="DIR", help="queue and merged models (default: ROOT/.reshard-serve)")
    parser.add_argument("--python", metavar="FILE", default="", help="the interpreter that has the harness")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="requests may run code that comes with a model"
    )


def run(args: argparse.Namespace) -> int:
    from reshard.evaluate.backends.command import words_of
    from reshard.evaluate.serve.settings import QUEUE, ServeSettings, default_state, resolved_roots

    try:
        import uvicorn

        from reshard.evaluate.serve.app import make_app
    except ModuleNotFoundError as error:
        raise ReshardError(f"the server needs {error.name}", hint='pip install "reshard[serve]"') from error
    roots = resolved_roots(args.root)
    include_path = str(Path(args.include_path).absolute()) if args.include_path else None
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"--include-path {include_path}: no such directory")
    state = Path(os.path.realpath(args.state)) if args.state else default_state(roots)
    settings = ServeSettings(
        backend=args.backend or ("command" if args.command else "lm_eval"),
        command=words_of(args.command) if args.command else (), host=args.host, port=args.port, roots=roots,
        state=state, slots=args.slots, token=args.token or os.environ.get("RESHARD_TOKEN") or None,
        timeout_s=args.timeout, include_path=include_path, base=args.base, python=args.python,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    if settings.backend != "command" and not settings.python and find_spec(settings.backend) is None:
        raise ReshardError(
            f"{settings.backend} is not installed here",
            hint=f"pip install {settings.backend}, --python FILE where it is, or --command for a program of your own",
        )
    app = make_app(settings)
    where = f"[{settings.host}]" if ":" in settings.host else settings.host
    output.say(f"http://{where}:{settings.port}/ evaluates with {settings.backend}; its queue is {state / QUEUE}")
    gc.enable()  # which a short command does without
    uvicorn.run(
        app, host=settings.host, port=settings.port, log_level="warning", access_log=False,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )  # fmt: skip
    return 0
