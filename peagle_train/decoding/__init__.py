"""Speculative decoding with a drafter, and how much of what it drafts is accepted."""
