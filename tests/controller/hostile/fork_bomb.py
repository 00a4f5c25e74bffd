# error: too many forks \(max=16\)
import aici


async def main():
    for _ in range(6):
        await aici.fork(2)
    await aici.gen_tokens(max_tokens=1)


aici.start(main)
