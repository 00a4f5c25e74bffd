# error: a script may compute for 0.1 s between two awaits
import aici


async def main():
    await aici.FixedTokens("a")
    x = 0
    while True:
        try:
            while True:
                x += 1
        except BaseException:
            pass


aici.start(main)
