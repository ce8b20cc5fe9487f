"""What is not worth learning from: texts that repeat themselves, and texts that repeat others.

Everything works on token ids, so that no language needs its own words, and on hashes that are the same everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_REPEAT_TOKENS = 4  # n-grams whose repetition is counted
_SHINGLE_TOKENS = 5  # n-grams whose sets are compared
_BANDS, _BAND_ROWS = 16, 4  # of a signature: texts that agree in one whole band are compared


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: (...) uint64 to (...) uint64 that look independent."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _ngrams(ids: Sequence[int], n: int) -> np.ndarray:
    """A hash of every run of `n` ids, (max(len(ids) - n + 1, 0),) uint64."""
    tokens = np.asarray(ids, dtype=np.uint64)
    count = max(len(tokens) - n + 1, 0)
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(n):
        hashes = _mixed(hashes + tokens[i : i + count] + np.uint64(0x9E3779B97F4A7C15))
    return hashes


def repeated_share(ids: Sequence[int], n: int = _REPEAT_TOKENS) -> float:
    """Share of the runs of `n` ids that stood in the text before, in [0, 1); 0 for texts shorter than `n`.

    Prose and code stay below about 0.2; a text that ends in a loop has the share of its loop.
    """
    grams = _ngrams(ids, n)
    return 1 - len(np.unique(grams)) / len(grams) if len(grams) else 0.0


class SeenTexts:
    """Remembers texts and finds those that were there before, word for word or nearly.

    Near-duplicates are found by MinHash: the share of 64 random orders in which two sets of 5-grams have the same
    smallest element estimates their Jaccard similarity (Broder, "On the resemblance and containment of documents",
    1997). Signatures are cut into 16 bands of 4; texts that agree in a band are compared, which finds pairs of
    similarity 0.7 with a probability of 0.99 and pairs of 0.3 with one of 0.12.

    Parameters
    ----------
    similarity : float
        Texts this similar or more, by the estimate, are near-duplicates; in (0, 1]. 1 leaves exact duplicates, in
        which white space and case do not count, and texts of the same 5-grams.

    Raises
    ------
    ValueError
        For a similarity outside of this range.
    """

    def __init__(self, similarity: float = 0.7) -> None:
        if not 0 < similarity <= 1:
            raise ValueError(f"similarity must be in (0, 1], got {similarity}")
        self.similarity = similarity
        self._exact: set[bytes] = set()
        self._signatures: list[np.ndarray] = []
        self._bands: dict[tuple[int, bytes], list[int]] = {}
        orders = np.arange(1, _BANDS * _BAND_ROWS + 1, dtype=np.uint64)
        self._orders = _mixed(orders * np.uint64(0x9E3779B97F4A7C15))[:, None]

    def add(self, text: str, ids: Sequence[int]) -> str | None:
        """Remember a text unless it is a duplicate.

        Parameters
        ----------
        text : str
        ids : sequence of int
            Its tokens; texts of fewer than 5 have no near-duplicates.

        Returns
        -------
        None, "duplicate" or "near_duplicate"
        """
        exact = hashlib.sha256(" ".join(text.lower().split()).encode(errors="surrogatepass")).digest()
        if exact in self._exact:
            return "duplicate"
        grams = np.unique(_ngrams(ids, _SHINGLE_TOKENS))
        if len(grams):
            signature = _mixed(grams ^ self._orders).min(axis=1)
            bands = [(i, rows.tobytes()) for i, rows in enumerate(signature.reshape(_BANDS, _BAND_ROWS))]
            candidates = {number for band in bands for number in self._bands.get(band, ())}
            if any((self._signatures[c] == signature).mean() >= self.similarity for c in candidates):
                return "near_duplicate"
            for band in bands:
                self._bands.setdefault(band, []).append(len(self._signatures))
            self._signatures.append(signature)
        self._exact.add(exact)
        return None
