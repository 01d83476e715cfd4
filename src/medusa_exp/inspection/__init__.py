"""What a data set trains on, and whether it suits its model."""
