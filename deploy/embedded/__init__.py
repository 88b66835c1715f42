"""The embedded set-up: every process on one machine, started and kept alive by one command."""
