# error: not supported
import os

import aici

print(os.environ)
aici.start(None)
