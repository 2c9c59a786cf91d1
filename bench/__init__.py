"""How fast, and in how much memory: reshard against `cp` of the same bytes, and against the tools people use now.

`python -m bench` builds checkpoints with torch's own writer, lets the contestants take turns, and writes the table
in docs/benchmarks.md. Conversions are held against mbridge too where it can be imported (`pip install --no-deps mbridge
megatron-core einops`, beside transformers). It needs the `bench` extra, and room on the disk for about four times the
largest checkpoint.

    build.py        checkpoints, in processes of their own; build_megatron.py those for conversions; ranks.py
    contestants.py  the programs that are not ours, each run as a whole process; loops.py those that convert
    measure.py      one timed process: wall, CPU, memory; warm and cold inputs; rounds
    cases.py        what is measured, and the targets
    report.py       the table
    __main__.py     the command line
"""
