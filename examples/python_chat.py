"""Chat with an artifact, with a slider for how much of its weights a token reads: `python python_chat.py ARTIFACT`.

A line of `+` or `-` moves the slider by a step (`+++` by three), a fraction sets it: 0.5 skips half of the bytes of the
linears. Any other line is a message. Ctrl-C stops an answer; Ctrl-D, or Ctrl-C at the prompt, leaves.
"""

import argparse
import contextlib
import re

from tda_export.errors import TdaError
from tda_export.runtime import load

STEP, WIDTH = 0.05, 20
SLIDER = re.compile(r"(?P<steps>\++|-+)|(?P<sparsity>0|0?\.\d+)")


def chat(folder: str, max_new_tokens: int) -> None:
    model = load(folder)
    table, how = model.artifact.price_table, model.artifact.deployment
    if table is None:
        raise TdaError(f"{folder} has no table of prices. Build one with 'tda-export build MODEL'.")
    memory = model.memory()  # keys and values of the chat so far: a turn reads what is new
    messages: list[dict[str, str]] = []
    while True:
        bar = "#" * round(WIDTH * how.share)
        print(f"[{bar:.<{WIDTH}}] reads {how.share:.0%}, predicted KL {table.predicted(how.price).kl:.4f}")
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if slider := SLIDER.fullmatch(line):
            steps = line.count("-") - line.count("+")  # + reads more, and so skips less
            skip = float(slider["sparsity"]) if slider["sparsity"] else 1 - how.share + STEP * steps
            how = model.at(sparsity=min(max(skip, 0.0), table.most_sparsity))
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                prompt = model.tokenize_chat(asked)
                answer = model.generate(prompt, max_new_tokens=max_new_tokens, deployment=how, memory=memory)
            except TdaError as error:  # it does not fit into the context
                print(error)
                continue
            with contextlib.suppress(KeyboardInterrupt):
                for token in answer:
                    print(token.text, end="", flush=True)
            messages = [*asked, {"role": "assistant", "content": answer.text}]
            rate, read = answer.metrics.decode_tokens_per_second or 0, answer.metrics.bytes_per_token
            print(f"\n{rate:.1f} tokens/s, {read / 1e6:.3g} of {model.artifact.sparse_bytes / 1e6:.3g} MB a token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    args = parser.parse_args()
    try:
        chat(args.artifact, args.max_new_tokens)
    except TdaError as error:
        raise SystemExit(f"Error: {error}") from None
