"""The draft tree that one decoding step checks."""

from medusa_exp.tree.tree import Tree, chain

__all__ = ["Tree", "chain"]
