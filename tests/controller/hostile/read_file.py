# error: PermissionError
import aici

print(open("/etc/passwd").read())
aici.start(None)
# ruff: noqa
