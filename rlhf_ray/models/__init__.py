import logging

# bitsandbytes, which PEFT imports wherever it is installed, misses a kernel for 4-bit matrices on CPUs, and says so in every run
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
