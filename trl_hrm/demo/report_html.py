"""The page of the demo's report: what is asked first, the claims, and every section below."""

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from ..evaluation.hacking import percent
from ..evaluation.report_page import card, figure, kept, page, section
from ..evaluation.report_pictures import Picture
from .claims import Claim, claims
from .hacking import WAYS, Headline, headlines, vote_words
from .over_seeds import MIN_SEEDS
from .report_pictures import band_words
from .report_sections import accuracy, calibration, depth_cap, gap, step_kinds, wrong_prefix
from .report_training import again, cost, eta, hnc, made, self_training, tree
from .world import SIGHT


TITLE = "Is my reward model being hacked?"
HACKING = (
    "A reward model chooses among N candidates. With more of them there are more right ones to choose, and more wrong ones that it "
    "takes for right. It is hacked when the second wins: the more it has to choose from, the worse its choice. Its scores do not "
    "show that, for the best score only rises with N: graded answers do."
)
RULE = (
    f"Held or not held: a 95 % interval over at least {MIN_SEEDS} seeds leaves out what the other answer would need. All else is open. "
    "Where a claim is that a curve is stable, or that something matters, differences below 5 points count as none. Seeds share the "
    "test problems, the labels and the policy of one small world of arithmetic: what holds here may not hold elsewhere, and the best N is "
    "chosen on the problems that it is measured on."
)
CHIPS = {"yes": "hacked", "no": "stable", "open": "not settled"}
Make = Callable[[dict[str, Any], Sequence[Picture]], str]

SECTIONS: tuple[tuple[str, str, Make], ...] = (
    ("accuracy", "Accuracy over N", accuracy),
    ("gap", "Hacking gap", gap),
    ("wrong-prefix", "Search from a wrong prefix", wrong_prefix),
    ("step-kinds", "Scores after an error", step_kinds),
    ("depth-cap", "Values by depth cap", depth_cap),
    ("calibration", "Calibration", calibration),
    ("lambda", "Self-training and λ", self_training),
    ("eta", "Entropy labels and η", eta),
    ("hnc", "Node compression (HNC)", hnc),
    ("tree", "A search tree", tree),
    ("made", "Data sets and reward models", made),
    ("cost", "Cost of every stage", cost),
    ("again", "Run it again", again),
)
STYLE = """\
.first .card { margin-bottom: 8px; padding: 8px 14px; }
.first .card h2 { margin-bottom: 2px; }
.first .card p { margin-bottom: 4px; font-size: 14px; line-height: 1.4; }
.first .card ul { margin-bottom: 0; }
.first .card p.quiet { display: none; }
.lead { max-width: 130ch; margin-bottom: 4px; font-size: 14px; line-height: 1.4; }
.first .vote { margin-top: 10px; font-size: 13px; color: var(--quiet); }
.contents { margin-top: 28px; padding: 10px 14px; border: 1px solid var(--rule); border-radius: 8px; background: var(--surface); }
.contents h2 { display: inline; margin-right: 10px; font-size: 14px; }
.contents ul { display: inline; margin: 0; padding: 0; }
.contents li { display: inline-block; margin-right: 14px; padding: 2px 0; }
a { color: var(--accent); }
.claims td, .claims tbody th { min-width: 11em; text-align: left; white-space: normal; vertical-align: top; }
.claims td:last-child { min-width: 24em; }
.claims thead th { text-align: left; }
.claims .chip { white-space: nowrap; }
.claims .chips { min-width: 6em; }
.held { color: var(--good); }
.failed { color: var(--bad); }
.wide picture { overflow-x: auto; }
.wide img { min-width: 860px; }
.words :is(th, td) { text-align: left; }
section > div > * + :is(p, details, figure, .scroll, .grid) { margin-top: 12px; }
section > div > .grid { margin-bottom: 0; }
.claims td:nth-child(2) { min-width: 4em; }
@media (max-width: 820px) {
  .claims :is(th, td) { padding: 6px 7px; }
  .claims tbody th { min-width: 8em; }
  .claims td:last-child { min-width: 18em; }
}
"""


def html_page(data: dict[str, Any], pictures: dict[str, list[Picture]]) -> str:
    """
    The report as a page.

    Args:
        data (`dict[str, Any]`):
            The measurements. See [`write_report`].
        pictures (`dict[str, list[Picture]]`):
            See [`make_pictures`].

    Returns:
        `str`: The page. The same measurements give the same bytes.
    """
    parts = [("claims", "What holds of the papers' claims", _claims(data, claims(data)))]
    parts += [(key, title, make(data, pictures.get(key, []))) for key, title, make in SECTIONS]
    parts = [part for part in parts if part[2]]
    body = [
        f'<p class="kicker">{escape(_kicker(data))}</p>',
        f"<h1>{TITLE}</h1>",
        _warning(data["policy"]),
        f'<p class="lead">{kept(HACKING)}</p>',
        _first(data, headlines(data), pictures["first"]),
        _contents([(key, title) for key, title, _ in parts]),
        *(section(title, content, key=key) for key, title, content in parts),
    ]
    return page(TITLE, body, STYLE)


def _kicker(data: dict[str, Any]) -> str:
    number = max(len(model["seeds"]) for way in WAYS for model in data[way]["models"])
    return (
        f"trl-hrm demo, profile {data['profile']} · {data['problems']['test']:,} test problems · "
        f"{number} seed{'s' * (number != 1)} of each reward model at most · {data['date']}"
    )


def _warning(policy: dict[str, Any]) -> str:
    """What must be known first where the policy does not see its own errors."""
    if policy["is_sighted"]:
        return ""
    sight = "" if policy["sight"] is None else f", {policy['sight']:.1f} times as often, expected at least {SIGHT}"
    text = (
        f"This policy does not see its own errors: it corrects {percent(policy['correction_rate'])} of its slips, and "
        f"{percent(policy['spurious_rate'])} of its right steps{sight}. What stands below about corrections and wrong prefixes shows "
        "nothing. Run again with another seed or a longer training of the policy."
    )
    return f'<p class="notice" role="note"><strong>Warning.</strong> {kept(text)}</p>'


def _first(data: dict[str, Any], found: Sequence[Headline], pictures: Sequence[Picture]) -> str:
    """What is seen first: a verdict for each reward model, and the curves beside them."""
    cards = "".join(card(one.title, one.verdict, f"By {WAYS[one.way]}", CHIPS) for one in found)
    vote = f'<p class="vote">{kept(f"{band_words(data)} {vote_words(data)}")}</p>'
    return (
        f'<section class="first" aria-label="Answer"><div class="cards">{cards}</div>'
        f"<div>{''.join(map(figure, pictures))}{vote}</div></section>"
    )


def _contents(parts: Sequence[tuple[str, str]]) -> str:
    links = "".join(f'<li><a href="#{key}">{escape(title)}</a></li>' for key, title in parts)
    return f'<nav class="contents" aria-label="Contents"><h2>On this page</h2><ul>{links}</ul></nav>'


def _claims(data: dict[str, Any], found: Sequence[Claim]) -> str:
    """Claims in a table, with the answer as a chip and in words."""
    colors = {"held": "held", "not held": "failed", "open": ""}
    rows = "".join(
        f'<tr><th scope="row">{kept(one.words)}</th><td>{escape(one.paper)}</td>'
        f'<td class="chips"><span class="chip {colors[one.answer]}">{one.answer}</span></td><td>{kept(one.here)}</td></tr>'
        for one in found
    )
    head = "".join(
        f'<th scope="col">{name}</th>' for name in ("the papers claim", "paper", "here", "what is seen here")
    )
    numbers = {answer: sum(one.answer == answer for one in found) for answer in colors}
    summary = ", ".join(f"{number} {answer}" for answer, number in numbers.items())
    return (
        f"<p>{len(found)} claims: {summary}. {kept(vote_words(data))}</p>"
        f'<div class="scroll" tabindex="0"><table class="claims"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="quiet">{kept(RULE)}</p>'
    )
