# error: AttributeError
import os

import aici

os.system("true")
aici.start(None)
