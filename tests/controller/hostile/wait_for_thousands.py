# error: RuntimeError: wait_vars\(\) takes 256 names at most, not 20000
import aici


async def main():
    await aici.wait_vars(*[str(number) for number in range(20000)])


aici.start(main)
