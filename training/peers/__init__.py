"""Programs that run a peer's trainer with the peer's own Python; they import nothing of ours."""
