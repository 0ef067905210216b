"""The steps of a run, one module each: `step(spec)` gives the node, `run(config, context)` does the work."""
