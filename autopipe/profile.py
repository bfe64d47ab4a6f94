"""`profile`: times of a model's ops on a real device (from `autopipe.planning.profile_calls`)."""

from autopipe.planning.profile_calls import profile

__all__ = ["profile"]
