"""
Compare the results of several runs on one page: tables, curves, and signs of reward hacking.

```bash
trl-hrm report runs/bon runs/bon-prm runs/bon-orm --output report.html
```
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..config import Config
from ..pages.page import claimed_page
from ..terminal import one_line, plain


@dataclass(kw_only=True)
class ReportConfig(Config):
    """
    Configuration of [`report`].

    Args:
        inputs (`list[str]`):
            Output folders of `trl-hrm best-of-n`, `step-search`, `evaluate` and `benchmark`. They can be mixed.
        output (`str`, *optional*, defaults to `"report.html"`):
            Output file of the page. Pictures are saved in a folder next to it, such as `report_files` for `report.html`.

    Raises:
        `ValueError`: If `inputs` is empty.
    """

    inputs: list[str] = field(
        metadata={
            "help": "Output folders of `trl-hrm best-of-n`, `step-search`, `evaluate` and `benchmark`. They can be mixed.",
            "metavar": "RUN",
            "positional": True,
        }
    )
    output: str = field(
        default="report.html",
        metadata={
            "help": "Output file of the page. Pictures are saved in a folder next to it, such as report_files for "
            "report.html.",
            "metavar": "FILE",
        },
    )


def report(config: ReportConfig) -> str:
    """
    Write a page that compares the results of several runs.

    Args:
        config ([`ReportConfig`]):
            Folders of the runs and path of the page.

    Returns:
        `str`: The main finding for each run, and the path of the page.

    Raises:
        `OSError`: If the page cannot be written. This is checked first.
        `FileNotFoundError`, `ValueError`: If a folder has no results, or results that cannot be compared.
    """
    from ..evaluation.report import write_report
    from ..evaluation.saved_results import headline_verdict, notices, problem_groups, read_results

    output = Path(config.output)
    with claimed_page(config.output, "output") as page:
        results = read_results(config.inputs)
        pictures = write_report(results, page)
    lines = [f"warning: {one_line(notice)}" for notice in notices(results)]
    for group in problem_groups(results):
        lines += [f"{result.name}: {headline_verdict(result).words}" for result in group]
    folder = output.with_name(f"{output.stem}_files")
    return "\n".join([*lines, plain(f"Page: {output}; pictures: {folder}/, {len(pictures)} files")])
