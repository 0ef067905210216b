"""Where a step's program runs; the program and its config are the same everywhere."""
