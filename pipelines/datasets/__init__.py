"""Builders of small, real datasets: each module has `build(options, output_dir)` and writes JSON lines."""
