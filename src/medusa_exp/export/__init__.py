"""Heads in the formats of serving engines: written, read back by an independent reading, checked.

`formats.py` writes, `reading.py` reads any of them and computes their logits in plain torch, and
`publishing.py` lets nothing out whose logits are not those of our heads. `importing.py` makes our
heads of others', `check.py` is the linter.
"""
