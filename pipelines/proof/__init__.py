"""The parity certificate: whether what will be served is what was trained, stage by stage."""
