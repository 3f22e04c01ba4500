"""What the columns of an audit mean that are not columns of a run."""

from __future__ import annotations

from collections.abc import Mapping

MEANINGS: Mapping[str, str] = {
    "adapter": "name of the adapter: the shortest end of its path that says which it is",
    "state": "used; unused: delta is exactly 0; nearly unused: its norm is below --unused-below of the median of the "
    "adapter's norms above 0; not finite; refused: delta is not the saved product",
    "rank_bound": "smallest width of the chain: the most singular values that delta can have",
    "chain_length": "number of inner factors; 0 for LoRA, 1 for MoSLoRA",
    "refused": "why delta is not the saved product; null where it is",
    "product_spectrum": "singular values of the saved product where that is not delta; null elsewhere",
    "rank_cut_off": "numerical_rank counts the σ_i above this share of σ₁: max(d_in, d_out) · machine epsilon of the "
    "stored factors",
    "factors": "A, W1 … Wn, B, from input to output",
    "factor_condition": "σ₁/σ_min of each factor; depends on the gauge",
    "base_norm": "‖W_0‖, Frobenius",
    "base_spectral_norm": "σ₁ of W_0, by randomised decomposition",
    "relative_delta": "‖ΔW‖/‖W_0‖",
    "relative_spectral_norm": "σ₁ of ΔW over σ₁ of W_0",
    "base_directions": "K: how many leading singular vectors of W_0 are known",
    "base_alignment_left": "‖UᵀΔW‖/‖ΔW‖ with U the K leading input-side singular vectors of W_0, in 0 … 1",
    "base_alignment_right": "‖ΔW V‖/‖ΔW‖ with V the K leading output-side ones",
    "base_alignment_left_by_chance": "√(K/d_in): root mean square of the alignment with a random subspace",
    "base_alignment_right_by_chance": "√(K/d_out)",
    "amplification": "‖ΔW‖/‖UᵀW_0 V‖, U and V the singular directions of ΔW above rank_cut_off (LoRA, arXiv "
    "2106.09685, section 7.3)",
    "intruders_lower": "intruder dimensions (arXiv 2410.21228) among the 10 leading output-side singular vectors of "
    "W_0 + ΔW: |cos| below 0.5 with every one of W_0, known or not; a lower bound on their number",
    "intruders_upper": "the same with every known one of W_0: an upper bound",
    "similarity": "φ = ‖U₁ᵀU₂‖²/min(i, j) in 0 … 1 of the leading singular directions of two deltas (arXiv 2106.09685, "
    "section 7.2)",
    "similarity_by_chance": "max(i, j)/d: mean of φ for random subspaces",
    "smallest_angle": "smallest principal angle in degrees",
    "largest_angle": "largest principal angle in degrees",
    "angles": "all principal angles in degrees, ascending",
}
