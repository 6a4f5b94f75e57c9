"""SliderQuant: post-training quantization of language models with sliding windows.

Paper: "SliderQuant" (ICLR 2026, arXiv 2603.25284). ``quantize`` takes a model directory to a quantized
one, ``quantize_model`` does the same to a model in memory, and ``load`` reads what only this package
reads; the other commands are ``evaluate``, ``export``, ``inspect`` and ``demo``; ``calibrate`` is the
method itself.
"""

from typing import TYPE_CHECKING

from effml_common.exports import lazy_exports

if TYPE_CHECKING:
    from sliderquant.adapters.native import load as load
    from sliderquant.commands.eval import evaluate as evaluate
    from sliderquant.commands.export import export as export
    from sliderquant.commands.inspect import inspect as inspect
    from sliderquant.commands.quantize import quantize as quantize
    from sliderquant.commands.quantize_model import quantize_model as quantize_model
    from sliderquant.config import QuantizeConfig as QuantizeConfig
    from sliderquant.config import SliderConfig as SliderConfig
    from sliderquant.method.calibration import calibrate as calibrate
    from sliderquant.method.windows import make_windows as make_windows

lazy_exports(
    __name__,
    {
        "QuantizeConfig": "config",
        "SliderConfig": "config",
        "calibrate": "method.calibration",
        "evaluate": "commands.eval",
        "export": "commands.export",
        "inspect": "commands.inspect",
        "load": "adapters.native",
        "make_windows": "method.windows",
        "quantize": "commands.quantize",
        "quantize_model": "commands.quantize_model",
    },
)
