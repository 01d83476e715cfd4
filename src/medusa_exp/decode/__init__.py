"""Tree decoding that gives what plain decoding gives, in fewer steps."""

from medusa_exp.decode.generate import Generation, generate
from medusa_exp.decode.verification import Verdict, verify

__all__ = ["Generation", "Verdict", "generate", "verify"]
