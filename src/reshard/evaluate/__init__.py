"""Evaluate the checkpoints of a run while it trains.

What goes in: a run directory that a trainer writes to, and the block of settings that LMMs-Engine's users have. What
comes out: every metric once, at the step of the weights it was measured on.

    scan      which steps are there, wanted and whole: `ready.py`; their shards are held: `protect.py`
    advance   each through merge, submission, evaluation and results, one short step at a time: `watch.py`
    log       results into `evals.jsonl`, and from there to TensorBoard, wandb, ...: `log.py`

All that is known is in one SQLite file (`store.py`) before it is acted on, so whoever is killed anywhere goes on from
there. What evaluates is a `Backend` (`backend.py`), one module each in `backends`.
"""
