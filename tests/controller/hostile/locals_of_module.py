# error: .
import aici

print(locals())
aici.start(None)
