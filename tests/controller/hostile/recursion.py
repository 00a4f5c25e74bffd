# error: RecursionError: maximum recursion depth exceeded \(line 5\)
import aici

def down(n):
    return down(n + 1)

down(0)
aici.start(None)
# ruff: noqa
