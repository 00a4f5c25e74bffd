# error: .
import aici

_aici_asked["new_constraint"](1, "regex", "(" * 100)
aici.start(None)
# ruff: noqa
