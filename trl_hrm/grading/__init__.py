r"""
Answers: how they are read from a solution, and whether they are right.

```python
>>> extract_answer("So it is 6.\n\n# Answer\n\n6\n# END!")
'6'
>>> with AnswerGrader() as grader:
...     grader.grade("0.5", r"\frac{1}{2}")
Grade(correct=True, status='graded')
```
"""

from .extraction import DEFAULT_EXTRACTORS, EXTRACTORS, extract_answer, thinking_spans, visible_text
from .grader import AnswerGrader, GraderError
from .judging import Grade, judge


__all__ = [
    "DEFAULT_EXTRACTORS",
    "EXTRACTORS",
    "AnswerGrader",
    "Grade",
    "GraderError",
    "extract_answer",
    "judge",
    "thinking_spans",
    "visible_text",
]
