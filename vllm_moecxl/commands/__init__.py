"""The `moecxl` command: subcommands that look at a machine without starting an engine."""
