"""Speculative decoding over trees of draft tokens: what plain decoding gives, in fewer steps."""

from medusa_exp.decode.decoder import Decoder, Generation
from medusa_exp.decode.one_call import generate
from medusa_exp.decode.verify import Verdict, verify

__all__ = ["Decoder", "Generation", "Verdict", "generate", "verify"]
