"""What a run of the scheduler did so far: problems, sequences, tokens, and how busy the engine was."""

import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Progress:
    """What a run did so far. Times are in seconds since it began."""

    num_problems: int
    closed: Counter = field(default_factory=Counter)
    num_requests: int = 0
    num_sequences: int = 0
    num_failures: int = 0
    generated_tokens: int = 0
    prefix_tokens: int = 0
    cached_tokens: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    busy: float = 0.0
    began: float = field(default_factory=time.perf_counter)
    _changed: float = field(default_factory=time.perf_counter)

    def count_in_flight(self, change: int) -> None:
        """Sequences go to the engine or come back."""
        now = time.perf_counter()
        self.busy += self.in_flight * (now - self._changed)
        self._changed = now
        self.in_flight += change
        self.most_in_flight = max(self.most_in_flight, self.in_flight)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    @property
    def cached_share(self) -> float:
        """Share of prefix tokens that engines took from their caches."""
        return self.cached_tokens / self.prefix_tokens if self.prefix_tokens else 0.0
