"""Prompt sets answered by the target itself, through a server or in this process."""
