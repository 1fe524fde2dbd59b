"""Mazes: unique shortest paths, compared with networkx, and what `check_maze` refuses."""

from random import Random

import networkx
import pytest

from trl_hrm.reasoning.data.maze import FREE, GOAL, PATH, START, WALL, check_maze, make_maze
from trl_hrm.reasoning.vocab import MAZE_VOCAB


def graph_of(board: list[int], height: int, width: int) -> networkx.Graph:
    graph = networkx.grid_2d_graph(height, width)
    graph.remove_nodes_from(divmod(cell, width) for cell, symbol in enumerate(board) if symbol == WALL)
    return graph


def ids(text: str) -> list[int]:
    return [MAZE_VOCAB.symbols.index(symbol) for symbol in text]


@pytest.mark.parametrize(
    ("height", "width", "loops", "endpoints"),
    [(9, 9, 0.0, "random"), (9, 9, 0.3, "random"), (5, 13, 0.0, "far"), (11, 11, 0.2, "far"), (29, 29, 0.0, "far")],
)
def test_solution_is_the_only_shortest_path(height, width, loops, endpoints):
    """A longer path, or one of several, would be an answer that the model cannot know."""
    made = trees = 0
    for seed in range(20 if height < 20 else 3):
        maze = make_maze(height, width, Random(seed), loops, endpoints)
        if maze is None:
            continue
        made += 1
        puzzle, solution = maze
        graph = graph_of(puzzle, height, width)
        start, goal = (divmod(puzzle.index(symbol), width) for symbol in (START, GOAL))
        paths = list(networkx.all_shortest_paths(graph, start, goal))
        assert len(paths) == 1
        marked = {divmod(cell, width) for cell, symbol in enumerate(solution) if symbol == PATH}
        assert marked == set(paths[0][1:-1])
        assert [FREE if symbol == PATH else symbol for symbol in solution] == puzzle
        assert check_maze(puzzle, solution, height, width) == (len(paths[0]) - 1, 1)
        assert networkx.is_connected(graph)
        trees += networkx.is_tree(graph)
        if endpoints == "far" and not loops:
            assert len(paths[0]) - 1 == networkx.diameter(graph)
        rooms = {(row, column) for row in range(1, height, 2) for column in range(1, width, 2)}
        assert rooms <= set(graph)
    assert made >= 3
    assert trees == made if not loops else trees < made  # loops are extra passages


def test_mazes_with_several_shortest_paths_are_dropped():
    """Without any inner wall, all paths between rooms in different rows and columns have rivals of the same length."""
    made = [make_maze(7, 7, Random(seed), loops=1.0) for seed in range(50)]
    assert None in made
    for puzzle, _ in filter(None, made):
        (row, column), (other_row, other_column) = (divmod(puzzle.index(symbol), 7) for symbol in (START, GOAL))
        assert row == other_row or column == other_column


SOLVED = "######SoG######"


@pytest.mark.parametrize(
    ("puzzle", "solution", "message"),
    [
        ("#####" "#S G#" "#####", SOLVED, None),
        ("#####" "#S#G#" "#####", "#####" "#S#G#" "#####", "no path"),
        ("#####" "#S S#" "#####", SOLVED, "2 cells with a start"),
        ("#####" "#S  #" "#####", SOLVED, "0 cells with a goal"),
        (SOLVED, SOLVED, "cells of a path"),
        ("#####" "#S G#" "#####", "#####" "#S G#" "#####", "marks 0 cells"),
        ("#####" "#G S#" "#####", SOLVED, "'S' at row 2, column 2, but the puzzle has 'G'"),
        ("#####" "#S G#" "#   #", "#####" "#S G#" "#o  #", "not a shortest path"),
        ("#####" "#S G#" "#   #", "#####" "#S G#" "#ooo#", "marks 3 cells"),
    ],
)  # fmt: skip
def test_check(puzzle, solution, message):
    """Wrong answers in a CSV file must not become labels."""
    if message is None:
        assert check_maze(ids(puzzle), ids(solution), 3, 5) == (2, 1)
        return
    with pytest.raises(ValueError, match=message):
        check_maze(ids(puzzle), ids(solution), 3, 5)


def test_check_counts_shortest_paths():
    """Two paths of the same length around a wall."""
    puzzle = ids("######S  ## # ##  G######")
    solution = ids("######Soo## #o##  G######")
    assert check_maze(puzzle, solution, 5, 5) == (4, 2)
