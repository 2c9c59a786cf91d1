"""`reshard`: find the verb, parse, run, and turn what goes wrong into a message and an exit code.

Exit codes: 0 done, 1 the user's input or a failed check, 2 our fault, 130 interrupted.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from reshard.errors import ReshardError
from reshard.storage.launch import Launch, current, together
from reshard.version import __version__

VERBS = {
    "inspect": "say what a checkpoint is, whether it is whole, and what to type next",
    "merge": "turn shards into a whole model: a HuggingFace directory, .safetensors or .ckpt",
    "convert": "from HuggingFace to Megatron, back, and from one Megatron format to another",
    "average": "write the mean of checkpoints, straight from their shards",
    "verify": "prove that an output is what was written, or what its source says",
    "watch": "evaluate the checkpoints of a run while it trains",
    "evals": "show how far the evaluation of a run is, what it measured, and which checkpoint is best",
    "serve": "evaluate checkpoints over HTTP, for trainers, watchers and lmms-eval's clients",
    "families": "list the model families that convert knows",
    "import": "convert, as Megatron-Bridge spells it: HuggingFace to Megatron",
    "export": "convert, as Megatron-Bridge spells it: Megatron to HuggingFace",
    "migrate-config": "turn a NeMo 1.0 YAML into NeMo 2.0 code, with a reason for every setting",
}


_MODULES = {"import": "bridge_import", "export": "bridge_export", "migrate-config": "migrate_config"}
"""Of verbs whose name no module can have, and of their opposite."""


def console() -> NoReturn:
    """The command `reshard`: a process that is ours, and short.

    It makes millions of small objects and hardly a cycle, so neither collecting them nor taking them apart at the end
    is worth its time.
    """
    gc.disable()
    code = main()
    with suppress(OSError, ValueError):  # whoever read us may have gone
        sys.stdout.flush()
        sys.stderr.flush()
    atexit._run_exitfuncs()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    words = [_hyphenated(word) for word in (sys.argv[1:] if argv is None else argv)]
    if words and words[0] not in VERBS and not words[0].startswith("-"):
        words.insert(0, "inspect")
    try:
        with together():
            return _guarded(words)
    except ReshardError as error:
        _complain(str(error), error.hint)
        return 1


def _guarded(words: list[str]) -> int:
    """The exit code of a verb, whatever goes wrong; the message, if anything does."""
    try:
        return _dispatch(words)
    except ReshardError as error:
        _complain(str(error), error.hint)
        return 1
    except KeyboardInterrupt:
        _complain("interrupted", "run the same command again: what is done is kept")
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        _complain(f"{error.filename or ''}: {error.strerror or error}".lstrip(": "), None)
        return 1
    except Exception:
        import traceback

        traceback.print_exc()
        _complain("this is a defect of reshard", "please report it with the lines above and `reshard --version`")
        return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(_overview())
        return 0
    if words[0] == "--version":
        from reshard.cli.version import version_text

        sys.stdout.write(version_text())
        return 0
    verb = words[0]
    if verb not in VERBS:
        raise ReshardError(f"unknown option {verb}", hint="see reshard --help")
    module = import_module(f"reshard.cli.{_MODULES.get(verb, verb)}")
    parser = Parser(
        prog=f"reshard {verb}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.configure(parser)
    args = parser.parse_intermixed_args(words[1:])
    if not getattr(args, "dry_run", True):  # a verb that writes, and does
        return int(module.run(args))
    if not current().is_first:
        return 0
    with together(Launch()):
        return int(module.run(args))


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are ours."""

    def error(self, message: str) -> NoReturn:
        raise ReshardError(message, hint=f"{self._nearest(message)}see {self.prog} --help")

    def _nearest(self, message: str) -> str:
        """`did you mean --dtype? ` when an option was mistyped."""
        words = re.findall(r"--[\w-]+", message) if "unrecognized" in message else []
        near = [match for word in words for match in get_close_matches(word, self._option_string_actions, 1, 0.7)]
        dashed = next((word for word in message.split() if word.startswith("-") and os.path.exists(word)), None)
        if dashed is not None and not near:
            return f"a path that begins with a dash is written ./{dashed}; "
        return f"did you mean {near[0]}? " if near else ""


def _hyphenated(word: str) -> str:
    """`--input_dir=x` as `--input-dir=x`: systems spell their options either way."""
    match = re.match(r"--[A-Za-z][\w-]*", word)
    return match[0].replace("_", "-") + word[match.end() :] if match else word


def _complain(message: str, hint: str | None) -> None:
    who = "" if current().is_first else f"rank {current().rank}: "
    sys.stderr.write(f"{who}error: {message}\n")
    if hint:
        sys.stderr.write(f"\nhint: {hint}\n")


def _overview() -> str:
    verbs = "\n".join(f"  {name:<{max(map(len, VERBS))}} {what}" for name, what in VERBS.items())
    return f"""\
reshard {__version__}: shards in, a proven whole model out. No torch, no GPU, nothing in a checkpoint is executed.

usage: reshard SRC                   what is this, and what do I type next?
       reshard VERB ... [--help]

verbs:
{verbs}

examples:
  reshard merge output/checkpoint-500 model/ --base meta-llama/Llama-3.1-8B
  reshard merge config.yml --output-path ./merged_model
  reshard convert Qwen/Qwen3-8B megatron/ --to torch_dist --tp 2
  reshard convert megatron/ model/ --to hf --hf-model Qwen/Qwen3-8B
  reshard average run/checkpoint-* --output soup/ --dtype bfloat16
  reshard verify model/ --against output/checkpoint-500

options:
  --version  version, formats and extras
"""


if __name__ == "__main__":
    console()
