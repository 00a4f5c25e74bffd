# error: RuntimeError: a script may await 64 things at once
import asyncio

import aici


async def main():
    await asyncio.gather(*[aici.gen_tokens(regex=str(number)) for number in range(1000)])


aici.start(main)
