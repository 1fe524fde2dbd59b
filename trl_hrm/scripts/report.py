"""
Put the results of several runs on one page: tables and curves side by side, and whether a reward model is being hacked.

```bash
trl-hrm report runs/bon runs/bon-prm runs/bon-orm --output report.html
```
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", nargs="+", metavar="RUN", help="folders of trl-hrm best-of-n and trl-hrm benchmark, in any mix"
    )
    parser.add_argument(
        "--output",
        default="report.html",
        metavar="FILE",
        help="where to write the page; its pictures go into a folder beside it, report_files for report.html",
    )


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from ..evaluation.report import notices, problem_groups, read_results
    from ..evaluation.report_html import headline_verdict, html_page
    from ..evaluation.report_page import write_page
    from ..evaluation.report_pictures import Pictures

    output = Path(args.output)
    results = read_results(args.results)
    pictures = Pictures.of(results)
    folder = write_page(html_page(results, pictures), pictures.all, output)
    for notice in notices(results):
        print(f"warning: {notice}")
    for group in problem_groups(results):
        for result in group:
            print(f"{result.name}: {headline_verdict(result).words}")
    print(f"Page: {output}; pictures: {folder}/, {len(pictures.all)} files")
