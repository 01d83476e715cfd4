"""A tokenizer and a small model from scratch, for those who bring none: stage pretrain."""
