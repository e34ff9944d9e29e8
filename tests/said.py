"""What a store said, for tests to look at."""


class Said(list):
    """Remembers what a store says."""

    def __call__(self, text: str) -> None:
        self.append(text)

    def __contains__(self, part: object) -> bool:
        return any(str(part) in text for text in self)
