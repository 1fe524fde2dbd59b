"""
Write docs/evidence.md from the folder of a demo: the sections of its report in Markdown, with their pictures.

    trl-hrm demo --profile full --output_dir outputs/evidence
    python benchmarks/evidence.py outputs/evidence

No number of the page is written by hand.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from trl_hrm.demo.claims import claims, vote_words
from trl_hrm.demo.report import sections
from trl_hrm.demo.report_pictures import make_pictures
from trl_hrm.pages.numbers import percent
from trl_hrm.pages.page import Table
from trl_hrm.pages.pictures import Picture


ROOT = Path(__file__).resolve().parents[1]
PICTURES = "images/evidence"
INTRODUCTION = """# Evidence

What the two papers claim, and what is seen of it on a small world of arithmetic, from the policy to the curves. This page is written by
`benchmarks/evidence.py` from what `trl-hrm demo` measured; [the demo](demo.md) says what its stages are. It is one small
world with one policy: what holds here may not hold elsewhere, and nothing here is a number of the papers.
"""
NEEDS_GPU = """## What would need a GPU

- Real text: a policy that solves GSM8K or MATH, trees of its solutions, reward models of 1.5 billion parameters and more. Without it nothing
  can be said of the numbers in the papers' tables.
- Reward models at convergence on far more problems. Where a claim is open here, it is mostly for want of seeds or of training.
- The same world with a policy and reward models of some million parameters: no GPU was at hand when this page was made.
"""


def main(args: argparse.Namespace) -> None:
    docs = Path(args.docs)
    data = json.loads((Path(args.demo) / "report.json").read_text(encoding="utf-8"))
    pictures, target = make_pictures(data), docs / PICTURES
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    drawn = [picture for part in pictures.values() for picture in part]
    for picture in drawn:
        (target / f"{picture.name}.png").write_bytes(picture.images["light"])
    (docs / "evidence.md").write_text(page(data, pictures), encoding="utf-8")
    print(f"{docs / 'evidence.md'}: {len(drawn)} pictures in {target}.")


def page(data: dict[str, Any], pictures: dict[str, list[Picture]]) -> str:
    """The page as Markdown."""

    def shown(key: str) -> list[str]:
        return [f"![{picture.title}]({PICTURES}/{picture.name}.png)" for picture in pictures.get(key, ())]

    answers = [[one.paper, one.words, f"**{one.answer}**", one.here] for one in claims(data)]
    parts = [
        INTRODUCTION,
        header(data),
        "## What holds of the papers' claims",
        Table(["paper", "claim", "here", "what was seen"], answers).markdown(),
        vote_words(data),
        *shown("first"),
    ]
    for section in sections(data):
        if section.key == "again":  # the header says how
            continue
        parts += [f"## {section.title}", section.words]
        for caption, table in section.tables:
            parts += [f"### {caption}" if caption else "", table.markdown()]
        parts += [section.note, *shown(section.key)]
    return "\n\n".join(part.strip() for part in [*parts, NEEDS_GPU] if part) + "\n"


def header(data: dict[str, Any]) -> str:
    machine, versions = data["machine"], ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    policy, problems = data["policy"], data["problems"]
    sight = (
        "no right step is corrected"
        if policy["sight"] is None
        else f"slips are corrected {policy['sight']:.0f} times as often as right steps"
    )
    return (
        f"`{data['command']}`, {data['date']}, {data['total_seconds'] / 60:.0f} minutes on {machine['cores']} cores ({machine['processor']}), "
        f"Python {machine['python']}, {versions}. Seed of world and policy {data['seed']}; {problems['train']} problems searched, "
        f"{problems['test']} solved. The policy: {percent(policy['accuracy'])} right, {percent(policy['slip_rate'])} of its steps slip, "
        f"{percent(policy['correction_rate'])} of the slips are corrected by the next step; {sight}."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[1])
    parser.add_argument("demo", help="folder of trl-hrm demo")
    parser.add_argument("--docs", default=str(ROOT / "docs"), help="folder to write evidence.md and its pictures to")
    main(parser.parse_args())
