"""`rlhf-ray submit`: a job of this machine on a Ray cluster, by Ray's job API.

In come a job file with its overrides and the address of a cluster. What the job needs is packed (pack.py), checked for secrets
(secrets.py) and against what the nodes report of themselves (nodes.py), sent and followed (follow.py). Out come the submission's
id, the commands to watch it, and the job's exit code.

It starts no Ray here, imports no torch, and does not know what the job computes; it reads its configuration alone.

Read submission.py first; probe.py is the one file that runs on the nodes, without this package.
"""
