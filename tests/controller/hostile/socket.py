# error: ModuleNotFoundError: No module named 'socket' \(line 2\)
import socket

import aici

aici.start(None)
# ruff: noqa
