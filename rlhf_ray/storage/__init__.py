"""Everything that survives the process: run folders, checkpoints, atomic files, locks, copies on an object store.

In come tensors, JSON values and bytes; out come folders that are whole or absent, with the sha256 of every file. Read
`run_folder.py` first; `checkpoints.py` writes, finds and prunes `checkpoints/step_NNNNNN/`, `files.py` makes a write atomic,
`lock.py` lets one writer in, `object_store.py` copies, `run.py` is what a stage returns. It must not know what a checkpoint means:
callers hand in a writer.
"""
