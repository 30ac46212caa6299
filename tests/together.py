"""Ranks as threads of one process, for what needs ranks only to exchange values."""

import threading


class Together:
    """Ranks that wait for one another at every exchange; one that does not come breaks it.

    Args:
        count: How many there are.
    """

    def __init__(self, count):
        self.barrier = threading.Barrier(count, timeout=20)
        self.said = [None] * count

    def gather(self, rank, combine=list):
        """The exchange of a rank: from its value to what `combine` makes of all ranks' values, before any goes on."""

        def exchange(value):
            self.said[rank] = value
            self.barrier.wait()
            combined = combine(self.said)
            self.barrier.wait()
            return combined

        return exchange
