# error: ModuleNotFoundError
import subprocess

import aici

aici.start(None)
# ruff: noqa
