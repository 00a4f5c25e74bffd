"""Two branches work at the same time; the first one waits for both and puts them together."""

import aici


async def branches():
    await aici.FixedTokens("The opposite of")
    branch = await aici.fork(3)
    if branch == 0:
        hot, day = await aici.wait_vars("hot", "day")
        await aici.FixedTokens(f" hot is{hot.decode()} and the opposite of day is{day.decode()}")
        return
    word = "hot" if branch == 1 else "day"
    await aici.FixedTokens(f" {word} is")
    await aici.gen_tokens(regex=r" [a-z]+[.,]", max_tokens=4, store_var=word)


aici.start(branches())
