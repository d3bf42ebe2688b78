"""Compare the graphs of a priced artifact with transformers, in which linears drop the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from tda_export.graph import contract
from tda_export.graph.comparison import Comparison
from tda_export.graph.derive import initializer_names, listed_rows, weight_table
from tda_export.graph.priced import priced_matrices
from tda_export.graph.reference import reference_logits
from tda_export.models.linear_modules import watch_sites
from tda_export.models.row_dropping import dropping
from tda_export.packing import linear_sites, packed_matrices
from tda_export.runtime.deployment import PriceDeployment
from tda_export.runtime.kv_cache import KvCache
from tda_export.runtime.phases import bind_call, decode
from tda_export.runtime.priced import PricedPrefill, PricedStep
from tda_export.runtime.session import device_tensor, map_weight, open_session

CHUNK = 7  # tokens of a chunk in the chunked-prefill check
# The share of rows for which rounding of x may change the decision against transformers.
OTHERWISE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "float16 cache": 3e-3, "int8 cache": 5e-2}


class PricedComparison(Comparison):
    """Prefill whole and in chunks, decode densely, and decode at a price at which about half of the rows are read."""

    def _compare(self, prompt: list[int], continuation: list[int]) -> None:
        dense, dense_continuation = reference_logits(self.reference, self.spec, prompt, continuation)
        half = reference_logits(self.rounded, self.spec, prompt, continuation) if self.rounded else (None, None)
        self._logits("prefill logits", self._all_prompt_logits(prompt), dense, half[0])
        step = PricedStep(self.sessions, self.shape, len(prompt) + len(continuation))
        step.capture()
        step.begin(prompt, PriceDeployment(0.0))
        start = step.cache.length
        self._chunked(prompt, step.cache)
        self.advance(1)

        self._logits("decode at price 0", self._decode(continuation, step.cache, 0.0), dense_continuation, half[1])
        prices = self._row_prices()
        price = self._price_of_half(prices, prompt, continuation)
        step.cache.truncate(start)
        rows = self._listed(continuation, step.cache, price, [1, len(continuation) - 1])
        step.cache.truncate(start)
        at_price = self._decode(continuation, step.cache, price)
        self._at_price("decode at a price", at_price, prices, price, rows, prompt, continuation)
        self.advance(1)

        step.cache.truncate(start)
        rows = self._listed(continuation, step.cache, price, [1] * len(continuation))
        step.cache.truncate(start)
        step.follow(PriceDeployment(price))
        one_by_one = np.stack([step.logits(token) for token in continuation])
        self._at_price("decode token by token", one_by_one, prices, price, rows, prompt, continuation)
        self.advance(1)

    def _at_price(
        self,
        name: str,
        ours: np.ndarray,
        prices: Mapping[str, torch.Tensor],
        price: float,
        rows: Mapping[str, torch.Tensor],
        prompt: list[int],
        continuation: list[int],
    ) -> None:
        """Compare logits with transformers reading the artifact's rows, and these rows with the ones that the price
        selects.

        Rounding decides whether rows just worth the price are read, and one more row changes what all later layers
        read. So logits alone could not be compared.
        """
        expected, otherwise = self._dropped(self.reference, prices, price, rows, prompt, continuation)
        half = self._dropped(self.rounded, prices, price, rows, prompt, continuation)[0] if self.rounded else None
        self._logits(name, ours, expected, half)
        self._add("rows read at a price", otherwise, OTHERWISE[self.shape.precision])

    def _chunked(self, prompt: list[int], cache: KvCache) -> None:
        pieces = KvCache(self.shape, self.provider, len(prompt))
        PricedPrefill(self.sessions, self.shape, pieces).read(prompt, chunk=CHUNK)
        self._same_cache("keys and values after chunked prefill", pieces, cache)

    def _decode(self, continuation: list[int], cache: KvCache, price: float) -> np.ndarray:
        """Decode the continuation: its first token alone (S = 1), the others in one call. Returns [C, V]."""
        inputs = {contract.PRICE: device_tensor(np.array([price], np.float32), self.provider)}
        pieces = [piece for piece in (continuation[:1], continuation[1:]) if piece]
        return np.concatenate([decode(self.sessions, cache, piece, None, inputs) for piece in pieces])

    def _row_prices(self) -> dict[str, torch.Tensor]:
        """Read the worth of the artifact's rows, float32 [L, in] by matrix, [1, in] of the head."""
        found = {}
        for name, matrices in self._matrices.items():
            rows = [map_weight(self.artifact, contract.row_price(matrix)) for matrix in matrices]
            found[name] = torch.from_numpy(np.stack(rows))
        return found

    @cached_property
    def _matrices(self) -> dict[str, list[str]]:
        """Name the matrices with prices by what they are called in a layer, and the head."""
        stored = list(packed_matrices(self.spec, self.artifact.manifest["packing"]))
        stored += [contract.HEAD] if contract.row_price(contract.HEAD) in self.artifact.manifest["weights"] else []
        return {name: contract.weights_of(name, self.shape.num_layers) for name in stored}

    def _price_of_half(self, prices: Mapping[str, torch.Tensor], prompt: list[int], continuation: list[int]) -> float:
        """Find a price at which about half of the rows are read: the median of the rows' worth to the tokens."""
        sites, worth = linear_sites(self.spec), list[torch.Tensor]()

        def observe(layer: int, site: str, x: torch.Tensor) -> None:
            for name in (site, *sites[site]):
                if name in prices:
                    worth.append((x.float().square() * prices[name][layer].to(x.device)).flatten())

        with watch_sites(self.reference, self.spec, observe), torch.inference_mode():
            self.reference(torch.tensor([prompt + continuation], device=self.reference.device))
        return float(torch.cat(worth).median())

    def _listed(
        self, continuation: list[int], cache: KvCache, price: float, calls: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Decode a continuation in calls of given lengths, and return which rows each token reads, bool [L, C, in]."""
        inputs = {contract.PRICE: device_tensor(np.array([price], np.float32), self.provider)}
        found, start = [], 0
        for size in calls:
            if not size:
                continue
            call = bind_call(self._listing, cache, continuation[start : start + size], inputs)
            call.allocate(contract.READ_ROWS, "cpu")
            found.append(torch.from_numpy(call.run()[contract.READ_ROWS].numpy()[0].copy()))
            cache.commit()
            start += size
        names = priced_matrices(self.spec, weight_table(self.artifact))
        sizes = [self.artifact.matrices[name].rows for name in names]
        every = dict(zip(names, torch.cat(found).split(sizes, dim=1), strict=True))
        return {name: torch.stack([every[matrix] for matrix in matrices]) for name, matrices in self._matrices.items()}

    @cached_property
    def _listing(self) -> ort.InferenceSession:
        """Open a decode session that returns which rows it reads."""
        model = listed_rows(self.artifact)
        names = initializer_names(model)
        weights = {name: value for name, value in self.sessions.shared_weights.items() if name in names}
        return open_session(self.artifact, model, self.provider, weights, native=self.sessions.native)

    def _dropped(
        self,
        model: Any,
        prices: Mapping[str, torch.Tensor],
        price: float,
        rows: Mapping[str, torch.Tensor],
        prompt: list[int],
        continuation: list[int],
    ) -> tuple[torch.Tensor, float]:
        """Decode a continuation in transformers with given rows, after a prompt that is read densely.

        Returns:
            Logits, float32 [C, V], and the share of rows for which the price decides differently.
        """
        device = model.device
        with torch.inference_mode():
            past = model(torch.tensor([prompt], device=device), use_cache=True).past_key_values
            with dropping(model, self.spec, prices, price, rows) as count:
                output = model(torch.tensor([continuation], device=device), past_key_values=past, use_cache=True)
        logits: torch.Tensor = output.logits[0].float().cpu()
        return logits, count.otherwise / count.decided
