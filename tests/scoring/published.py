"""
Tiny copies of published step reward models, and the loops that their authors' scripts describe.

Each copy has the class, the names of the weights and the rules of the tokenizer of the published model, but random weights.
The loops use transformers and torch only. They know nothing of `StepFormat`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    set_seed,
)

from trl_hrm.tiny_model import make_tokenizer


SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."
MARK = "<extra_0>"
KI = "ки"
NEWLINES = "\n\n\n\n\n"

# Texts that the tokenizers are trained on, so that the markers and label tokens are single tokens as in the real ones
CORPUS = [
    "Step 1: 1 + 2 = 3. Step 2: so x - 1 = 2, thus the answer is: 3",
    r"\frac{1}{2} + \sqrt{x^2} \le \boxed{7} $a - b$",
    "第一步：计算 2 加 3 等于 5。 所以答案是 7。",
    "# Question\n\nWhat is it?\n\n# Solution\n\nIt is x.\n\n",
    f"a {KI}\nStep b {KI}\n c + d - e" * 20,
    f"a. {NEWLINES} b {NEWLINES} + - + -" * 20,
    "system user assistant Today Date Cutting Knowledge",
]

CHATML = (
    "{%- if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama 3.1 and 3.2: today's date in a system turn of its own, and trimmed messages
LLAMA_CHAT = (
    "{{- bos_token }}"
    "{%- if date_string is not defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}"
    "{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + (message.content | trim) + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK_SPLITS = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥]+", r"\p{N}"]


def qwen_tokenizer(bos_token: str | None = None) -> PreTrainedTokenizerBase:
    """Qwen2's rules: NFC, its pattern for words, byte-level BPE, ChatML, no BOS. `<extra_0>` is a special token."""
    tokenizer = make_tokenizer(CORPUS, vocab_size=700)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>", MARK]})
    tokenizer.chat_template = CHATML
    if bos_token is not None:
        tokenizer.bos_token = bos_token
    return tokenizer


def byte_level_tokenizer(patterns: Sequence[str], bos: str, eos: str, **special: str) -> PreTrainedTokenizerBase:
    """Byte-level BPE that adds a BOS token. Words are split by the patterns, one after the other."""
    backend = Tokenizer(BPE())
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    specials = [bos, eos, *special.values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def llama3_tokenizer() -> PreTrainedTokenizerBase:
    """Llama 3's pattern and its chat template, which prints today's date."""
    names = {"start": "<|start_header_id|>", "end": "<|end_header_id|>", "eot": "<|eot_id|>"}
    tokenizer = byte_level_tokenizer([LLAMA_SPLIT], "<|begin_of_text|>", "<|end_of_text|>", **names)
    tokenizer.chat_template = LLAMA_CHAT
    return tokenizer


def deepseek_tokenizer() -> PreTrainedTokenizerBase:
    """DeepSeek's patterns: line breaks, words, punctuation, Chinese and digits apart."""
    return byte_level_tokenizer(DEEPSEEK_SPLITS, "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")


def sentencepiece_tokenizer() -> PreTrainedTokenizerBase:
    """The rules of Llama 2's and Mistral's SentencePiece model: `▁` for spaces, no split at words, bytes as a fallback."""
    words = Tokenizer(BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace()  # splits at spaces, as SentencePiece does in training
    texts = [line for text in CORPUS[:2] + CORPUS[3:] for line in text.split("\n")]  # Chinese falls back to bytes
    words.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(words.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    return LlamaTokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], add_bos_token=True)


# Encodings: token ids of a solution, and the positions where its steps are scored

Encoded = tuple[list[int], list[int]]


def marks(tokenizer: PreTrainedTokenizerBase, ids: list[int], text: str) -> Encoded:
    """Every position of the last token of `text`."""
    mark = tokenizer.encode(text)[-1]
    return ids, [i for i, token in enumerate(ids) if token == mark]


def qwen_prm(tokenizer, problem: str, steps: Sequence[str], system: str | None = SYSTEM) -> Encoded:
    """The whole conversation is one string. Steps are scored at every `<extra_0>`."""
    messages = [
        {"role": "user", "content": problem},
        {"role": "assistant", "content": MARK.join(steps) + MARK},
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    return marks(tokenizer, tokenizer.encode(text), MARK)


def reason_flux(tokenizer, problem: str, steps: Sequence[str]) -> Encoded:
    """The same without a system message. The template may have a default one."""
    return qwen_prm(tokenizer, problem, steps, system=None)


def numbered(steps: Sequence[str]) -> list[str]:
    """Steps as in the Math-Shepherd data set: each begins with `Step k: `, without white space around it."""
    steps = [step.strip() for step in steps]
    return [step if step.startswith(f"Step {k}: ") else f"Step {k}: {step}" for k, step in enumerate(steps, 1)]


def math_shepherd(tokenizer, problem: str, steps: Sequence[str]) -> Encoded:
    """A step ends with ` ки` and a line break. It is scored at `▁ки`."""
    output = "".join(f"{step} {KI}\n" for step in numbered(steps))
    return marks(tokenizer, tokenizer.encode(f"{problem} {output}"), KI)


def er_prm(tokenizer, problem: str, steps: Sequence[str]) -> Encoded:
    """The text of Math-Shepherd without the line breaks after ` ки`."""
    text = f"{problem} " + "".join(f"{step} {KI}\n" for step in numbered(steps))
    return marks(tokenizer, tokenizer.encode(text.replace(f" {KI}\n", f" {KI}")), f" {KI}")


def rlhflow(tokenizer, problem: str, steps: Sequence[str], joint: str = " ") -> Encoded:
    """One user turn per step, each answered by `+`. A step is scored at the token before its answer."""
    conversation, ids, places = [], [], []
    for i, step in enumerate(steps):
        conversation.append({"role": "user", "content": step if i else problem + joint + step})
        conversation.append({"role": "assistant", "content": "+"})
        text = tokenizer.apply_chat_template(conversation, tokenize=False, date_string="26 Jul 2024")
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids[-2:-1] == tokenizer.encode("+", add_special_tokens=False)  # the last token ends the turn
        places.append(len(ids) - 3)
    return ids, places


def rlhflow_process_bench(tokenizer, problem: str, steps: Sequence[str]) -> Encoded:
    return rlhflow(tokenizer, problem, steps, joint="\n\n")


def skywork(tokenizer, problem: str, steps: Sequence[str]) -> Encoded:
    """The prompt and every step are encoded alone. A step is scored at the line break after it."""
    line_break = tokenizer.encode("\n")[-1]
    ids = tokenizer.encode(tokenizer.bos_token + problem + "\n")
    places = []
    for step in steps:
        ids += [*tokenizer.encode(step), line_break]
        places.append(len(ids) - 1)
    return ids, places


def classifier(tokenizer, problem: str, steps: Sequence[str], separator: str = "\n\n") -> Encoded:
    """The prompt, the steps and the separators are encoded alone. A step is scored at the separator."""
    ids = tokenizer.encode(problem, add_special_tokens=False)
    places = []
    for step in steps:
        for text in (step, separator):
            ids += tokenizer.encode(text, add_special_tokens=False)
        places.append(len(ids) - 1)
    return ids, places


def trl_lib(tokenizer, problem: str, steps: Sequence[str]) -> Encoded:
    return classifier(tokenizer, problem, steps, separator="\n")


def math_psa(tokenizer, problem: str, steps: Sequence[str]) -> Encoded:
    """Spaces join the problem and the steps. A space and five line breaks, which are one token, end every step."""
    text = " ".join([problem, *(f"{step.strip()} {NEWLINES}" for step in steps)])
    return marks(tokenizer, tokenizer.encode(text), f" {NEWLINES}")


def llemma(tokenizer, problem: str, steps: Sequence[str]) -> Encoded:
    """A step is scored at the first of the two line breaks after it."""
    start = f"# Question\n\n{problem}\n\n# Solution\n\n"
    ids = tokenizer.encode(start + "".join(f"{step.strip()}\n\n" for step in steps))
    line_breaks = tokenizer.encode("\n\n", add_special_tokens=False)[1:]
    first = len(tokenizer.encode(start))
    return ids, [i for i in range(first, len(ids)) if ids[i : i + 2] == line_breaks]


# Models: a function from token ids to the outputs at every token, shape (L, C)

Outputs = Callable[[Sequence[int]], torch.Tensor]


def plain_causal(folder: str) -> Outputs:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda ids: model(torch.tensor([ids])).logits[0]


def plain_classifier(folder: str) -> Outputs:
    model = AutoModelForTokenClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return lambda ids: model(torch.tensor([ids])).logits[0]


def plain_head(folder: str, prefix: str, head: nn.Module) -> Outputs:
    """The body, and a head with the weights whose names begin with `prefix`."""
    body = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    weights = load_file(Path(folder) / "model.safetensors")
    head.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return lambda ids: head(body(torch.tensor([ids])).last_hidden_state[0])


def plain_two_layers(folder: str) -> Outputs:
    return plain_head(folder, "score.", nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2)))


def plain_value(folder: str) -> Outputs:
    return plain_head(folder, "v_head.summary.", nn.Linear(HIDDEN, 1))


# Scores of the steps, from the outputs at their positions, shape (S, C)


def second_class(tokenizer, outputs: torch.Tensor) -> torch.Tensor:
    return outputs.softmax(dim=-1)[:, 1]


def value(tokenizer, outputs: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(outputs[:, 0])


def mean_logit(tokenizer, outputs: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(outputs.mean(dim=-1))


def plus_or_minus(tokenizer, outputs: torch.Tensor) -> torch.Tensor:
    """Softmax over the logits of `+` and `-`."""
    good, bad = (tokenizer.encode(token)[-1] for token in ("+", "-"))
    return outputs[:, [good, bad]].softmax(dim=-1)[:, 0]


def spaced_plus_or_minus(tokenizer, outputs: torch.Tensor) -> torch.Tensor:
    """Softmax over the logits of `+` and `-` after a space."""
    good, bad = (tokenizer.encode(token)[-1] for token in (" +", " -"))
    return outputs[:, [good, bad]].softmax(dim=-1)[:, 0]


# Checkpoints

HIDDEN = 64
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # large, so that differences between tokens show in the scores
    "tie_word_embeddings": False,
}


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes, indent=2))


def save_base(
    folder: Path, tokenizer: PreTrainedTokenizerBase, config_class: type, auto_class: type, **config
) -> None:
    set_seed(7)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = config_class(vocab_size=len(tokenizer), dtype="float32", **ids, **SIZES, **config)
    model = auto_class.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def add_head(folder: Path, **layers: nn.Linear) -> None:
    """Add the weights of linear layers. The names of the layers have `_` for `.`."""
    weights = load_file(folder / "model.safetensors")
    weights = {
        name: weight for name, weight in weights.items() if not name.startswith("lm_head.") or "v_head" in layers
    }
    for name, layer in layers.items():
        prefix = "v_head.summary" if name == "v_head" else name.replace("_", ".")
        weights |= {f"{prefix}.weight": layer.weight.detach(), f"{prefix}.bias": layer.bias.detach()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_qwen_prm(folder: Path) -> None:
    save_base(folder, qwen_tokenizer(), Qwen2Config, AutoModelForCausalLM)
    add_head(folder, score_0=nn.Linear(HIDDEN, HIDDEN), score_2=nn.Linear(HIDDEN, 2))
    edit_config(
        folder,
        architectures=["Qwen2ForProcessRewardModel"],
        auto_map={"AutoModel": "modeling_qwen2_rm.Qwen2ForProcessRewardModel"},
    )


def save_skywork(folder: Path) -> None:
    save_base(folder, qwen_tokenizer(bos_token="<|endoftext|>"), Qwen2Config, AutoModelForCausalLM)
    add_head(folder, v_head=nn.Linear(HIDDEN, 1))
    edit_config(folder, architectures=["Qwen2ForPrmModel"])


def save_math_psa(folder: Path) -> None:
    base = folder.parent / "Qwen2.5-Math-7B-Instruct"
    save_base(base, qwen_tokenizer(), Qwen2Config, AutoModelForCausalLM)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def saver(make_tokenizer: Callable, config_class: type, auto_class: type = AutoModelForCausalLM) -> Callable:
    return lambda folder: save_base(folder, make_tokenizer(), config_class, auto_class)


@dataclass(frozen=True)
class Published:
    """
    A published model.

    Args:
        repository: Name of its repository.
        format_name: Name of its format in this package.
        save: Save a tiny copy to a folder.
        load: Load the model of the copy without this package.
        encode: Encode a solution as the authors' script does.
        judge: Turn the outputs at the scored positions into scores as the authors' script does.
    """

    repository: str
    format_name: str
    save: Callable[[Path], None]
    load: Callable[[str], Outputs]
    encode: Callable[..., Encoded]
    judge: Callable[..., torch.Tensor]

    @torch.inference_mode()
    def scores(self, folder: str, problem: str, solutions: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the step scores of several solutions, each in a forward pass of its own."""
        tokenizer, outputs = AutoTokenizer.from_pretrained(folder), self.load(folder)
        found = []
        for steps in solutions:
            ids, places = self.encode(tokenizer, problem, steps)
            assert len(places) == len(steps)
            found.append(self.judge(tokenizer, outputs(ids)[places]).tolist())
        return found


CAUSAL_LLAMA3 = (saver(llama3_tokenizer, LlamaConfig), plain_causal)
CLASSIFIER = (saver(qwen_tokenizer, Qwen2Config, AutoModelForTokenClassification), plain_classifier)
PUBLISHED = {
    published.repository: published
    for published in (
        Published("Qwen/Qwen2.5-Math-PRM-7B", "qwen2.5-math-prm", save_qwen_prm, plain_two_layers, qwen_prm, second_class),
        Published("Gen-Verse/ReasonFlux-PRM-7B", "reasonflux-prm", save_qwen_prm, plain_two_layers, reason_flux, second_class),
        Published("peiyi9979/math-shepherd-mistral-7b-prm", "math-shepherd", saver(sentencepiece_tokenizer, MistralConfig), plain_causal, math_shepherd, plus_or_minus),
        Published("HanningZhang/Llama3.1-Math-PRM", "er-prm", *CAUSAL_LLAMA3, er_prm, spaced_plus_or_minus),
        Published("HanningZhang/deepseek-prm", "er-prm", saver(deepseek_tokenizer, LlamaConfig), plain_causal, er_prm, spaced_plus_or_minus),
        Published("RLHFlow/Llama3.1-8B-PRM-Deepseek-Data", "rlhflow-prm", *CAUSAL_LLAMA3, rlhflow, plus_or_minus),
        Published("Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B", "skywork-o1-prm", save_skywork, plain_value, skywork, value),
        Published("jinachris/PURE-PRM-7B", "pure-prm", *CLASSIFIER, classifier, second_class),
        Published("HuggingFaceH4/Qwen2.5-Math-7B-Instruct-PRM-0.2", "pure-prm", *CLASSIFIER, classifier, second_class),
        Published("trl-lib/Qwen2-0.5B-Reward-Math-Sheperd", "trl-prm", *CLASSIFIER, trl_lib, second_class),
        Published("openreasoner/Math-psa", "math-psa", save_math_psa, plain_causal, math_psa, spaced_plus_or_minus),
        Published("ScalableMath/llemma-7b-prm-prm800k-level-1to3-hf", "llemma-prm", saver(sentencepiece_tokenizer, LlamaConfig), plain_causal, llemma, mean_logit),
    )
}  # fmt: skip

# Real tokenizers that tests/real checks the encodings with
REAL_TOKENIZERS = [  # format, tokenizer, encoding of the authors' script
    ("qwen2.5-math-prm", "qwen3", qwen_prm),
    ("reasonflux-prm", "qwen3", reason_flux),
    ("math-shepherd", "mistral_v1", math_shepherd),
    ("er-prm", "llama3", er_prm),
    ("er-prm", "deepseek_v3", er_prm),
    ("rlhflow-prm", "llama3", rlhflow),
    ("skywork-o1-prm", "qwen3", skywork),
    ("pure-prm", "qwen3", classifier),
    ("trl-prm", "qwen3", trl_lib),
    ("math-psa", "qwen3", math_psa),
    ("llemma-prm", "mistral_v1", llemma),
]
