"""How a response is scored: verifiers by name, and a pool of processes that can be killed."""

from oapl_engine.rewards.pool import VerifierPool
from oapl_engine.rewards.verdict import Verdict, check_record, verify

__all__ = ["Verdict", "VerifierPool", "check_record", "verify"]
