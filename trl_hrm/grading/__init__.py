r"""
Extract answers from solutions, and compare them with reference answers.

```python
>>> extract_answer("So it is 6.\n\n# Answer\n\n6\n# END!")
'6'
>>> with AnswerGrader() as grader:
...     grader.grade("0.5", r"\frac{1}{2}")
Grade(correct=True, status='graded')
```
"""

from .comparison import Grade, judge
from .extraction import (
    DEFAULT_EXTRACTORS,
    EXTRACTORS,
    extract_answer,
    opens_thinking,
    thinking_spans,
    visible_text,
    without_thinking_tags,
)
from .grader import AnswerGrader, GraderError


__all__ = [
    "DEFAULT_EXTRACTORS",
    "EXTRACTORS",
    "AnswerGrader",
    "Grade",
    "GraderError",
    "extract_answer",
    "judge",
    "opens_thinking",
    "thinking_spans",
    "visible_text",
    "without_thinking_tags",
]
