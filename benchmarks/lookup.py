"""Measure prompt lookup: tokens a step and a second, without drafts and with drafts of several lengths, in turns.

Two kinds of answers repeat their prompt: a summary in the words of its source, and an edited piece of code. Answers are
greedy. Tokens that differ from those without a lookup are counted. Without a budget, an ARTIFACT decodes as it was
built.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections.abc import Iterator

import onnxruntime
from rows import Row, print_rows

from tda_export.errors import UsageError
from tda_export.runtime import Generation, Model, load
from tda_export.runtime.deployment import AnyDeployment

SOURCE = """\
The harbour of Vardsund was built in 1884, when the herring came so close to the coast that boats filled their nets
within sight of the church. Two stone moles, each of them three hundred metres long, keep the swell of the open sea
away from the quays. The eastern mole carries a lighthouse of cast iron, whose lamp burned oil until 1931 and has been
electric since then. In the best year of the fishery, 1902, four hundred boats landed their catch at Vardsund, and the
salteries along the quay employed nine hundred people. After the herring left in 1938 the salteries closed one after
another, and the last of them became a museum in 1974. Today the harbour serves a ferry that runs to the islands twice
a day, eleven fishing boats, and in summer about two thousand visitors who come by sail. The municipality plans to
raise both moles by one metre before 2030, because storms from the south-west have reached the top of the quays four
times in the last ten years. The work will cost about six million and will close the eastern mole for two summers.
"""
CODE = '''\
class Ledger:
    """Keeps entries of an account in the order in which they were booked."""

    def __init__(self, owner, currency="EUR"):
        self.owner = owner
        self.currency = currency
        self.entries = []

    def book(self, date, text, amount):
        if amount == 0:
            raise ValueError("An entry needs an amount.")
        self.entries.append((date, text, amount))

    def balance(self):
        total = 0
        for date, text, amount in self.entries:
            total += amount
        return total

    def between(self, first, last):
        found = []
        for date, text, amount in self.entries:
            if first <= date <= last:
                found.append((date, text, amount))
        return found

    def report(self):
        lines = [f"Account of {self.owner}"]
        for date, text, amount in self.entries:
            lines.append(f"{date}  {text:30}  {amount:10.2f} {self.currency}")
        lines.append(f"Balance: {self.balance():.2f} {self.currency}")
        return "\\n".join(lines)
'''
PROMPTS = {
    "summary": f"The text:\n\n{SOURCE}\nA summary of the text, in its own words:\n\n",
    "editing": f"The code:\n\n```python\n{CODE}```\n\nThe same code, with the class renamed to Account:\n\n```python\n",
}


def decoded(generation: Generation) -> list[int]:
    return [token.id for token in generation]


def differing(one: list[int], other: list[int]) -> int:
    """Count the positions at which two answers have different tokens, or only one has a token."""
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))


def measure(
    model: Model, how: AnyDeployment | None, lookups: list[int], new_tokens: int, repeats: int
) -> Iterator[Row]:
    """Yield a row for each text and draft length; 0 is without lookup."""
    for name, prompt in PROMPTS.items():
        tokens = model.tokenize(prompt)
        rates: dict[int, list[float]] = {lookup: [] for lookup in lookups}
        answers, costs = {}, {}
        for repeat in range(repeats + 1):
            for lookup in lookups:
                generation = model.generate(
                    tokens, max_new_tokens=new_tokens, deployment=how, lookup=lookup, ignore_eos=True
                )
                answers[lookup] = decoded(generation)
                costs[lookup] = metrics = generation.metrics
                if repeat and metrics.decode_tokens_per_second:  # the first repetition warms up
                    rates[lookup].append(metrics.decode_tokens_per_second)
        for lookup in lookups:
            metrics = costs[lookup]
            yield {
                "text": name,
                "lookup": lookup,
                "prompt_tokens": len(tokens),
                "new_tokens": metrics.new_tokens,
                "steps": metrics.decode_steps,
                "drafted": metrics.drafted,
                "accepted": metrics.accepted,
                "tokens_per_step": (metrics.new_tokens - 1) / metrics.decode_steps,
                "tokens_per_second": statistics.median(rates[lookup]),
                "least": min(rates[lookup]),
                "most": max(rates[lookup]),
                "gain": statistics.median(rates[lookup]) / statistics.median(rates[0]),
                "differing_tokens": differing(answers[lookup], answers[0]),
                "sparsity": metrics.sparsity,
                "provider": metrics.provider,
            }


def line(row: Row) -> str:
    """Return a row as a line of text."""
    return (
        f"{row['text']:>8}  lookup {row['lookup']:2}  {row['tokens_per_step']:5.2f} tokens a step "
        f"({row['accepted']} of {row['drafted']} drafted)  {row['tokens_per_second']:6.1f} tokens/s "
        f"({row['least']:.1f}-{row['most']:.1f}), {row['gain']:.2f} times, {row['differing_tokens']} tokens differ"
    )


def run(options: argparse.Namespace) -> Iterator[Row]:
    if options.new_tokens < 2 or options.repeats < 1:
        raise UsageError("Give --new-tokens of 2 or more, and --repeats of 1 or more.")
    model = load(options.artifact, provider=options.provider)
    budget = {name: getattr(options, name) for name in ("price", "sparsity", "max_kl")}
    given = {name: value for name, value in budget.items() if value is not None}
    how = model.at(**given) if given else None
    yield from measure(model, how, [0, *options.lookup], options.new_tokens, options.repeats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", metavar="ARTIFACT")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--sparsity", type=float, help="fraction of bytes of all linears to skip")
    budget.add_argument("--max-kl", type=float, help="predicted KL, nats a token")
    budget.add_argument("--price", type=float, help="price of a byte")
    parser.add_argument("--lookup", type=int, nargs="+", default=[2, 4, 7, 15], help="draft lengths (2 4 7 15)")
    parser.add_argument("--new-tokens", type=int, default=200, help="tokens of an answer (200)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions; rates are medians (5)")
    parser.add_argument("--provider", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--json", action="store_true", help="print a row of JSON for every measurement")
    options = parser.parse_args()
    if options.json:
        return print_rows(run(options))
    header = f"{platform.machine()}, {os.cpu_count()} cores, ONNX Runtime {onnxruntime.__version__}"
    return print_rows(run(options), line, header)


if __name__ == "__main__":
    raise SystemExit(main())
