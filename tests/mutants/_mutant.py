"""What a mutant is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """``old``, found exactly once in src/etude/``file``, becomes ``new``; ``tests``, under tests/, must fail."""

    file: str
    old: str
    new: str
    tests: str
