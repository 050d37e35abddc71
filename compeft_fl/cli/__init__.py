"""The command line: one file a group of commands; each reads its arguments and decides nothing."""
