"""Python imports this when it starts, where the folder is on PYTHONPATH: torch cannot be imported then."""

import sys

sys.modules["torch"] = None
