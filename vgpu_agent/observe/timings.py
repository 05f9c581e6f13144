"""How long the kubelet's calls take: counted on the event loop, exposed by `metrics`."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate

BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Seconds up to which calls are counted together; what takes longer is counted apart."""

CALLS = {
    "GetDevicePluginOptions": ("OK",),
    "Allocate": ("OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION"),
    "GetPreferredAllocation": ("OK",),
    "PreStartContainer": ("OK", "FAILED_PRECONDITION"),
}
"""How calls of the kubelet usually end: counted from 0 on, so that the first is an increase."""


@dataclass(slots=True)
class _Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    seconds: float = 0.0


class CallTimings:
    """The durations of unary calls, by method and gRPC status code. One thread counts."""

    def __init__(self) -> None:
        self._calls = {(name, code): _Histogram() for name in CALLS for code in CALLS[name]}

    def observe_rpc(self, method: str, code: str, seconds: float) -> None:
        """A call of `method` ended with a gRPC status code after so many seconds."""
        found = self._calls.get((method, code))
        if found is None:
            found = self._calls[method, code] = _Histogram()
        found.counts[bisect_left(BUCKETS, seconds)] += 1
        found.seconds += seconds

    def totals(self) -> Iterator[tuple[tuple[str, str], list[int], float]]:
        """Method and code, how many calls took at most each bucket or any time, seconds in all.

        Also for another thread than the one that counts.
        """
        for of, each in tuple(self._calls.items()):
            yield of, list(accumulate(tuple(each.counts))), each.seconds
