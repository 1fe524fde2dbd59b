"""Mazes with one shortest path, in the format of maze-30x30-hard-1k: `#` wall, space, `S` start, `G` goal, `o` path."""

from collections.abc import Sequence
from functools import cache
from random import Random

from ..vocab import MAZE_VOCAB


WALL, FREE, START, GOAL, PATH = map(MAZE_VOCAB.symbols.index, "# SGo")


@cache
def _neighbours(height: int, width: int) -> list[tuple[int, ...]]:
    """Return the cells next to each cell of a board, in the order up, left, right, down."""
    return [
        tuple(
            (row + down) * width + column + right
            for down, right in ((-1, 0), (0, -1), (0, 1), (1, 0))
            if 0 <= row + down < height and 0 <= column + right < width
        )
        for row in range(height)
        for column in range(width)
    ]


def make_maze(
    height: int, width: int, random: Random, loops: float = 0.0, endpoints: str = "random"
) -> tuple[list[int], list[int]] | None:
    """
    Make a maze by depth-first search.

    The rooms are the cells in odd rows and columns. A search in random order joins all of them, so that there is exactly one path between
    two rooms. With `loops`, walls between rooms are removed afterwards.

    Args:
        height (`int`):
            Number of rows, odd and at least 5.
        width (`int`):
            Number of columns, odd and at least 5.
        random (`Random`):
            Source of randomness.
        loops (`float`, *optional*, defaults to `0.0`):
            Probability with which each of the remaining walls between two rooms is removed.
        endpoints (`str`, *optional*, defaults to `"random"`):
            `"random"`: start and goal are two random rooms. `"far"`: the goal is a room with the longest path from the start, and the start
            is a room with the longest path from a random room. Without loops, no two rooms have a longer path between them.

    Returns:
        `tuple[list[int], list[int]]` or `None`: Puzzle and solution as ids of [`~reasoning.vocab.MAZE_VOCAB`]. `None` if there are several
        shortest paths.
    """
    board = [WALL] * (height * width)
    rooms = [row * width + column for row in range(1, height, 2) for column in range(1, width, 2)]
    steps = {
        room: [
            room + 2 * step
            for step, is_inside in (
                (-width, room >= 2 * width),
                (-1, room % width > 1),
                (1, room % width < width - 2),
                (width, room < (height - 2) * width),
            )
            if is_inside
        ]
        for room in rooms
    }
    path = [random.choice(rooms)]
    board[path[0]] = FREE
    while path:
        closed = [room for room in steps[path[-1]] if board[room] == WALL]
        if not closed:
            path.pop()
            continue
        room = random.choice(closed)
        board[(path[-1] + room) // 2] = board[room] = FREE
        path.append(room)
    if loops:
        for room in rooms:
            for other in steps[room]:
                if other > room and board[(room + other) // 2] == WALL and random.random() < loops:
                    board[(room + other) // 2] = FREE
    if endpoints == "far":
        start = _farthest(board, height, width, random.choice(rooms), rooms)
        goal = _farthest(board, height, width, start, rooms)
    else:
        start, goal = random.sample(rooms, 2)
    board[start], board[goal] = START, GOAL
    shortest, number = shortest_path(board, height, width)
    if number > 1:
        return None
    solution = list(board)
    for cell in shortest[1:-1]:
        solution[cell] = PATH
    return board, solution


def _distances(board: Sequence[int], height: int, width: int, start: int) -> list[int]:
    """Return the length of the shortest path from `start` to each cell, -1 for cells without one."""
    neighbours = _neighbours(height, width)
    distances = [-1] * len(board)
    distances[start] = 0
    reached = [start]
    for cell in reached:  # it grows
        for other in neighbours[cell]:
            if distances[other] < 0 and board[other] != WALL:
                distances[other] = distances[cell] + 1
                reached.append(other)
    return distances


def _farthest(board: Sequence[int], height: int, width: int, start: int, rooms: Sequence[int]) -> int:
    """Return the first room with the longest path from `start`."""
    return max(rooms, key=_distances(board, height, width, start).__getitem__)


def shortest_path(board: Sequence[int], height: int, width: int) -> tuple[list[int], int]:
    """
    Return the cells of a shortest path from start to goal, and the number of shortest paths. Without a path, the list is empty and the
    number 0.

    Args:
        board (`Sequence[int]`):
            Puzzle with one start and one goal.
        height (`int`), width (`int`):
            Number of rows and of columns.
    """
    neighbours = _neighbours(height, width)
    goal = board.index(GOAL)
    distances = _distances(board, height, width, board.index(START))
    if distances[goal] < 0:
        return [], 0
    path, counts = [goal], {goal: 1}
    layer = [goal]
    for distance in range(distances[goal] - 1, -1, -1):
        following = {}
        for cell in layer:
            for other in neighbours[cell]:
                if distances[other] == distance and board[other] != WALL:
                    following[other] = following.get(other, 0) + counts[cell]
        layer, counts = list(following), following
        path.append(next(cell for cell in neighbours[path[-1]] if distances[cell] == distance and board[cell] != WALL))
    return path[::-1], sum(counts.values())


def check_maze(puzzle: Sequence[int], solution: Sequence[int], height: int, width: int) -> tuple[int, int]:
    """
    Check that the solution of a maze is a shortest path in it.

    Args:
        puzzle (`Sequence[int]`), solution (`Sequence[int]`):
            Ids of [`~reasoning.vocab.MAZE_VOCAB`].
        height (`int`), width (`int`):
            Number of rows and of columns.

    Returns:
        `tuple[int, int]`: Number of steps of the path, and number of shortest paths.

    Raises:
        `ValueError`: If the puzzle has no path, or the solution has other walls, or no shortest path.
    """
    for symbol, name in ((START, "start `S`"), (GOAL, "goal `G`")):
        if puzzle.count(symbol) != 1:
            raise ValueError(f"the puzzle has {puzzle.count(symbol)} cells with a {name}. It must have one.")
    if PATH in puzzle:
        raise ValueError("the puzzle has cells of a path, `o`. Only the solution may have them.")
    for cell, (given, found) in enumerate(zip(puzzle, solution, strict=True)):
        if found != given and (given, found) != (FREE, PATH):
            raise ValueError(
                f"the solution has {MAZE_VOCAB.symbols[found]!r} at row {cell // width + 1}, column {cell % width + 1}, but the puzzle has "
                f"{MAZE_VOCAB.symbols[given]!r} there."
            )
    path, number = shortest_path(puzzle, height, width)
    if not path:
        raise ValueError("the puzzle has no path from start to goal.")
    # A set of cells that leads from start to goal and is as small as the shortest path is one
    marked = [FREE if cell == PATH else cell if cell in (START, GOAL) else WALL for cell in solution]
    if solution.count(PATH) != len(path) - 2 or not shortest_path(marked, height, width)[0]:
        raise ValueError(
            f"the solution marks {solution.count(PATH)} cells, which are not a shortest path. It must mark the {len(path) - 2} cells "
            "between start and goal."
        )
    return len(path) - 1, number
