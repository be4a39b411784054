"""`rlhf-ray submit`: the same job on a Ray cluster, by Ray's job API: what is sent, to whom, what the nodes say, how it ends."""
