"""Language models as judges: scripted verdict rates give the expected scores, intervals and cost, and a log is read again."""



from trl_hrm import GenerativeScorer

from .judges import Judge, instruct


PROBLEMS = ["1+1?", "2+2?"]
CANDIDATES = [[["a p0.8", "b p0.3"], ["a p0.8", "c p0.5", "d p1"]], [["e p0"]]]


def scorer_of(script=instruct, kind=Judge, **options):
    return GenerativeScorer(kind(script), **{"num_samples": 8, **options})


def test_scores_are_the_shares_of_yes_that_the_script_drew():
    """Recomputed from the engine's own responses, so that a response of another step or sample would be noticed."""
    scorer = scorer_of(num_samples=5)
    scores = scorer.score(PROBLEMS, CANDIDATES)
    again = Judge(instruct)
    for problem, group, found in zip(PROBLEMS, CANDIDATES, scores, strict=True):
        for steps, values in zip(group, found, strict=True):
            for number, value in enumerate(values, 1):
                prompt_ids = scorer.template.encode(scorer.tokenizer, problem, steps[:number])
                assert again.tokenizer.decode(prompt_ids) in [prompt for prompt, _ in scorer.engine.requests]
                lines = [line for line in lines_of(scorer, prompt_ids)]
                assert value == sum(p for p, _, _ in lines) / 5
    assert scores[0][1][2] == 1 and scores[1][0][0] == 0  # p1 and p0


def lines_of(scorer, prompt_ids):
    [prompt] = [one for key, one in scorer._prompts.items() if key == key_of(scorer, prompt_ids)]
    return prompt.samples


def key_of(scorer, prompt_ids):
    import hashlib

    return hashlib.blake2b(repr((scorer.seed, prompt_ids)).encode(), digest_size=16).hexdigest()
