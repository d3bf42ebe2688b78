"""The section that compares methods by their evaluation results."""

from __future__ import annotations

from collections.abc import Sequence

from tda_export.report.page import Figure, Section, Table
from tda_export.report.quality import methods_chart
from tda_export.report.results import Group, Result, grouped

MIB = 2**20


def methods_section(results: Sequence[Result]) -> Section:
    """Compare methods by their evaluation results, with one chart for each model, text and prompt length."""
    figures, rows, lossless = [], [], False
    for about, group in grouped(results).items():
        for linears, what in ((True, "Bytes of the layers' linears"), (False, "FFN bytes")):
            chart = methods_chart(group, linears=linears)
            if chart is not None:
                figures.append(Figure(chart, f"{what}: {_about(about)}. Bars: one standard error."))
        lossless = lossless or any(one.lossless for one in group)
        rows += [
            [
                "–" if about.model is None else about.model,
                about.text,
                _tokens(about),
                one.line,
                one.budget_text,
                f"{one.share:.3f}",
                f"{one.ffn_bytes / MIB:,.1f}",
                "–" if one.linear_share is None else f"{one.linear_share:.3f}",
                f"{one.head_share:.3f}",
                f"{one.density:.3f}",
                f"{one.kl:.4f} ± {one.kl_stderr:.4f}",
                f"{one.perplexity:.3f}",
                f"{one.dense_perplexity:.3f}",
                f"{one.agreement:.4f}",
            ]
            for one in group
        ]
    columns = (
        "model",
        "text",
        "tokens",
        "method",
        "budget",
        "FFN bytes, share of dense",
        "FFN MiB a token",
        "bytes of the layers' linears, share of dense",
        "bytes of the head, share of dense",
        "density",
        "KL, nats a token",
        "perplexity",
        "dense perplexity",
        "top-1 agreement",
    )
    return Section(
        "Quality against bytes",
        [
            "KL(dense || sparse) of the tokens decoded after a prompt, against the weight bytes that a token reads: of "
            "the layers' linears, where a result knows them, and of the FFN. A method that drops rows of "
            "attention as well pays for them in KL, and saves bytes that the second count does not show. One that "
            "drops rows of the head does so in both ('eval --parts layers' leaves the head whole)."
        ],
        figures,
        [Table("All results", columns, rows, texts=5)],
        ["Results without loss (KL of 0 except for rounding, as dense has) have no place on a logarithmic axis."]
        if lossless
        else [],
    )


def _about(group: Group) -> str:
    model = "" if group.model is None else f"{group.model} on "
    decoded = "" if group.continuation_tokens is None else f" and {group.continuation_tokens} decoded"
    return f"{model}{group.text}, prompts of {group.prompt_tokens} tokens{decoded}"


def _tokens(group: Group) -> str:
    decoded = "" if group.continuation_tokens is None else f"\u00a0+\u00a0{group.continuation_tokens}"
    return f"{group.prompt_tokens}{decoded}"
