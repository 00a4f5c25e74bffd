# error: MemoryError: a script may use 16777216 bytes of memory
import aici

hoard = []
while True:
    hoard.append("abc" * 1000)

aici.start(None)
