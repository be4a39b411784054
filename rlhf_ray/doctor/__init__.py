"""`rlhf-ray doctor`: what this machine, a cluster and a job's model are like, a line each, with the fix."""
