"""Heads in the engines that people serve with, and those engines as workers.

Nothing is imported here: engines load single modules of this package in processes of their own,
which should not load the rest of the project.
"""
