# error: ValueError: x+
import aici

raise ValueError("x\n" * 1000000)
aici.start(None)
