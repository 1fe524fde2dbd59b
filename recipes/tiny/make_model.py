"""
Create a small model with random weights and a tokenizer trained on the data.

    python recipes/tiny/make_model.py --kind token --data data/prm800k-hrm --output_dir outputs/tiny-model

`--data` is a folder or Hub id for `datasets.load_dataset`, or a JSON Lines file such as GSM8K's `train.jsonl`.
"""

import argparse


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[1], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kind", choices=["token", "causal"], default="token", help="token classifier or causal LM")
    parser.add_argument(
        "--data", required=True, help="dataset folder, Hub id or JSON Lines file to train the tokenizer on"
    )
    parser.add_argument("--output_dir", required=True, help="output folder of the model and the tokenizer")
    parser.add_argument("--hidden_size", type=int, default=64, help="width of the model, a multiple of 32")
    parser.add_argument("--num_layers", type=int, default=3, help="number of layers")
    parser.add_argument("--vocab_size", type=int, default=2048, help="maximum size of the vocabulary")
    parser.add_argument("--num_labels", type=int, default=2, help="number of outputs of a token classifier")
    parser.add_argument("--seed", type=int, default=42, help="seed of the weights")
    return parser


def main(args: argparse.Namespace) -> None:
    from trl_hrm.tiny_model import make_tiny_model, read_texts

    make_tiny_model(
        read_texts(args.data),
        args.output_dir,
        kind=args.kind,
        hidden_size=args.hidden_size,
        num_layers=args.num_layers,
        vocab_size=args.vocab_size,
        num_labels=args.num_labels,
        seed=args.seed,
    )
    print(f"Model and tokenizer saved to {args.output_dir}.")


if __name__ == "__main__":
    main(make_parser().parse_args())
