"""What one visitor's page leaves on the server, and which of its races are over.

The page numbers every press of Race and Reset, 1, 2, ... A press ends all races of older ones. Requests may arrive in
another order than they were sent in; with the numbers the order of the presses counts, not that of the arrivals.
"""

from race import StopFlag

KEPT = 100  # races a visitor's page remembers


class Visitor:
    """The state of one page in one tab. Changed in place, so that no late answer brings an older one back.

    Attributes:
        races: records of the finished races since the last Reset (see ``figures``), the newest last.
    """

    def __init__(self):
        self.races: list[dict] = []
        self.since = 0  # press of the last Reset; races of older presses are not kept
        self.over = 0  # races of presses up to this one are over
        self.running: dict[int, StopFlag] = {}

    def begin(self, press: int) -> StopFlag:
        """The flag of the race of ``press``, which ends all races of older presses; set already if it is over too."""
        flag = self.running.setdefault(press, StopFlag())
        self.stop(press - 1)
        return flag

    def stop(self, press: int) -> None:
        """End the races of all presses up to this one, also of those that have yet to arrive."""
        self.over = max(self.over, press)
        for number, flag in list(self.running.items()):
            if number <= self.over:
                flag.set()

    def reset(self, press: int) -> None:
        """Forget all races of presses up to this one, also of those that have yet to end."""
        self.stop(press)
        self.since = max(self.since, press)
        self.races.clear()

    def keep(self, press: int, record: dict) -> None:
        """Add a finished race to the figures."""
        if press > self.since:
            self.races[:] = [*self.races, record][-KEPT:]

    def end(self, press: int) -> None:
        """The race of ``press`` takes no more messages."""
        if flag := self.running.pop(press, None):
            flag.clear()
