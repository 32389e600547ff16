"""shape → V: the values a weight is born with. ``f(w)`` gives new values of w's shape; ``apply`` copies them in."""

from etude.init._apply import apply as apply
from etude.init.identity import zero_init as zero_init
from etude.init.orthogonal import orthogonal as orthogonal

__all__ = ["apply", "orthogonal", "zero_init"]
