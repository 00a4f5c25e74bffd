# error: MemoryError: a script may use 16777216 bytes of memory
import aici

huge = 10 ** (10**9)
aici.start(None)
