# error: not supported
import os

import aici

print(os.getenv("HOME"))
aici.start(None)
