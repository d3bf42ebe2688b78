"""The prefill graph: reads a prompt densely, and returns which neurons matter for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from tda_export.calibration.curves import CurveSums
from tda_export.graph import contract, kv_formats
from tda_export.graph.attention import attention_lengths, call_tokens
from tda_export.graph.decoder import GraphBuilder, last_positions, model_shape
from tda_export.graph.ffn import dense_activations
from tda_export.graph.method import Method
from tda_export.graph.statistics import (
    mask_and_tail,
    neuron_stats,
    present_stats_weight,
    statistics_functions,
)
from tda_export.graph.weights_file import WeightTable
from tda_export.models.spec import DecoderSpec


@dataclass(frozen=True)
class Prior:
    """Statistics of general text that are added to a prompt's own: sums over `tokens` tokens, float32 [L, 2, F]."""

    stats: np.ndarray
    tokens: float


def calibrated_prior(sums: CurveSums, tokens: float) -> Prior:
    """Scale the statistics of a calibration's data to a prior that counts for `tokens` tokens."""
    stats = torch.stack([sums.score_square, sums.activation], dim=1) / sums.tokens * tokens  # [L, 2, F]
    return Prior(stats.float().numpy(), float(tokens))


def build_prefill(
    spec: DecoderSpec,
    weights: WeightTable,
    dtype: str,
    method: Method,
    thresholds: np.ndarray,
    prior: Prior | None = None,
    *,
    kv: str = kv_formats.KV_FLOAT,
) -> ir.Model:
    """Build the graph that reads a prompt densely and returns its prompt mask.

    Args:
        spec: The architecture.
        weights: The tensors of weights.bin.
        dtype: A value of `contract.DTYPES`.
        method: Statistic, selection and tail.
        thresholds: float32 [L], the default of the `thresholds` input.
        prior: The initial statistics by default; None is zero.
        kv: How keys and values are stored, one of `kv_formats.KV_FORMATS`.

    Returns:
        The model with the inputs and outputs of `contract.prefill_inputs` and `contract.prefill_outputs`.
    """
    shape = model_shape(spec, dtype, kv)
    graph = GraphBuilder(spec, weights, dtype, contract.prefill_inputs(shape), kv)
    ops, inputs, outputs = graph.ops, graph.inputs, graph.outputs
    lengths = attention_lengths(ops, inputs[contract.ATTENTION_MASK])
    tokens = call_tokens(ops, inputs[contract.INPUT_IDS], lengths)
    weight = present_stats_weight(ops, tokens.counted, inputs[contract.PAST_STATS_WEIGHT], inputs[contract.STATS_DECAY])
    outputs[contract.PRESENT_STATS_WEIGHT] = weight

    def ffn(layer: int, x: ir.Value) -> tuple[ir.Value, ir.Value | None]:
        h = dense_activations(graph, layer, x)
        past = inputs[contract.past_neuron_stats(layer)]
        stats = neuron_stats(graph, method, layer, h, tokens.counted, past, inputs[contract.STATS_DECAY])
        outputs[contract.present_neuron_stats(layer)] = stats
        indices, tail = mask_and_tail(graph, method, layer, stats, weight, inputs[contract.THRESHOLDS])
        outputs[contract.present_mask_indices(layer)] = indices
        outputs[contract.present_tail_mean(layer)] = tail
        bias = graph.weight(contract.ffn_bias(layer, "down")) if spec.ffn_bias else None
        return graph.product(h, contract.ffn_weight(layer, "down")), bias

    hidden = graph.layers(lengths, ffn)
    last = last_positions(ops, hidden, inputs[contract.NUM_LOGITS], tokens.attended)
    outputs[contract.LOGITS] = graph.logits(last)
    prior = prior or Prior(np.zeros((spec.num_layers, 2, spec.ffn_size), np.float32), 0.0)
    defaults: dict[str, np.ndarray] = {
        **{contract.past_neuron_stats(i): prior.stats[i] for i in range(spec.num_layers)},
        contract.PAST_STATS_WEIGHT: np.array([prior.tokens], np.float32),
        contract.STATS_DECAY: np.ones(1, np.float32),
        contract.THRESHOLDS: np.asarray(thresholds, np.float32),
        contract.NUM_LOGITS: np.ones(1, np.int64),
    }
    return graph.model("prefill", contract.prefill_outputs(shape), defaults, statistics_functions(method))
