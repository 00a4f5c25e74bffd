# error: .
import aici

_aici_run = 3
aici.start(None)
