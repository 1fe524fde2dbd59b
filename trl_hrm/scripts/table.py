"""
Compare the results of several runs with the numbers in a table of a paper.

```bash
trl-hrm table recipes/papers/hrm/table3.yaml --runs runs/papers --output table3.md
```
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..config import Config
from ..io import claimed_file, replacing


MARK = "<!-- Made by `trl-hrm table`. -->\n"


@dataclass(kw_only=True)
class TableConfig(Config):
    """
    Configuration of [`table`].

    Args:
        layout (`str`):
            YAML file with the layout of the table: its rows, its columns, the run and curve of each number, and the numbers of the
            paper. See [`~evaluation.tables.Layout`].
        runs (`str`, *optional*, defaults to `"runs/papers"`):
            Folder with the output folders of all runs.
        output (`str`, *optional*, defaults to `"table.md"`):
            Output file, in Markdown. Pictures are saved in a folder next to it, such as `table_files` for `table.md`.
    """

    layout: str = field(
        metadata={
            "help": "YAML file with the layout of the table: its rows, its columns, the run and curve of each number, and the "
            "numbers of the paper.",
            "metavar": "LAYOUT",
            "positional": True,
        }
    )
    runs: str = field(
        default="runs/papers", metadata={"help": "Folder with the output folders of all runs.", "metavar": "DIR"}
    )
    output: str = field(
        default="table.md",
        metadata={
            "help": "Output file, in Markdown. Pictures are saved in a folder next to it, such as table_files for table.md.",
            "metavar": "FILE",
        },
    )


def table(config: TableConfig) -> str:
    """
    Write the table of a layout, with the intervals of the results and the numbers of the paper. Runs without results leave their cells
    empty and are listed.

    Args:
        config ([`TableConfig`]):
            Layout, runs and output file.

    Returns:
        `str`: The table, and the path of the file.

    Raises:
        `FileNotFoundError`: If no run has results.
        `FileExistsError`: If `output` exists and is not a table of this command.
        `ValueError`: If the layout or a result is invalid.
    """
    from ..evaluation.tables import captions, draw_table, fill_table, format_table, read_layout
    from ..pages.page import write_pictures

    output = Path(config.output)
    with claimed_file(config.output, "output", [config.layout]) as target:
        if target.exists() and not target.read_bytes().startswith(MARK.encode()):
            raise FileExistsError(f"{output} exists and is not a table of this command. Choose another `output`.")
        filled = fill_table(read_layout(config.layout), config.runs)
        text, pictures = format_table(filled), draw_table(filled)
        write_pictures(pictures, target)
        with replacing(target) as file:
            file.write(f"{MARK}{text}\n\n{captions(pictures, f'{target.stem}_files')}\n")
    return f"{text}\n\nTable: {output}; pictures: {len(pictures)} in {output.with_name(f'{output.stem}_files')}/"
