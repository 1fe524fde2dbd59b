"""
Training speed and memory of the reasoning models: steps per second of each system, compared with the arithmetic of the original code.

    python benchmarks/reasoning_speed.py --output outputs/reasoning_speed.json

A step is one segment of all slots of a batch with its optimizer step: halted slots take new puzzles, forward, loss, with a continue head the
forward pass of the target, backward, Adam-atan2. Each system runs in its own process with `--threads` threads. The processes take turns, one round
each, and only one of them runs at a time. On CPU, times are CPU seconds of the process: other work on the machine changes them less than the
time on the clock. Ratios are ratios of the medians of the rounds.

- `HRM original` and `TRM original` are plain PyTorch references in this file. They follow the structure of the original code call by call (`OriginalModel`),
  with `scaled_dot_product_attention` in place of FlashAttention and Adam-atan2 in PyTorch's multi-tensor functions in place of the CUDA kernel.
- `hrm_continue` is the HRM as published, `hrm` has no continue head, `trm` is the TRM, `loop` has no hierarchy, `one_pass` is `loop` without
  recurrence, and `one_pass_deep` has as many layer calls as a segment of HRM.

The rows trained per row drawn are from a short training on self-made puzzles of 4x4 cells. The original draws a row for each slot and step, and
uses it if the slot halted. Here, a row is drawn when a slot halts.
"""

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from common import version_words
from torch import nn


# Shape: side of the board, vocabulary, width, heads, layers, batch, maximum number of segments
SHAPES = {
    "6x6, d 64": {"size": 6, "vocab_size": 8, "hidden_size": 64, "heads": 4, "layers": 1, "batch": 64},
    "9x9, d 128": {"size": 9, "vocab_size": 11, "hidden_size": 128, "heads": 4, "layers": 2, "batch": 16},
    "9x9, d 512": {"size": 9, "vocab_size": 11, "hidden_size": 512, "heads": 8, "layers": 4, "batch": 2},
}
SYSTEMS = ["HRM original", "hrm_continue", "hrm", "TRM original", "trm", "loop", "one_pass", "one_pass_deep"]
PEERS = {"hrm_continue": "HRM original", "trm": "TRM original"}
MAX_SEGMENTS = 16


def truncated(shape: tuple[int, ...], std: float) -> nn.Parameter:
    """Return a parameter from a normal distribution truncated at two standard deviations, with the standard deviation `std`."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), a=-2, b=2) * (std / 0.87962566))


class OriginalLinear(nn.Module):
    """Linear layer that casts its fp32 weights to the type of its input at each call."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.weight = truncated((outputs, inputs), inputs**-0.5)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype) if self.bias is not None else None)


def original_norm(x: torch.Tensor) -> torch.Tensor:
    dtype, x = x.dtype, x.to(torch.float32)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    dtype, x = x.dtype, x.to(cos.dtype)
    first, second = x.chunk(2, -1)
    return (x * cos.unsqueeze(-2) + torch.cat((-second, first), -1) * sin.unsqueeze(-2)).to(dtype)


class OriginalBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, inner = heads, math.ceil(round(width * 8 / 3) / 256) * 256
        self.qkv, self.out = OriginalLinear(width, 3 * width), OriginalLinear(width, width)
        self.gate_up, self.down = OriginalLinear(width, 2 * inner), OriginalLinear(inner, width)

    def forward(self, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rows, length, width = h.shape
        qkv = self.qkv(h).view(rows, length, 3 * self.heads, -1)
        query, key, value = (
            qkv[:, :, : self.heads],
            qkv[:, :, self.heads : 2 * self.heads],
            qkv[:, :, 2 * self.heads :],
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
        h = original_norm(h + self.out(attended.reshape(rows, length, width)))
        gate, up = self.gate_up(h).chunk(2, -1)
        return original_norm(h + self.down(F.silu(gate) * up))


class OriginalModule(nn.Module):
    def __init__(self, layers: int, width: int, heads: int):
        super().__init__()
        self.layers = nn.ModuleList([OriginalBlock(width, heads) for _ in range(layers)])

    def forward(self, h: torch.Tensor, injection: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = h + injection
        for layer in self.layers:
            h = layer(h, cos, sin)
        return h


class OriginalModel(nn.Module):
    """HRM, or TRM with `tied`, in the structure of the original code, in fp32, with one prefix token for the puzzle."""

    def __init__(self, size, vocab_size, hidden_size, heads, layers, tied=False):
        super().__init__()
        self.tied, self.cells, width = tied, size * size, hidden_size
        self.prefix = 16 if tied else 1
        self.H_cycles, self.L_cycles = (3, 6) if tied else (2, 2)
        self.scale = width**0.5
        self.embedding = truncated((vocab_size, width), width**-0.5)
        self.H = OriginalModule(layers, width, heads)
        self.L = self.H if tied else OriginalModule(layers, width, heads)
        self.lm_head, self.q_head = OriginalLinear(width, vocab_size), OriginalLinear(width, 2, bias=True)
        with torch.no_grad():
            self.q_head.weight.zero_()
            self.q_head.bias.fill_(-5)
        inverse = 1 / 10000 ** (torch.arange(0, width // heads, 2) / (width // heads))
        angles = torch.outer(torch.arange(self.cells + self.prefix, dtype=torch.float32), inverse).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())
        self.register_buffer("start", truncated((2, width), 1.0).detach())
        self.puzzle_vector = nn.Buffer(torch.zeros(1, width))

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        puzzle = F.pad(self.puzzle_vector.expand(len(x), -1), (0, (self.prefix - 1) * self.puzzle_vector.shape[1]))
        return self.scale * torch.cat((puzzle.view(len(x), self.prefix, -1), F.embedding(x.int(), self.embedding)), 1)

    def inner(self, z_H: torch.Tensor, z_L: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the new states, the logits and the two q values of one segment."""
        e, rope = self.embed(x), (self.cos, self.sin)
        with torch.no_grad():
            if self.tied:
                for _ in range(self.H_cycles - 1):
                    for _ in range(self.L_cycles):
                        z_L = self.L(z_L, z_H + e, *rope)
                    z_H = self.H(z_H, z_L, *rope)
            else:
                for h in range(self.H_cycles):
                    for step in range(self.L_cycles):
                        if not (h == self.H_cycles - 1 and step == self.L_cycles - 1):
                            z_L = self.L(z_L, z_H + e, *rope)
                    if h != self.H_cycles - 1:
                        z_H = self.H(z_H, z_L, *rope)
        for _ in range(self.L_cycles if self.tied else 1):
            z_L = self.L(z_L, z_H + e, *rope)
        z_H = self.H(z_H, z_L, *rope)
        q = self.q_head(z_H[:, 0]).to(torch.float32)
        return z_H.detach(), z_L.detach(), self.lm_head(z_H)[:, self.prefix :], q[:, 0], q[:, 1]

    def forward(
        self, carry: dict[str, torch.Tensor], x: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, dict]:
        """Return the summed loss of one segment and the new carry. Halted slots take the row at their place in the batch."""
        halted = carry["halted"]
        z_H = torch.where(halted.view(-1, 1, 1), self.start[0], carry["z_H"])
        z_L = torch.where(halted.view(-1, 1, 1), self.start[1], carry["z_L"])
        steps = torch.where(halted, 0, carry["steps"])
        x = torch.where(halted.view(-1, 1), x, carry["x"])
        labels = torch.where(halted.view(-1, 1), labels, carry["labels"])
        z_H, z_L, logits, q_halt, q_continue = self.inner(z_H, z_L, x)
        with torch.no_grad():
            steps = steps + 1
            last = steps >= MAX_SEGMENTS
            halted = last | (q_halt > 0 if self.tied else q_halt > q_continue)
            explored = torch.rand_like(q_halt) < 0.1
            halted = halted & (steps >= explored * torch.randint_like(steps, 2, MAX_SEGMENTS + 1))
            if not self.tied:
                next_halt, next_continue = self.inner(z_H, z_L, x)[-2:]
                target = torch.sigmoid(torch.where(last, next_halt, torch.maximum(next_halt, next_continue)))
            right = (logits.argmax(-1) == labels).all(-1)
        wide = logits.to(torch.float64)
        wide = torch.where(wide < 0, 1 / (1 - wide + 1e-30), wide + 1)
        chosen = torch.log(wide / wide.sum(-1, keepdim=True)).gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
        loss = -(chosen / self.cells).sum()
        loss = loss + 0.5 * F.binary_cross_entropy_with_logits(q_halt, right.to(q_halt.dtype), reduction="sum")
        if not self.tied:
            loss = loss + 0.5 * F.binary_cross_entropy_with_logits(q_continue, target, reduction="sum")
        return loss, {"z_H": z_H, "z_L": z_L, "steps": steps, "halted": halted, "x": x, "labels": labels}


class OriginalAdamAtan2:
    """Adam-atan2 of the original: decoupled decay, the bias correction of the first moment outside atan2."""

    def __init__(self, parameters, lr: float, decay: float):
        self.parameters, self.lr, self.decay, self.t = list(parameters), lr, decay, 0
        self.first = [torch.zeros_like(p) for p in self.parameters]
        self.second = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        torch._foreach_lerp_(self.first, gradients, 0.1)
        torch._foreach_mul_(self.second, 0.95)
        torch._foreach_addcmul_(self.second, gradients, gradients, 0.05)
        scale = torch._foreach_sqrt(torch._foreach_div(self.second, 1 - 0.95**self.t))
        updates = [torch.atan2(first, second) for first, second in zip(self.first, scale, strict=True)]
        torch._foreach_mul_(self.parameters, 1 - self.lr * self.decay)
        torch._foreach_add_(self.parameters, updates, alpha=-self.lr / (1 - 0.9**self.t))


class OriginalTraining:
    """Training steps of the original's arithmetic. Its loader draws a row for each slot and step."""

    def __init__(self, shape: dict, tied: bool, compiled: bool, device: str):
        sizes = {name: shape[name] for name in ("size", "vocab_size", "hidden_size", "heads", "layers")}
        if tied:
            sizes["layers"] = max(1, shape["layers"] // 2)
        self.model = OriginalModel(**sizes, tied=tied).to(device)
        self.batch, self.device, self.shape = shape["batch"], device, shape
        self.optimizer = OriginalAdamAtan2(self.model.parameters(), lr=1e-4, decay=1.0)
        self.run = torch.compile(self.model, dynamic=False) if compiled else self.model
        cells = shape["size"] ** 2
        states = torch.zeros(self.batch, cells + self.model.prefix, shape["hidden_size"], device=device)
        self.carry = {
            "z_H": states,
            "z_L": states.clone(),
            "steps": torch.zeros(self.batch, dtype=torch.int32, device=device),
            "halted": torch.ones(self.batch, dtype=torch.bool, device=device),
            "x": torch.zeros(self.batch, cells, dtype=torch.long, device=device),
            "labels": torch.zeros(self.batch, cells, dtype=torch.long, device=device),
        }

    def step(self) -> None:
        cells = self.shape["size"] ** 2
        x, labels = torch.randint(1, self.shape["vocab_size"], (2, self.batch, cells), device=self.device)
        loss, self.carry = self.run(self.carry, x, labels)
        (loss / self.batch).backward()
        self.optimizer.step()
        for parameter in self.model.parameters():
            parameter.grad = None


class OwnTraining:
    """Training steps of `trl_hrm`: a slot that halts takes the next row, and no row is drawn otherwise."""

    def __init__(self, shape: dict, system: str, compiled: bool, device: str, **overrides):
        from trl_hrm.reasoning import HrmGridConfig, HrmGridForSolving
        from trl_hrm.reasoning.optim import AdamAtan2

        layers = shape["layers"]
        sizes = {
            "hidden_size": shape["hidden_size"],
            "num_attention_heads": shape["heads"],
            "vocab_size": shape["vocab_size"],
        }
        sizes |= {"height": shape["size"], "width": shape["size"], "H_layers": layers, "L_layers": layers}
        if system == "trm":
            sizes["H_layers"] = sizes["L_layers"] = max(1, layers // 2)
        if system in ("hrm", "hrm_continue"):
            sizes["continue_head"] = system == "hrm_continue"
        config = HrmGridConfig.preset("hrm" if system == "hrm_continue" else system, **sizes | overrides)
        self.model, self.config, self.device, self.batch = (
            HrmGridForSolving(config).to(device),
            config,
            device,
            shape["batch"],
        )
        self.optimizer = AdamAtan2([p for p in self.model.parameters() if p.requires_grad], lr=1e-4, weight_decay=1.0)
        self.run = torch.compile(self.model, dynamic=False) if compiled else self.model
        self.slots = torch.arange(self.batch, device=device)
        self.steps = torch.zeros(self.batch, dtype=torch.int64, device=device)
        self.x, self.labels = self.draw(self.batch)
        self.z_H, self.z_L = (state.clone() for state in self.model.initial_state(self.batch))
        self.total = self.num_halted = 0

    def draw(self, count: int) -> torch.Tensor:
        """Return random puzzles and solutions of shape `(2, count, cells)`. The speed does not depend on what they contain."""
        return torch.randint(1, self.config.vocab_size, (2, count, self.config.seq_len), device=self.device)

    def step(self) -> None:
        from trl_hrm.reasoning.halting import continue_target, exploration_minimum, halt
        from trl_hrm.reasoning.losses import act_loss

        config, self.total = self.config, self.total + 1
        out = self.run(self.x, z_H=self.z_H, z_L=self.z_L)
        self.steps += 1
        target = q_continue = None
        if config.continue_head:
            with torch.no_grad():
                following = self.run(self.x, z_H=out.z_H, z_L=out.z_L)
            q_continue = out.q_continue_logits
            target = continue_target(
                self.steps, following.q_halt_logits, following.q_continue_logits, config.halt_max_steps
            )
        losses = act_loss(out.logits, self.labels, out.q_halt_logits, q_continue, target, config.loss_type)
        (losses.loss.sum() / self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        minimum = exploration_minimum(0, self.slots, self.total, 0.1, config.halt_max_steps)
        halted = halt(self.steps, out.q_halt_logits, q_continue, config.halt_max_steps, minimum).nonzero()[:, 0]
        self.z_H, self.z_L = out.z_H, out.z_L
        self.num_halted += len(halted)
        if len(halted):
            self.x[halted], self.labels[halted] = self.draw(len(halted))
            z_H, z_L = self.model.initial_state(len(halted))
            self.z_H[halted], self.z_L[halted], self.steps[halted] = z_H, z_L, 0


def worker(job: dict) -> None:
    """Measure on request: each line of the standard input asks for a number of steps and is answered with their seconds."""
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    if job["system"].endswith("original"):
        training = OriginalTraining(
            SHAPES[job["shape"]], job["system"] == "TRM original", job["compiled"], job["device"]
        )
    else:
        training = OwnTraining(SHAPES[job["shape"]], job["system"], job["compiled"], job["device"])
    on_gpu = job["device"] == "cuda"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    for line in sys.stdin:
        clock = time.perf_counter if on_gpu else time.process_time
        began = clock()
        for _ in range(int(line)):
            training.step()
        if on_gpu:
            torch.cuda.synchronize()
        memory = (
            torch.cuda.max_memory_allocated() / 2**20
            if on_gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10 - before
        )
        print(json.dumps({"seconds": clock() - began, "memory": memory}), flush=True)


def measure(jobs: list[dict], rounds: int, seconds: float) -> list[dict]:
    """Return the seconds per step of each round and the peak memory of each job. One process per job, in turns."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(job["threads"])},
        )
        for job in jobs
    ]

    def ask(process: subprocess.Popen, steps: int) -> dict:
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"A measuring process stopped with exit code {process.wait()}. Its error is printed above."
            )
        return json.loads(line)

    try:
        results = []
        for job, process in zip(jobs, processes, strict=True):
            ask(process, 2)  # compiles and allocates
            steps = max(1, round(2 * seconds / ask(process, 2)["seconds"]))
            results.append({**job, "steps": steps, "seconds_per_step": [], "memory": 0.0})
        for number in range(rounds):
            for result, process in zip(results, processes, strict=True):
                found = ask(process, result["steps"])
                result["seconds_per_step"].append(found["seconds"] / result["steps"])
                result["memory"] = found["memory"]
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        return results
    finally:
        for process in processes:
            process.kill()
            process.wait()


def report(results: list[dict], rows: dict, line: str) -> str:
    """Return the tables as Markdown."""

    def speed(shape: str, system: str, compiled: bool) -> float | None:
        key = (shape, system, compiled)
        found = [one for one in results if (one["shape"], one["system"], one["compiled"]) == key]
        return 1 / median(found[0]["seconds_per_step"]) if found else None

    lines = []
    for shape in dict.fromkeys(one["shape"] for one in results):
        sizes = SHAPES[shape]
        lines += [f"{shape}, {sizes['layers']} + {sizes['layers']} layers, batch size {sizes['batch']}:", ""]
        lines += [
            "| system | steps/s | compiled | MiB above the start, eager | eager / original | compiled / compiled original |"
        ]
        lines += ["|---|---|---|---|---|---|"]
        for system in dict.fromkeys(one["system"] for one in results if one["shape"] == shape):
            peer = PEERS.get(system)
            cells = [system]
            for compiled in (False, True):
                found = speed(shape, system, compiled)
                cells.append("" if found is None else f"{found:.2f}")
            [memory] = [
                one["memory"]
                for one in results
                if (one["shape"], one["system"], one["compiled"]) == (shape, system, False)
            ]
            cells.append(f"{memory:,.0f}")
            for compiled in (False, True):
                own, original = speed(shape, system, compiled), peer and speed(shape, peer, compiled)
                cells.append(f"{own / original:.2f}×" if own and original else "")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    if rows:
        lines += [
            f"Rows trained per row drawn, over {rows['steps']:,} steps of {rows['slots']} slots: original "
            f"{rows['halted'] / (rows['steps'] * rows['slots']):.2f} ({rows['halted']:,} of {rows['steps'] * rows['slots']:,} rows), "
            f"`trl_hrm` 1.00 ({rows['halted']:,} rows drawn). A row was trained for {rows['steps'] * rows['slots'] / rows['halted']:.1f} "
            "segments on average.",
            "",
        ]
    return "\n".join([*lines, line])


def count_rows(steps: int, slots: int) -> dict:
    """Train HRM without continue head on Sudoku of 4x4 cells, and count the halted slots."""
    import random

    from trl_hrm.reasoning.data.sudoku import dig_puzzle, random_grid, sudoku_rules

    rules, rng = sudoku_rules(4), random.Random(0)
    torch.manual_seed(0)
    grids = [random_grid(rules, rng) for _ in range(500)]
    boards = torch.tensor([[dig_puzzle(rules, grid, rng) for grid in grids], grids]) + 1

    class Training(OwnTraining):
        def draw(self, count: int) -> torch.Tensor:
            return boards[:, torch.randint(len(grids), (count,))]

    shape = {"size": 4, "vocab_size": 6, "hidden_size": 64, "heads": 4, "layers": 1, "batch": slots}
    training = Training(shape, "hrm", False, "cpu", mixer="mlp", num_prefix_tokens=1)
    for group in training.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 3e-3, 0.1
    for _ in range(steps):
        training.step()
    return {"steps": steps, "slots": slots, "halted": training.num_halted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES), help="sizes (default: all)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="systems (default: all)")
    parser.add_argument(
        "--compile", nargs="+", default=["9x9, d 128"], help="shapes that are also measured with torch.compile"
    )
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds (default: 5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per round and system (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads per process (default: 1)")
    parser.add_argument(
        "--row_steps", type=int, default=600, help="steps of the training that counts rows, 0 for none"
    )
    parser.add_argument("--output", default="outputs/reasoning_speed.json", help="JSON file of the results")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = []
    for shape in args.shapes:
        jobs = [
            {"shape": shape, "system": system, "compiled": compiled, "device": device, "threads": args.threads}
            for compiled in (False, True)[: 1 + (shape in args.compile)]
            for system in args.systems
            if not compiled or system in PEERS or system in PEERS.values()  # the others have no peer to compare with
        ]
        print(shape, file=sys.stderr, flush=True)
        results += measure(jobs, args.rounds, args.seconds)
    rows = {}
    if args.row_steps:
        torch.set_num_threads(args.threads)
        rows = count_rows(args.row_steps, slots=64)
    packages = version_words(("torch", "transformers"))
    hardware = (
        torch.cuda.get_device_name() if device == "cuda" else f"{args.threads} of {len(os.sched_getaffinity(0))} cores"
    )
    line = f"{time.strftime('%Y-%m-%d')}; {packages}; Python {platform.python_version()}, {hardware}, fp32."
    text = report(results, rows, line)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    facts = {"results": results, "rows": rows, "line": line}
    Path(args.output).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
