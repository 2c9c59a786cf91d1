"""An evaluation server: it speaks lmms-eval's protocol, merges what has to be merged, and loses no job.

    POST /evaluate    `protocol` decodes it, `admission` says what will be evaluated, or why not; it is queued
    a slot            `worker` merges and evaluates in one process group, with the slot's devices
    GET /jobs/ID      `app` shows it, `page` to people

The queue is one SQLite file, and a job's process outlives the server: one that is killed and started again goes on with
what runs, and begins nothing twice.
"""
