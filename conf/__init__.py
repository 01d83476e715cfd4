"""Hydra configuration groups; Hydra finds them as the package medusa_exp.conf."""
