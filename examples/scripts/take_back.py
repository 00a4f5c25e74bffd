"""Ask the same question twice from the same place: the first answer is kept in a variable only."""

import aici


async def take_back():
    await aici.FixedTokens("The capital of")
    here = aici.Label()
    for country in ("France", "Japan"):
        await aici.FixedTokens(f" {country} is", following=here)
        await aici.gen_tokens(regex=r" [A-Z][a-z]+[.,]", max_tokens=6, store_var=country)


aici.start(take_back)
