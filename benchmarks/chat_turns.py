"""Ten turns of a chat, with answers kept as sparse steps wrote them, or read again densely at the next turn.

Both ways read the same chat: scripted messages with the dense model's answers. Measured for each turn are the KL of the
answer's tokens to the dense model that has read the same chat, in nats a token, and the time to the first token of the
answer. A MODEL is calibrated and built first; an ARTIFACT must have prices.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rows import Row, print_rows

from tda_export.errors import TdaError, UsageError
from tda_export.graph.contract import MANIFEST_FILE
from tda_export.runtime import Conversation, Model, load
from tda_export.runtime.deployment import PriceDeployment
from tda_export.runtime.memory import PromptMemory
from tda_export.runtime.scoring import token_kl

MESSAGES = (
    "I would like to grow vegetables on a balcony that faces west. Where do I begin?",
    "The balcony is two metres wide. Which plants give the most for that space?",
    "Let us say tomatoes, lettuce and beans. What size of pot does each of them need?",
    "How often should I water them in July, and at what time of day?",
    "Last year my tomatoes got brown spots at the bottom of the fruit. What was that?",
    "Can I do anything about it before it comes back?",
    "My neighbour says coffee grounds are good for all plants. Is he right?",
    "Give me a short list of what I should buy before April.",
    "Which of the three plants would you leave out if I am away for two weeks in August, and why?",
    "Thank you. Please sum up the plan in three sentences that I can put on the fridge.",
)
DENSE = PriceDeployment(0.0)


@dataclass(frozen=True)
class Turn:
    """The tokens of a chat before an answer, and those of the answer."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Reading:
    """A measured turn: logits before each token of the answer, float32 [C, V], the seconds to the first token, and the
    number of tokens that were `read` for it."""

    logits: np.ndarray
    seconds: float
    read: int


def script(model: Model, new_tokens: int) -> list[Turn]:
    """Return the chat in which the dense model answers the messages."""
    chat, turns = Conversation(model, mask="dense"), []
    for message in MESSAGES:
        generation = chat.say(message, max_new_tokens=new_tokens)
        prompt = model.tokenize_chat(chat.messages[:-1])
        answer = [token.id for token in generation]
        if chat.dropped_turns:
            raise UsageError(f"{len(turns)} turns fill this model's context. Give fewer --new-tokens.")
        if answer:  # a turn without an answer has nothing to compare
            turns.append(Turn(prompt, answer))
    return turns


def read_turn(memory: PromptMemory, turn: Turn, how: PriceDeployment) -> Reading:
    """Read a turn's message and decode its answer at a price."""
    with memory.borrow_step(len(turn.prompt) + len(turn.answer)) as step:
        step.capture()
        started = time.perf_counter()
        logits, reused = memory.read(step, turn.prompt, how)
        step.follow(how)
        seconds = time.perf_counter() - started
        decoded = turn.answer[:-1]
        rows = [logits, *(step.logits(token) for token in decoded)]
        memory.keep(decoded, how)
    return Reading(np.stack(rows), seconds, len(turn.prompt) - reused)


def measure(model: Model, turns: list[Turn], how: PriceDeployment, repeats: int) -> Iterator[Row]:
    """Yield a row for every turn, and one for all turns together."""
    dense_memory = model.memory(keep_answers=True)
    dense = [read_turn(dense_memory, turn, DENSE).logits for turn in turns]
    kls: dict[str, list[np.ndarray]] = {}
    waits: dict[str, list[list[float]]] = {}
    reads: dict[str, list[int]] = {}
    for name, keep in (("reread", False), ("keep", True)):
        times = []
        for _ in range(repeats):
            memory = model.memory(keep_answers=keep)
            found = [read_turn(memory, turn, how) for turn in turns]
            times.append([reading.seconds for reading in found])
        waits[name] = [list(column) for column in zip(*times, strict=True)]
        kls[name] = [token_kl(whole, reading.logits) for whole, reading in zip(dense, found, strict=True)]
        reads[name] = [reading.read for reading in found]
    for number, turn in enumerate(turns):
        row: Row = {"turn": number + 1, "prompt_tokens": len(turn.prompt), "answer_tokens": len(turn.answer)}
        for name in kls:
            row |= {
                f"{name}_kl": float(kls[name][number].mean()),
                f"{name}_seconds": statistics.median(waits[name][number]),
                f"{name}_read_tokens": reads[name][number],
            }
        yield row
    later = {name: np.concatenate(values[1:] or values) for name, values in kls.items()}  # nothing kept in turn 1
    difference = later["keep"] - later["reread"]
    summary: Row = {"turn": "all but the first", "answer_tokens": len(difference)}
    for name in kls:
        summary |= {
            f"{name}_kl": float(later[name].mean()),
            f"{name}_seconds": statistics.fmean(statistics.median(times) for times in waits[name][1:] or waits[name]),
            f"{name}_read_tokens": sum(reads[name][1:] or reads[name]),
        }
    stderr = float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else 0.0
    yield summary | {
        "kl_difference": float(difference.mean()),
        "kl_difference_stderr": stderr,
        "price": how.price,
        "share": how.share,
        "provider": model.provider,
    }


def line(row: Row) -> str:
    """Return a line of text for a row: KL and milliseconds with answers read again, and with answers kept."""
    text = f"{row['turn']!s:>17}"
    for name in ("reread", "keep"):
        text += f"  {name}: KL {row[f'{name}_kl']:.4f}, first token {1000 * row[f'{name}_seconds']:7.1f} ms "
        text += f"({row[f'{name}_read_tokens']} tokens read)"
    if "kl_difference" in row:
        text += f"\n{'keep - reread':>17}  KL {row['kl_difference']:+.4f} ± {row['kl_difference_stderr']:.4f}"
        text += f", at price {row['price']:.4g}, which reads {row['share']:.3f} of the linears' bytes"
    return text


def run(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    artifact = Path(options.source)
    if not (artifact / MANIFEST_FILE).is_file():
        artifact = built(options.source, folder)
    model = load(artifact, provider=options.provider)
    budget = {name: getattr(options, name) for name in ("price", "sparsity", "max_kl")}
    given = {name: value for name, value in budget.items() if value is not None}
    how = model.at(**given or {"sparsity": 0.5})
    turns = script(model, options.new_tokens)
    if not turns:
        raise TdaError("The dense model answers no message. Take a model that chats.")
    yield from measure(model, turns, how, options.repeats)


def built(model: str, folder: Path) -> Path:
    """Calibrate and build a model with the program's defaults."""
    calibration, artifact = folder / "calibration.safetensors", folder / "artifact"
    for arguments in (
        ["calibrate", model, "-o", str(calibration)],
        ["build", model, "--calibration", str(calibration), "-o", str(artifact)],
    ):
        done = subprocess.run([sys.executable, "-m", "tda_export", *arguments], stdout=sys.stderr, check=False)
        if done.returncode:  # its error is on standard error
            raise TdaError(f"'tda-export {arguments[0]}' of {model} failed. See above.")
    return artifact


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="MODEL|ARTIFACT")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--sparsity", type=float, help="fraction of bytes of all linears to skip (0.5)")
    budget.add_argument("--max-kl", type=float, help="predicted KL, nats a token")
    budget.add_argument("--price", type=float, help="price of a byte")
    parser.add_argument("--new-tokens", type=int, default=96, help="most tokens of an answer (96)")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of the whole chat; times are medians (3)")
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", action="store_true", help="print a row of JSON for every turn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(options, Path(folder))
        return print_rows(rows) if options.json else print_rows(rows, line)


if __name__ == "__main__":
    raise SystemExit(main())
