"""The command `srf-retrofit`: `main` is its root, the other modules hold the longer commands."""
