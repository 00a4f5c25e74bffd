# error: awaited nothing
import time

import aici


async def main():
    time.sleep(100000)


aici.start(main)
