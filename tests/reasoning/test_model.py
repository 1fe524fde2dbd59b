"""Shapes, counts, initialisation, configuration, and solving of one's own boards."""

import random

import numpy as np
import pytest
import torch

from trl_hrm.reasoning import (
    ARC_VOCAB,
    MAZE_VOCAB,
    HrmGridConfig,
    HrmGridForSolving,
    HrmGridOutput,
    predict,
    sudoku_vocab,
)
from trl_hrm.reasoning.evaluate import first_halt


SMALL = dict(hidden_size=32, num_attention_heads=2, intermediate_size=32, H_layers=1, L_layers=1, halt_max_steps=3)
BOARD = "1..4\n..1.\n.3..\n4..1"


def make_model(preset: str = "hrm", vocab=None, height: int = 4, width: int = 4, **overrides) -> HrmGridForSolving:
    torch.manual_seed(0)
    vocab = sudoku_vocab(4) if vocab is None else vocab
    model = HrmGridForSolving(
        HrmGridConfig.preset(preset, **{**SMALL, "vocab": vocab, "height": height, "width": width, **overrides})
    )
    torch.nn.init.normal_(model.q_head.weight)
    return model


@pytest.mark.parametrize(("preset", "count"), [("hrm", 27_275_266), ("trm", 6_828_034), ("trm_mlp", 5_028_866)])
def test_parameter_counts(preset, count):
    """The published Sudoku models, without the table of puzzle embeddings."""
    with torch.device("meta"):
        model = HrmGridForSolving(HrmGridConfig.preset(preset, vocab=sudoku_vocab(9)))
    assert sum(value.numel() for name, value in model.named_parameters() if not name.startswith("puzzle_emb")) == count
    assert model.puzzle_emb.weight.shape == (1, 512)


def test_initialisation():
    """True standard deviations: torch's truncated normal has 0.88 of what is asked for."""
    torch.manual_seed(0)
    model = HrmGridForSolving(
        HrmGridConfig(hidden_size=256, H_layers=1, L_layers=1, vocab_size=64, position="learned")
    )
    layer = model.H_module.layers[0]
    for weight, std in [
        (model.embed_tokens.weight, 1 / 16),
        (model.embed_positions.weight, 1 / 16),
        (model.lm_head.weight, 1 / 16),
        (layer.self_attn.qkv_proj.weight, 1 / 16),
        (layer.mlp.down_proj.weight, 768**-0.5),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.03)
        assert weight.abs().max() <= 2 / 0.8796 * std
    assert model.z_H_init.std().item() == pytest.approx(1, abs=0.15) and model.z_H_init.shape == (256,)
    assert not torch.equal(model.z_H_init, model.z_L_init)
    assert (model.puzzle_emb.weight == 0).all()
    assert (model.q_head.weight == 0).all() and model.q_head.bias.tolist() == [-5, -5]


def test_embedding_by_hand():
    """The prefix stands first, positions are averaged so that the variance stays, and all is scaled by √d."""
    tokens = torch.tensor([[1, 2, 3, 4] * 4])
    model = make_model(position="learned", num_prefix_tokens=2, puzzle_emb_dim=40)
    torch.nn.init.normal_(model.puzzle_emb.weight)
    x = model.embed(tokens, None)
    prefix = torch.cat((model.puzzle_emb.weight[0], torch.zeros(24))).view(2, 32)
    expected = torch.cat((prefix, model.embed_tokens.weight[tokens[0]])) + model.embed_positions.weight
    torch.testing.assert_close(x[0], expected / 2**0.5 * 32**0.5)
    model = make_model(position="grid")
    cells = model.embed(tokens, None)[0, 1:]
    for cell, (row, column, box) in {0: (0, 0, 0), 6: (1, 2, 1), 9: (2, 1, 2), 15: (3, 3, 3)}.items():
        parts = [model.embed_tokens.weight[tokens[0, cell]], model.embed_rows.weight[row]]
        parts += [model.embed_columns.weight[column], model.embed_boxes.weight[box]]
        torch.testing.assert_close(cells[cell], sum(parts) / 2 * 32**0.5)
    maze = make_model(position="grid", vocab=MAZE_VOCAB, height=2, width=3)
    assert not hasattr(maze, "embed_boxes")
    parts = maze.embed_tokens.weight[1] + maze.embed_rows.weight[1] + maze.embed_columns.weight[0]
    torch.testing.assert_close(maze.embed(torch.full((1, 6), 1), None)[0, 4], parts / 3**0.5 * 32**0.5)


def plain_layer(layer, hidden: torch.Tensor, heads: int, theta: float = 10000.0) -> torch.Tensor:
    """One layer, written with loops over heads and positions."""

    def rms(values):
        return values / (values.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    length, width = hidden.shape
    size = width // heads
    query, key, value = (hidden @ layer.self_attn.qkv_proj.weight.T).split(width, dim=-1)
    output = torch.zeros_like(hidden)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        rotated = []
        for states in (query[:, part], key[:, part]):
            rows = []
            for place in range(length):
                row = torch.zeros(size)
                for i in range(size // 2):
                    angle = torch.tensor(place * theta ** (-2 * i / size))
                    row[i] = states[place, i] * angle.cos() - states[place, i + size // 2] * angle.sin()
                    row[i + size // 2] = states[place, i + size // 2] * angle.cos() + states[place, i] * angle.sin()
                rows.append(row)
            rotated.append(torch.stack(rows))
        scores = (rotated[0] @ rotated[1].T / size**0.5).softmax(-1)
        output[:, part] = scores @ value[:, part]
    hidden = rms(hidden + output @ layer.self_attn.o_proj.weight.T)
    gate, up = (hidden @ layer.mlp.gate_up_proj.weight.T).chunk(2, dim=-1)
    return rms(hidden + (gate * gate.sigmoid() * up) @ layer.mlp.down_proj.weight.T)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layer_against_loops(attention):
    """Rotary positions, heads, norms and SwiGLU against a slow plain version, with both attention implementations."""
    model = make_model(attn_implementation=attention)
    hidden = torch.randn(2, 17, 32)
    with torch.no_grad():
        ours = model.H_module.layers[0](hidden, model.rope)
        for row in range(2):
            expected = plain_layer(model.H_module.layers[0], hidden[row], heads=2)
            torch.testing.assert_close(ours[row], expected, rtol=0, atol=1e-5)


def test_mixer_against_loops():
    """The SwiGLU layer over positions and its norm run over positions, for each channel alone."""
    model = make_model("trm_mlp", num_prefix_tokens=1, mixer_intermediate_size=8)
    layer = model.L_module.layers[0]
    hidden = torch.randn(17, 32)
    with torch.no_grad():
        ours = layer(hidden[None], None)[0]
        mixed = torch.empty_like(hidden)
        for channel in range(32):
            column = hidden[:, channel]
            gate, up = (layer.mixer.gate_up_proj.weight @ column).chunk(2)
            column = column + layer.mixer.down_proj.weight @ (gate * gate.sigmoid() * up)
            mixed[:, channel] = column / (column.pow(2).mean() + 1e-5).sqrt()
        after = mixed + layer.mlp(mixed)
        torch.testing.assert_close(
            ours, after / (after.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt(), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    ("preset", "calls"),
    [
        ("hrm", ["L", "L", "H", "L", "L", "H"]),
        ("trm", (["L"] * 6 + ["L"]) * 3),
        ("loop", ["H"]),
        ("one_pass", ["H"]),
        ("one_pass_deep", ["H"]),
    ],
)
def test_calls_per_segment(preset, calls):
    """Number and order of the calls of a segment."""
    model = make_model(preset)
    called = []
    for name in ("H", "L"):
        if hasattr(model, f"{name}_module"):
            getattr(model, f"{name}_module").register_forward_hook(lambda *_, name=name: called.append(name))
    model(torch.ones(1, 16, dtype=torch.long))
    assert called == calls


def test_depth_of_the_controls():
    """The controls have the layers of HRM, and the deep one as many as a segment of HRM applies."""
    options = {**SMALL, "H_layers": 2, "L_layers": 3, "H_cycles": 2, "L_cycles": 4}
    counts = {
        preset: len(make_model(preset, **options).H_module.layers) for preset in ("loop", "one_pass", "one_pass_deep")
    }
    assert counts == {"loop": 5, "one_pass": 5, "one_pass_deep": 2 * (4 * 3 + 2)}
    assert HrmGridConfig.preset("one_pass", **options | {"halt_max_steps": 1}).halt_max_steps == 1
    assert HrmGridConfig.preset("one_pass").halt_max_steps == HrmGridConfig.preset("one_pass_deep").halt_max_steps == 1


@pytest.mark.parametrize("preset", ["hrm", "trm", "trm_mlp", "loop"])
def test_states(preset):
    """The model has no state of its own, and a board does not depend on its neighbours."""
    model = make_model(preset)
    inputs = torch.randint(1, 6, (8, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = model(inputs)
        second = model(inputs, z_H=first.z_H, z_L=first.z_L)
        assert torch.equal(model(inputs).logits, first.logits)
        assert not torch.allclose(second.logits, first.logits)
        one = model(inputs[3:4], z_H=first.z_H[3:4], z_L=first.z_L[3:4])
        torch.testing.assert_close(one.logits, second.logits[3:4], rtol=0, atol=1e-5)
        z_H, z_L = model.initial_state(8)
        assert torch.equal(model(inputs, z_H=z_H, z_L=z_L).logits, first.logits)
    assert isinstance(first, HrmGridOutput) and first.z_H.shape == z_H.shape and first.z_L.shape == z_L.shape
    z_H[0, 0] += 1
    assert not torch.equal(z_H[0, 0], z_H[1, 0]), "initial states share memory"
    assert first.logits.dtype == first.q_halt_logits.dtype == torch.float32
    assert first.q_halt_logits.shape == first.q_continue_logits.shape == (8,)


def test_loss_of_forward():
    """Rows without labels do not dilute the loss."""
    model = make_model()
    inputs = torch.ones(3, 16, dtype=torch.long)
    labels = torch.randint(2, 6, (3, 16))
    labels[2] = -100
    assert model(inputs, labels=labels).loss.item() == pytest.approx(model(inputs[:2], labels=labels[:2]).loss.item())


def test_puzzle_ids():
    """Each id has its own vector. Without ids, a model with several ids refuses instead of using the blank id."""
    model = make_model(num_puzzle_ids=3)
    torch.nn.init.normal_(model.puzzle_emb.weight)
    inputs = torch.ones(2, 16, dtype=torch.long)
    logits = model(inputs, torch.tensor([1, 2])).logits
    assert not torch.allclose(logits[0], logits[1])
    with pytest.raises(ValueError, match="`puzzle_ids` is missing"):
        model(inputs)
    with pytest.raises(ValueError, match="15 cells. The model expects 4 x 4 = 16"):
        model(inputs[:, 1:], torch.tensor([1, 2]))


@pytest.mark.parametrize("dtype", ["weights", "autocast"])
def test_bf16(dtype):
    """bf16 agrees with float32 within 2e-2, relative to the largest logit. Norms, Q head and outputs stay in float32."""
    model = make_model()
    inputs = torch.randint(1, 6, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model(inputs)
        if dtype == "weights":
            output = model.bfloat16()(inputs)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                output = model(inputs)
    assert output.logits.dtype == output.q_halt_logits.dtype == torch.float32
    error = (output.logits - exact.logits).pow(2).mean().sqrt() / exact.logits.pow(2).mean().sqrt()
    assert error < 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["hrm", "trm_mlp"])
def test_compile(preset, tmp_path, monkeypatch):
    """The compiled segment agrees within 1e-5, without graph breaks."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = make_model(preset, H_cycles=2, L_cycles=1)
    inputs = torch.randint(1, 6, (4, 16), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(2, 6, (4, 16), generator=torch.Generator().manual_seed(1))
    expected = model(inputs, labels=labels)
    expected.loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    output = torch.compile(model, fullgraph=True)(inputs, labels=labels)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(output.z_H, expected.z_H, rtol=0, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"halt_max_steps": 0}, "`halt_max_steps` is 0. It must be at least 1"),
        ({"H_cycles": 0}, "`H_cycles` is 0"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "not a multiple"),
        ({"hidden_size": 6, "num_attention_heads": 2}, "even number"),
        ({"grad_scope": "first"}, "`grad_scope` is 'first'"),
        ({"mixer": "mlp", "position": "rope"}, "does not have"),
        ({"mixer_intermediate_size": 8}, "only used with"),
        ({"vocab": sudoku_vocab(4)}, "digits 1 to 4"),
        ({"vocab": sudoku_vocab(9), "vocab_size": 12}, "has 11 symbols"),
        ({"box_height": 3}, "Only one of"),
        ({"box_height": 2, "box_width": 2}, "do not fill"),
        # augmented boards would have the usual boxes
        (
            {"vocab": sudoku_vocab(6), "height": 6, "width": 6, "box_height": 3, "box_width": 2},
            "boxes of 3 x 2 cells. .* 2 x 3",
        ),
        ({"vocab": sudoku_vocab(9), "box_height": 3}, "boxes of 3 x None cells"),
        ({"H_layers": 0}, "at least 1 layer"),
        ({"tie_modules": True, "H_layers": 2}, "equal `H_layers`"),
        ({"hierarchy": False}, "requires `L_cycles=1`"),
        ({"puzzle_emb_dim": 1024}, "between 0 and"),
        ({"num_puzzle_ids": 3, "puzzle_emb_dim": 0}, "would be ignored"),
        ({"H_layers": 1.0}, "`H_layers` is 1.0. Expected an integer"),
        ({"intermediate_size": 0}, "`intermediate_size` is 0"),
        ({"vocab": "sudoku"}, "has a 'name' and a list"),
        ({"loss_type": "hinge"}, "`loss_type` is 'hinge'"),
        ({"vocab_size": 257}, "`vocab_size` is 257. It must be at most 256"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_configuration(options, message):
    """Options that cannot work, or would have no effect, are refused."""
    with pytest.raises(ValueError, match=message):
        HrmGridConfig(**options)


def test_bad_preset():
    with pytest.raises(ValueError, match="Unknown preset 'big'"):
        HrmGridConfig.preset("big")
    # a configuration keeps unknown fields, as all of transformers do, so a typing error would have no effect
    with pytest.raises(ValueError, match="`H_cycle` is not a field of `HrmGridConfig`. Expected one of .*H_cycles"):
        HrmGridConfig.preset("hrm", H_cycle=3)


def test_unknown_inputs_are_refused():
    """A misspelled state would be ignored, and the segment computed from the initial state."""
    with pytest.raises(TypeError, match="z_h"):
        make_model()(torch.ones(1, 16, dtype=torch.long), z_h=torch.zeros(1, 17, 32))


@pytest.mark.parametrize("make", [np.array, torch.tensor], ids=["numpy", "torch"])
def test_boards_as_arrays(make):
    """Rows of an array were taken for puzzles, because their numbers are not `int`."""
    model, numbers = make_model(), [[1, 0, 0, 4], [0, 0, 1, 0], [0, 3, 0, 0], [4, 0, 0, 1]]
    board, expected = make(numbers), model.solve(numbers)
    assert model.solve(board) == model.solve([*board]) == expected
    assert model.solve([list(row) for row in board]) == expected  # the cells are numbers of numpy, or tensors
    several = model.solve([numbers, numbers])
    assert model.solve([board, board]) == model.solve(make([numbers, numbers])) == several
    assert model.solve([[list(row) for row in board]] * 2) == several
    with pytest.raises(ValueError, match="row 1, column 1 is '1.0'"):
        model.solve(make(numbers) * 1.0)
    with pytest.raises(ValueError, match="no vocabulary"):
        HrmGridConfig().grid_vocab  # noqa: B018


# Solving


def test_solve_forms():
    """One puzzle returns a solution, a list returns a list, whatever the form of the puzzle."""
    model = make_model()
    solution = model.solve(BOARD)
    assert len(solution.answer) == 4 and len(solution.segments) == len(solution.q_halt) == solution.segments_used == 3
    assert solution.answer == solution.segments[-1] and solution.votes == 1
    rows = BOARD.splitlines()
    numbers = [[int(symbol) if symbol != "." else 0 for symbol in row] for row in rows]
    for form in (rows, numbers, [list(row) for row in rows], "".join(rows), " ".join(rows)):
        assert model.solve(form) == solution
    for several in ([BOARD, BOARD], ["".join(rows)] * 2, [rows, rows], [numbers, numbers]):
        found = model.solve(several)
        assert isinstance(found, list) and [one.segments for one in found] == [solution.segments] * 2
    assert model.solve([BOARD]) == [solution]


def test_solve_is_the_model():
    """`solve` returns the answers of `forward` after each segment, for any batch size."""
    model = make_model()
    board = torch.tensor([sum(sudoku_vocab(4).encode(BOARD), [])])
    z_H, z_L = model.initial_state(1)
    solution = model.solve(BOARD, segments=5)
    for segment in range(5):
        with torch.no_grad():
            output = model(board, z_H=z_H, z_L=z_L)
        z_H, z_L = output.z_H, output.z_L
        assert solution.segments[segment] == sudoku_vocab(4).decode(output.logits.argmax(-1)[0].tolist(), 4, 4)
        assert solution.q_halt[segment] == pytest.approx(output.q_halt_logits.item(), abs=1e-5)
    boards = [BOARD, "1...\n....\n....\n....", "....\n....\n..2.\n...."] * 3
    assert [one.answer for one in model.solve(boards, batch_size=2)] == [model.solve(board).answer for board in boards]


class Scripted(torch.nn.Module):
    """Replaces `forward`: a function from (inputs, segment) to (answers, q_halt)."""

    @staticmethod
    def install(model, function, monkeypatch):
        def forward(input_ids, puzzle_ids, z_H, z_L):
            segment = int(z_H.flatten()[0]) + 1
            answers, q_halt = function(input_ids, segment)
            logits = torch.nn.functional.one_hot(answers, model.config.vocab_size).float()
            return HrmGridOutput(None, logits, q_halt, torch.zeros_like(q_halt), torch.full_like(z_H, segment), z_L)

        monkeypatch.setattr(model, "forward", forward)
        model.z_H_init.zero_()


def test_solve_halting(monkeypatch):
    """`q` takes the first segment that halts, `choose` the one with the highest logit, `fixed` the last."""
    model = make_model("trm", halt_max_steps=5)
    logits = {1: -1.0, 2: 0.5, 3: 2.0, 4: 1.0, 5: -3.0}
    Scripted.install(model, lambda ids, s: (torch.full_like(ids, s), torch.full((len(ids),), logits[s])), monkeypatch)
    used = {halting: model.solve(BOARD, halting=halting).segments_used for halting in ("fixed", "q", "choose")}
    assert used == {"fixed": 5, "q": 2, "choose": 3}
    assert [model.solve(BOARD, halting=halting).ids[0][0] for halting in used] == [5, 2, 3]
    logits.update({2: -0.5, 3: -0.1, 4: -0.2})
    assert model.solve(BOARD, halting="q").segments_used == 5


def test_halting_agrees_with_evaluation(monkeypatch):
    """`solve` and `first_halt` must halt by one rule, also with a continue head: two rules would give two accuracies for one model."""
    model = make_model("hrm", halt_max_steps=3)

    def forward(input_ids, puzzle_ids=None, z_H=None, z_L=None):
        z_H, z_L = model.initial_state(len(input_ids)) if z_H is None else (z_H, z_L)
        segment = int(z_H.flatten()[0])
        q_halt = torch.full((len(input_ids),), [0.5, 2.0, -1.0][segment])
        q_continue = torch.full((len(input_ids),), [1.0, 1.0, -9.0][segment])
        logits = torch.nn.functional.one_hot(torch.full_like(input_ids, segment + 2), 6).float()
        return HrmGridOutput(None, logits, q_halt, q_continue, torch.full_like(z_H, segment + 1), z_L)

    monkeypatch.setattr(model, "forward", forward)
    model.z_H_init.zero_()
    answers, segments = first_halt(predict(model, [{"puzzle": [1] * 16}]))
    solution = model.solve(BOARD, halting="q")
    assert solution.segments_used == segments[0] == 1
    assert solution.ids == answers[0].reshape(4, 4).tolist()


def test_halting_does_not_depend_on_the_other_boards(monkeypatch):
    """A board that halts first is computed until its batch is done. What it answers afterwards is not part of its solution."""
    model = make_model("trm", halt_max_steps=5)
    Scripted.install(model, lambda ids, s: (ids, torch.where(ids[:, 0] == 2, s - 1.5, s - 3.5)), monkeypatch)
    other = "2..4\n..2.\n.3..\n4..2"
    together, alone = model.solve([BOARD, other], halting="q"), model.solve(BOARD, halting="q")
    assert together[0] == alone and len(alone.q_halt) == len(alone.segments) == alone.segments_used == 2
    assert together[1].segments_used == len(together[1].segments) == 4


def solver_4x4(ids: torch.Tensor, segment: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An equivariant fake: a blank becomes the digit that the other cells of its row lack, if there is only one."""
    answers = ids.view(-1, 4, 4).clone()
    for board in answers:
        for row in board:
            missing = set(range(2, 6)) - set(row.tolist())
            if len(missing) == 1:
                row[row == 1] = missing.pop()
    return answers.flatten(1), torch.zeros(len(ids))


def test_votes_of_relabelled_copies(monkeypatch):
    """Copies of an equivariant solver agree: a permutation that is undone the wrong way would split the votes."""
    model = make_model()
    Scripted.install(model, solver_4x4, monkeypatch)
    monkeypatch.setattr(
        random.Random, "random", lambda self: 0.9
    )  # No transposition: the fake solver only looks at rows.
    solution = model.solve("12.4\n34.2\n.143\n43.1", votes=12)
    assert solution.votes == 12 and solution.answer == ["1234", "3412", "2143", "4321"]
    assert solution.agrees_with_givens and solution.valid


def test_votes_of_transposed_copies(monkeypatch):
    """A copy is really another board: transposed copies of this puzzle are not solved by rows."""
    model = make_model()
    seen = []
    Scripted.install(model, lambda ids, s: (seen.append(ids.clone()), solver_4x4(ids, s))[1], monkeypatch)
    monkeypatch.setattr(random.Random, "random", lambda self: 0.1)
    solution = model.solve("1...\n3...\n2...\n....", votes=6, segments=1)
    assert solution.votes == 5 and solution.answer == ["1...", "3...", "2...", "4..."]
    assert (seen[0][0].view(4, 4)[:3, 0] > 1).all() and (seen[0][1:].view(5, 4, 4)[:, 0, :3] > 1).all()


def test_votes_of_mazes(monkeypatch):
    """Rotations and reflections are undone: a solver that copies the board gives one answer."""
    model = make_model(vocab=MAZE_VOCAB, height=3, width=3)
    seen = set()

    def solver(ids, segment):
        seen.update(tuple(board) for board in ids.tolist())
        return ids, torch.zeros(len(ids))

    Scripted.install(model, solver, monkeypatch)
    solution = model.solve("S #\n  #\n##G", votes=8)
    assert solution.votes == 8 and solution.answer == ["S #", "  #", "##G"] and len(seen) == 4
    solution = model.solve("S #\n# #\n  G", votes=8)
    assert solution.votes == 8 and len(seen) == 4 + 8
    with pytest.raises(ValueError, match="has 8 symmetries"):
        model.solve("S #\n# #\n  G", votes=9)


def test_votes_are_counted(monkeypatch):
    """The most frequent answer wins; a tie goes to the higher mean logit."""
    model = make_model()
    answers, logits = torch.tensor([2, 3, 3, 4]), torch.tensor([9.0, 0.0, 0.0, 1.0])

    def solver(ids, segment):
        return answers[:, None].expand(-1, 16), logits

    Scripted.install(model, solver, monkeypatch)
    monkeypatch.setattr("torch.randn", lambda shape, generator: torch.zeros(shape))
    solution = model.solve(BOARD, votes=4, noise=1.0, segments=1)
    assert solution.ids[0][0] == 3 and solution.votes == 2
    answers[2] = 5
    solution = model.solve(BOARD, votes=4, noise=1.0, segments=1)
    assert solution.ids[0][0] == 2 and solution.votes == 1 and solution.q_halt == [9.0]


def test_noise():
    """Noise is seeded, differs between votes and changes the answer of an untrained model."""
    model = make_model()
    first = model.solve(BOARD, noise=2.0, votes=3, seed=1)
    assert first == model.solve(BOARD, noise=2.0, votes=3, seed=1)
    # Matrix products of another batch size round differently.
    other = model.solve([BOARD, BOARD], noise=2.0, votes=3, seed=1, batch_size=4)[1]
    assert other.segments == first.segments and other.q_halt == pytest.approx(first.q_halt, abs=1e-4)
    assert first.q_halt != model.solve(BOARD, noise=2.0, votes=3, seed=2).q_halt
    assert first.q_halt != model.solve(BOARD).q_halt
    assert first.votes < 3


def test_checks_of_the_answer(monkeypatch):
    """`valid` sees rows, columns and boxes; `agrees_with_givens` sees a changed given."""
    model = make_model()
    board = {}
    Scripted.install(model, lambda ids, s: (torch.tensor([board["ids"]]), torch.zeros(1)), monkeypatch)
    for rows, agrees, valid in [
        ("1234 3412 2143 4321", True, True),
        ("1234 2341 3412 4123", True, False),  # Boxes.
        ("1234 1234 1234 1234", True, False),  # Columns.
        ("2143 3412 1234 4321", False, True),
    ]:
        board["ids"] = sum(sudoku_vocab(4).encode(rows), [])
        solution = model.solve("1...\n....\n....\n....".replace("1", rows[0] if agrees else "1"), segments=1)
        assert (solution.agrees_with_givens, solution.valid) == (agrees, valid), rows
    model = make_model(vocab=MAZE_VOCAB, height=1, width=5)
    Scripted.install(model, lambda ids, s: (torch.tensor([board["ids"]]), torch.zeros(1)), monkeypatch)
    for answer, agrees in [("SooG#", True), ("S ooG", False), ("Soo#G", False), ("SoGo#", False)]:
        board["ids"] = MAZE_VOCAB.encode([answer])[0]
        assert model.solve(["S  G#"], segments=1).agrees_with_givens is agrees, answer


def test_arc(monkeypatch):
    """A grid is padded with <eos> at its right and bottom, and the answer is cropped to the largest rectangle of colours."""
    model = make_model(vocab=ARC_VOCAB, height=4, width=5)
    seen = []
    Scripted.install(model, lambda ids, s: (seen.append(ids), (ids, torch.zeros(1)))[1], monkeypatch)
    solution = model.solve([[0, 1, 2], [3, 4, 5]], segments=1)
    assert seen[0].view(4, 5).tolist() == [[2, 3, 4, 1, 0], [5, 6, 7, 1, 0], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]]
    assert solution.answer == ["012", "345"] and solution.valid is None
    full = [[1] * 5] * 4
    assert model.solve(full, segments=1).answer == ["11111"] * 4
    with pytest.raises(ValueError, match="5 x 5 cells"):
        model.solve([[1] * 5] * 5)
    with pytest.raises(ValueError, match="no symmetries"):
        model.solve(full, votes=2)


@pytest.mark.parametrize(
    ("puzzle", "options", "message"),
    [
        ("1...\n....", {}, "2 x 4 cells. The model expects 4 x 4"),
        ("1..x\n....\n....\n....", {}, "row 1, column 4 is 'x'"),
        ([BOARD, "1..x\n....\n....\n...."], {}, "Puzzle 2: row 1, column 4"),
        ("1..1\n....\n....\n....", {}, "digit 1 is given twice in row 1"),
        ("1...\n....\n....\n1...", {}, "twice in column 1"),
        ("....\n....\n..2.\n...2", {}, "twice in the box at row 3, column 3"),
        ([], {}, "Expected text, rows"),
        ([1, 2], {}, "Expected text, rows"),
        (np.array([1, 2]), {}, "Expected text, rows"),
        (None, {}, "Found the puzzle 'None'. Expected text, rows"),
        ({"puzzle": [1, 2]}, {}, "Expected text, rows"),
        (BOARD, {"segments": 0}, "`segments` is 0"),
        (BOARD, {"votes": 0}, "`votes` is 0"),
        (BOARD, {"halting": "first"}, "Expected 'fixed', 'q' or 'choose'"),
        (BOARD, {"noise": -1.0}, "at least 0"),
        (BOARD, {"puzzle_id": "a"}, "has no puzzle ids, found `puzzle_id='a'`"),
        (BOARD, {"allow_blank_id": True}, "has no puzzle ids, found `allow_blank_id=True`"),
        ([BOARD, BOARD], {"puzzle_id": ["a"]}, "1 puzzle ids for 2 puzzles"),
    ],
    ids=range(18),
)
def test_bad_puzzles(puzzle, options, message):
    """A puzzle or option that cannot be right is refused before the model runs."""
    with pytest.raises(ValueError, match=message):
        make_model().solve(puzzle, **options)


def test_unknown_puzzle_id():
    """An unknown id is an error, and only the blank id if that is allowed."""
    model = make_model(num_puzzle_ids=4)
    torch.nn.init.normal_(model.puzzle_emb.weight)
    model.puzzle_index = {"a": 1, "b": 2}
    known = model.solve(BOARD, puzzle_id="b")
    assert known.q_halt != model.solve(BOARD, puzzle_id="a").q_halt
    assert model.solve([BOARD, BOARD], puzzle_id=["a", "b"])[1].answer == known.answer
    for options in ({"puzzle_id": "c"}, {}):
        with pytest.raises(ValueError, match="only knows the 2 ids"):
            model.solve(BOARD, **options)
        blank = model.solve(BOARD, **options, allow_blank_id=True)
        with torch.no_grad():
            inputs = torch.tensor([sum(sudoku_vocab(4).encode(BOARD), [])])
            assert blank.q_halt[0] == pytest.approx(model(inputs, torch.tensor([0])).q_halt_logits.item(), abs=1e-5)
