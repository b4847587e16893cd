"""Analytic predictions: each law a short function next to its source.

Times come first and broadcast against the rest. Units: gradient flow of `½‖S − AB‖²` has time in
1/s, with s a singular value of S; a start's scale a has the unit √s.
"""

from lorajax.laws.broadcast import (
    Real,
)
from lorajax.laws.early import early_descent
from lorajax.laws.modes import (
    MODE_LAWS,
    balanced_mode,
    deflated_amplitudes,
    half_time,
    lazy,
    lazy_modes,
    logistic,
    logistic_modes,
    lora_mode,
    lora_modes,
    lora_plus_equivalent,
    spectral_flow,
    spectral_hit_time,
    superfluous,
    tanh_squared,
    tanh_squared_modes,
)
from lorajax.laws.neighbors import (
    allora_time,
    attention_plateaus,
    one_step_error,
    relu_overlap_rate,
)
from lorajax.laws.trace_squared import (
    trace_squared_angle,
    trace_squared_error,
    trace_squared_flow,
)
from lorajax.laws.tucker import tucker_half_time, tucker_mode, tucker_rate, tucker_time
from lorajax.laws.two_layer import (
    escape_slope,
    growth_rates,
    slow_layer_exponent,
)

__all__ = [
    "allora_time",
    "attention_plateaus",
    "one_step_error",
    "relu_overlap_rate",
    "MODE_LAWS",
    "Real",
    "balanced_mode",
    "deflated_amplitudes",
    "early_descent",
    "escape_slope",
    "growth_rates",
    "half_time",
    "lazy",
    "lazy_modes",
    "logistic",
    "logistic_modes",
    "lora_mode",
    "lora_modes",
    "lora_plus_equivalent",
    "slow_layer_exponent",
    "spectral_flow",
    "spectral_hit_time",
    "superfluous",
    "tanh_squared",
    "tanh_squared_modes",
    "trace_squared_angle",
    "trace_squared_error",
    "trace_squared_flow",
    "tucker_half_time",
    "tucker_mode",
    "tucker_rate",
    "tucker_time",
]
