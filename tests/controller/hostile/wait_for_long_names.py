# error: deadlock: every live branch waits, this one for 'x{100}', .* and 90 more
import aici


async def main():
    await aici.wait_vars(*["x" * 10000 + str(number) for number in range(100)])


aici.start(main)
