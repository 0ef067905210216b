"""From a user's rows to token ids and labels; nothing here imports torch."""
