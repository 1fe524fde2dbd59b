"""Progress bar of `trl-hrm annotate`."""

from tqdm import tqdm

from ..search.scheduler import Progress


class ProgressBar:
    """Shows problems done and left, remaining time, sequences in flight, tokens per second, share of cached tokens, and errors."""

    def __enter__(self) -> "ProgressBar":
        self.bar = tqdm(desc="problems", unit="problem", total=None, dynamic_ncols=True, mininterval=0.5)
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, progress: Progress) -> None:
        """Update the bar. Called after each request, but tqdm redraws at most twice a second."""
        self.bar.total = progress.num_problems
        self.bar.set_postfix(
            {
                "in flight": progress.in_flight,
                "tok/s": f"{progress.generated_tokens / progress.seconds:,.0f}",
                "cached": f"{progress.cached_share:.0%}",
                "errors": progress.num_failures,
            },
            refresh=False,
        )
        self.bar.update(sum(progress.closed.values()) - self.bar.n)
