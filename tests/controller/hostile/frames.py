# error: AttributeError
import aici


async def main():
    await aici.FixedTokens("a")


coroutine = main()
print(coroutine.cr_frame.f_globals)
aici.start(coroutine)
