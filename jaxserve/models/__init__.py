"""Model families and the checkpoints they are read from."""
