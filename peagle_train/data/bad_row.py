"""A row of a data file that cannot be trained on, and why."""


class BadRow(ValueError):
    """One row is unusable; the run counts it under `reason` and goes on, or stops, as the recipe says.

    reason: a short stable phrase, the same for every row with this fault ("broken JSON", "wrong roles", "empty turn",
        "lone surrogate", "id out of range", "null field", "no supervised token", "prefix is not a prefix",
        "template failed"): a counter's key. It never holds anything of the row itself.
    detail: one line on this row: what was found, and where.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:
        """Survives the way from a worker process to the main one with both fields."""
        return type(self), (self.reason, self.detail)
