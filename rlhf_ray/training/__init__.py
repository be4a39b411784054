"""What both trainers share, supervised and PPO: how a run folder is entered, what is watched, what results depend on.

`run_entry.py` makes, finds, locks and checks a run folder, `monitor.py` names phases and turns stop requests and guards into errors
that say how to resume, `environment.py` says what bits depend on besides the job, `header.py` shows the settings. It must not know
what is trained.
"""
