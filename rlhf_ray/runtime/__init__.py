"""The process that a stage runs in: which rank it is, how it meets the others, what stops it, what watches it.

`session.py` is all that a stage knows of Ray, torch.distributed or a plain process; `signals.py` turns SIGTERM and Ctrl-C into a
request that the loop answers between steps; `watchdog.py` ends a process that hangs; `fault_injection.py` makes faults on purpose
for tests and drills. It must not know models, data or what a step does.
"""
