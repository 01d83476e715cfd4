"""Tree decoding that gives what plain decoding gives, in fewer steps."""

from medusa_exp.decode.decoder import Generation, generate
from medusa_exp.decode.verify import Verdict, verify

__all__ = ["Generation", "Verdict", "generate", "verify"]
