"""The `edgeattn` command."""
