"""Search over PPO jobs: what varies (space), the trials (trials, run), their results (results, choice), and the report."""
