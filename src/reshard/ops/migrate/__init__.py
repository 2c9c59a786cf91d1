"""NeMo 1.0 settings into NeMo 2.0: `read` the YAML, `migrated` by the rows of `tables`, `program` or `report` of it.

No setting is dropped in silence: each is kept, renamed, changed or removed, with the reason, or listed as unknown.
"""

from __future__ import annotations

from reshard.ops.migrate.apply import STATUSES, Finding, Migration, migrated
from reshard.ops.migrate.document import Document, Setting, parse, read
from reshard.ops.migrate.program import program
from reshard.ops.migrate.report import report

__all__ = ["STATUSES", "Document", "Finding", "Migration", "Setting", "migrated", "parse", "program", "read", "report"]
