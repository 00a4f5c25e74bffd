# error: MemoryError: a script may use 16777216 bytes of memory
import aici


async def main():
    await aici.FixedTokens("a")
    while True:
        try:
            hoard = ["x" * 10**9]
        except MemoryError:
            pass


aici.start(main)
# ruff: noqa
