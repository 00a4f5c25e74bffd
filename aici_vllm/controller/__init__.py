"""Who decides: branches of a request, the programs that write them, and their shared variables."""
