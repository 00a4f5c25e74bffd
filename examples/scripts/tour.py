"""The README's script: fixed text, a constrained answer, one taken back, a branch that joins two others."""

import pyaici.server as aici


async def tour():
    await aici.FixedTokens("Q: Name a planet of our solar system.\nA: A planet is")
    start = aici.Label()
    first = await aici.gen_text(regex=r" [A-Z][a-z]+[.,]", max_tokens=6, store_var="first")

    # Take the answer back and ask for another one; the model never knows.
    await aici.FixedTokens(f" not{first[:-1]}, but", following=start)
    await aici.gen_tokens(regex=r" [A-Z][a-z]+\.", max_tokens=6, store_var="second")
    await aici.FixedTokens(" It is")

    # Three branches share the text so far and its KV cache, and each goes its own way.
    branch = await aici.fork(3)
    if branch == 0:
        opinions = await aici.wait_vars("size", "colour")
        size, colour = [opinion.decode() for opinion in opinions]
        await aici.FixedTokens(f"{size} and{colour}.")
    elif branch == 1:
        await aici.FixedTokens(" a planet that is")
        await aici.gen_tokens(options=[" big", " small", " tiny"], store_var="size")
    else:
        await aici.FixedTokens(" of a colour that is")
        await aici.gen_tokens(options=[" red", " blue", " grey", " brown"], store_var="colour")


aici.start(tour())
