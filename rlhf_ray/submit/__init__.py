"""`rlhf-ray submit`: the same job on a Ray cluster, by Ray's job API. What is sent, to whom, what the nodes say first, how it ends."""
