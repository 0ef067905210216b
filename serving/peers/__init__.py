"""Other servers, started for the benchmark by a Python that has them installed; nothing here is imported by ours."""
