"""What the subcommands of `aici` do, one module each."""
