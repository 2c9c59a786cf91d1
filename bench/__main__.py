"""`python -m bench`: build, measure, report.

python -m bench                              every case at 2 GB, into docs/benchmarks.md
python -m bench --case dense --case cold     only these, on standard output
python -m bench --size-gb 0.1 --repeat 1     does it run at all?
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bench import report
from bench.cases import Case, cases
from bench.measure import REPOSITORY, Rounds, Trial, clear, files, take_turns


def main() -> int:
    args = _arguments()
    chosen = [case for case in cases(args.size_gb) if not args.case or case.name in args.case]
    args.work.mkdir(parents=True, exist_ok=True)
    measured, failed = [], False
    with tempfile.TemporaryDirectory(dir=args.work.resolve(), prefix="bench-") as name:
        folder = Path(name)
        for case in chosen:
            try:
                measured.append((case, _measure(case, args.keep or folder / "inputs", folder / "output", args.repeat)))
            except (subprocess.CalledProcessError, RuntimeError) as error:
                failed = True
                print(f"{case.name} failed: {error}\n{getattr(error, 'stderr', None) or ''}", file=sys.stderr)
            if not args.keep:
                clear(folder / "inputs")
    output = args.output or (None if args.case else REPOSITORY / "docs" / "benchmarks.md")
    if output is None or failed:
        facts = report.machine(args.work)
        print(report.render(measured, facts))
    else:
        report.write(output, measured, args.work, args.repeat)
    return int(failed)


def _arguments() -> argparse.Namespace:
    names = [case.name for case in cases(2)]
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", action="append", choices=names, help="only this one; may be given again")
    parser.add_argument("--size-gb", type=float, default=2.0, help="of the input of a merge (default: 2)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--work", type=Path, default=Path("build"), help="where inputs and outputs go (default: build)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="build the inputs here, leave them, find them again")
    parser.add_argument("--output", type=Path, help="the report (default: docs/benchmarks.md, when all cases ran)")
    return parser.parse_args()


def _measure(case: Case, folder: Path, output: Path, repeat: int) -> Rounds:
    """Build what a case needs and run it."""
    print(f"{case.name}: {case.title}", file=sys.stderr, flush=True)
    inputs = {name: (folder / "-".join(arguments)).resolve() for name, arguments in case.inputs.items()}
    for name, arguments in case.inputs.items():
        _build(inputs[name], arguments)
    trials = {name: _trial(words, inputs, output, case.output_share) for name, words in case.commands.items()}
    return take_turns(trials, output, repeat, cold=case.cold)


def _trial(words: tuple[str, ...], inputs: Mapping[str, Path], output: Path, output_share: float) -> Trial:
    used = tuple(path for name, path in inputs.items() if any(f"{{{name}}}" in word for word in words))
    expected = int(output_share * sum(file.stat().st_size for file in files(*used)))
    return Trial(tuple(word.format(**inputs, output=output) for word in words), used, expected)


def _build(path: Path, arguments: tuple[str, ...]) -> None:
    """Build an input, unless it is there: a file beside it says that it is whole."""
    built = path.with_name(f"{path.name}.built")
    if built.exists():
        return
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind, *options = arguments
    command = (sys.executable, "-m", "bench.build", kind, str(path), *options)
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=sys.stderr)
    built.touch()


if __name__ == "__main__":
    sys.exit(main())
