# error: ValueError: ‮txet desrever \(line 3\)
import aici
raise ValueError("‮txet desrever")
aici.start(None)
# ruff: noqa
