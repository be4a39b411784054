"""What a job needs of a machine or cluster, and whether it is there: checked before anything is loaded."""
