"""Read by every interpreter that finds this folder on PYTHONPATH: bitsandbytes is not there. See tests/conftest.py."""

import sys

sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
