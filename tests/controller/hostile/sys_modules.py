# error: AttributeError: module 'sys' has no attribute 'modules'
import sys

import aici

print(sys.modules)
aici.start(None)
