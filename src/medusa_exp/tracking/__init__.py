"""What a run leaves to look at: history, W&B, the terminal's tables and the report."""
