"""Every setting of NeMo 1.0 that is known, in rows: old name, new place, how the value changes, why."""

from __future__ import annotations

from reshard.ops.migrate.row import Row
from reshard.ops.migrate.tables import checkpoints, data, model, optimizer, precision, run

TABLES: dict[str, tuple[Row, ...]] = {
    "Distributed checkpoints": checkpoints.DIST_CKPT,
    "Checkpoint callback": checkpoints.CALLBACK,
    "Resuming and restoring": checkpoints.RESUME,
    "Parallelism": run.PARALLEL,
    "Trainer": run.TRAINER,
    "Precision": precision.ROWS,
    "Experiment manager": run.EXPERIMENT,
    "Profiling and garbage collection": run.PROFILING,
    "Optimizer": optimizer.OPTIMIZER,
    "Learning-rate schedule": optimizer.SCHEDULE,
    "Architecture": model.ARCHITECTURE,
    "Fusions and recomputation": model.FUSIONS,
    "Tokenizer": model.TOKENIZER,
    "Data and fine-tuning": data.ROWS,
    "Around the run": run.AROUND,
}
"""The rows by what they are about, in the order of the guide."""

ROWS: tuple[Row, ...] = tuple(row for rows in TABLES.values() for row in rows)
"""All of them."""
