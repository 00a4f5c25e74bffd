# error: PermissionError
from pathlib import Path

import aici

Path("/tmp/owned").write_text("x")
aici.start(None)
