"""`python -m rlhf_ray.cli`, for processes that are started without the console script."""

import sys

from rlhf_ray.cli import main

sys.exit(main())
