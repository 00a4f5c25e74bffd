# error: NameError: name '__import__' is not defined
import aici

__import__("os").system("true")
aici.start(None)
