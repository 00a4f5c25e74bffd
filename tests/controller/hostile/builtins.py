# error: NameError: name '__builtins__' is not defined
import aici

print(__builtins__)
aici.start(None)
