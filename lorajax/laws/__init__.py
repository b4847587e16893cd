"""Analytic predictions: each law a short function next to its source.

Times come first and broadcast against the rest; a law's constants are keyword arguments with the
claimed values as defaults, so that a claim's control alters them without writing the law again.
Units: gradient flow of `½‖S − AB‖²` has time in 1/s, with s a singular value of S; a start's scale
a has the unit √s.

A law is written in one file of this folder, which is found from here.
"""

import importlib
import pkgutil

from lorajax.laws.base import (
    MODE_LAWS,
    ModeLaw,
    Real,
    mode_law,
)
from lorajax.laws.conservation import imbalance_decay, lora_plus_level, tucker_level
from lorajax.laws.descents import (
    adam_first_step,
    frame_gain,
    riemannian_mode,
    scaled_gd_error,
)
from lorajax.laws.early import (
    early_descent,
)
from lorajax.laws.intruders import (
    gaussian_intruder,
    gaussian_intruder_overlap,
    gaussian_threshold,
)
from lorajax.laws.landscape import (
    outer_bound,
    rank_count,
    spurious_away,
    spurious_distance,
    spurious_share,
)
from lorajax.laws.modes import (
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
    relu_overlap_velocity,
)
from lorajax.laws.rates import (
    carried_rate,
    factor_balance,
    gradient_step_gain,
    multiplied_equivalent,
    sign_change,
)
from lorajax.laws.small import guidance_gap, projected_share, saddle_curvature
from lorajax.laws.trace_squared import (
    orthonormal_error,
    trace_squared_angle,
    trace_squared_error,
    trace_squared_flow,
)
from lorajax.laws.tucker import (
    tucker_delay_exponent,
    tucker_half_time,
    tucker_mode,
    tucker_rate,
    tucker_time,
)
from lorajax.laws.two_layer import (
    alignment_exponent,
    escape_slope,
    growth_rates,
    loss_decay,
    slow_layer_exponent,
)
from lorajax.laws.whitening import whitened_noise, whitened_risk

__all__ = [
    "MODE_LAWS",
    "ModeLaw",
    "Real",
    "adam_first_step",
    "alignment_exponent",
    "allora_time",
    "attention_plateaus",
    "balanced_mode",
    "carried_rate",
    "deflated_amplitudes",
    "early_descent",
    "escape_slope",
    "factor_balance",
    "frame_gain",
    "gaussian_intruder",
    "gaussian_intruder_overlap",
    "gaussian_threshold",
    "gradient_step_gain",
    "growth_rates",
    "guidance_gap",
    "half_time",
    "imbalance_decay",
    "lazy",
    "lazy_modes",
    "logistic",
    "logistic_modes",
    "lora_mode",
    "lora_modes",
    "lora_plus_equivalent",
    "lora_plus_level",
    "mode_law",
    "multiplied_equivalent",
    "one_step_error",
    "orthonormal_error",
    "outer_bound",
    "projected_share",
    "rank_count",
    "relu_overlap_rate",
    "relu_overlap_velocity",
    "loss_decay",
    "riemannian_mode",
    "saddle_curvature",
    "scaled_gd_error",
    "sign_change",
    "slow_layer_exponent",
    "spectral_flow",
    "spectral_hit_time",
    "spurious_away",
    "spurious_distance",
    "spurious_share",
    "superfluous",
    "tanh_squared",
    "tanh_squared_modes",
    "trace_squared_angle",
    "trace_squared_error",
    "trace_squared_flow",
    "tucker_delay_exponent",
    "tucker_half_time",
    "tucker_level",
    "tucker_mode",
    "tucker_rate",
    "tucker_time",
    "whitened_noise",
    "whitened_risk",
]

# The names above are for type checkers; a file that they leave out is found all the same.
for _file in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f"{__name__}.{_file.name}")
    for _name, _value in vars(_module).items():
        if getattr(_value, "__module__", "") == _module.__name__ and not _name.startswith("_"):
            globals().setdefault(_name, _value)
