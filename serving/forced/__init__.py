"""A served model forced through answers that are given, one module an engine; each has `log_probabilities(model_dir, config)`."""
