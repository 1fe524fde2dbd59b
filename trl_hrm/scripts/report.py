"""
Put the results of several runs on one page: tables and curves side by side, and whether a reward model is being hacked.

```bash
trl-hrm report runs/bon runs/bon-prm runs/bon-orm --output report.html
```
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..config import Config


@dataclass(kw_only=True)
class ReportConfig(Config):
    """
    Settings of [`report`].

    Args:
        inputs (`list[str]`):
            Folders of `trl-hrm best-of-n`, `step-search` and `benchmark`, in any mix.
        output (`str`, *optional*, defaults to `"report.html"`):
            File of the page. Its pictures go into a folder beside it, `report_files` for `report.html`.

    Raises:
        `ValueError`: If there are no folders.
    """

    inputs: list[str] = field(
        metadata={
            "help": "Folders of trl-hrm best-of-n, step-search and benchmark, in any mix.",
            "metavar": "RUN",
            "positional": True,
        }
    )
    output: str = field(
        default="report.html",
        metadata={
            "help": "File of the page; its pictures go into a folder beside it, report_files for report.html.",
            "metavar": "FILE",
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.inputs:
            raise ValueError("inputs is empty, expected at least one folder with results.")


def report(config: ReportConfig) -> str:
    """
    Put the results of several runs on one page.

    Args:
        config ([`ReportConfig`]):
            The runs, and the file of the page.

    Returns:
        `str`: What the page says of each run, and where it is.

    Raises:
        `FileNotFoundError`, `ValueError`: If a folder has no results, or results that do not go together.
    """
    from ..evaluation.report import write_report
    from ..evaluation.saved_results import headline_verdict, notices, problem_groups, read_results

    output = Path(config.output)
    results = read_results(config.inputs)
    pictures = write_report(results, output)
    lines = [f"warning: {notice}" for notice in notices(results)]
    for group in problem_groups(results):
        lines += [f"{result.name}: {headline_verdict(result).words}" for result in group]
    folder = output.with_name(f"{output.stem}_files")
    return "\n".join([*lines, f"Page: {output}; pictures: {folder}/, {len(pictures)} files"])
