# error: a script may compute for 0.2 s before its first await
import aici

while True:
    pass

aici.start(None)
