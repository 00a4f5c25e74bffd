# error: MemoryError: a script may use 16777216 bytes of memory
import aici


async def main():
    await aici.FixedTokens("a")
    text = "x"
    while True:
        text += text


aici.start(main)
