"""`rlhf-ray doctor`: checks of this machine, a cluster and a job's model, one line each, with the fix.

In come a job file, a model, the address of a cluster, or nothing. Out comes a list of `CheckResult` (checks.py): name, status, what
was found, how to fix it. What is wrong is a result, not an exception; only a job file that cannot be read raises ConfigError.

It changes nothing and loads no weights; a cluster it knows by what `submit` asks of its nodes.

Read examine.py first: all checks in their order. here.py has those of this machine, cluster.py and job.py the others.
"""
