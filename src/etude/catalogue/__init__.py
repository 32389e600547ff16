"""The catalogue: every method of the house and what is known of it, read from the code and from the paper tests."""

from etude.catalogue._find import find as find
from etude.catalogue._find import tokens as tokens
from etude.catalogue._records import lookup as lookup
from etude.catalogue._records import records as records

__all__ = ["find", "lookup", "records", "tokens"]
